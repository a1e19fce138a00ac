"""How many sessions a tenant has: the store's count, asked for now and then."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable

from segue_cloud.tenants.usage import TenantUsage, no_more_sessions
from segue_contract.errors import QuotaExceeded
from segue_contract.limits import MAX_TENANT_KEYS, QUOTA_SESSIONS_S


class SessionQuota:
    """Args:
    count: a tenant's sessions in the store.
    monotonic: seconds.
    """

    def __init__(
        self,
        usage: TenantUsage,
        count: Callable[[str], Awaitable[int]],
        monotonic: Callable[[], float],
    ) -> None:
        self._usage = usage
        self._count = count
        self._now_s = monotonic
        self._known: OrderedDict[str, tuple[int, float]] = OrderedDict()

    async def reached(self, tenant: str) -> QuotaExceeded | None:
        """What to tell a device that wants one session more; None: it may have it.

        Instances that ask at once may let a few more through: each asks the store every
        `QUOTA_SESSIONS_S`, and counts what it makes itself.

        Raises:
            StoreUnavailable.
        """
        limit = self._usage.quotas(tenant).sessions
        if limit == float("inf"):
            return None
        count, at_s = self._known.get(tenant, (0, float("-inf")))
        if self._now_s() - at_s >= QUOTA_SESSIONS_S or count >= limit:
            count = await self._count(tenant)
            self._known[tenant] = count, self._now_s()
            self._known.move_to_end(tenant)
            if len(self._known) > MAX_TENANT_KEYS:
                self._known.popitem(last=False)
        return no_more_sessions(limit) if count >= limit else None

    def made(self, tenant: str) -> None:
        """This instance made one."""
        if tenant in self._known:
            count, at_s = self._known[tenant]
            self._known[tenant] = count + 1, at_s
