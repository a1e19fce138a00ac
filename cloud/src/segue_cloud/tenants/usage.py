"""What tenants use of this instance, held against their quotas. Pure: the clock comes from outside.

Each instance counts by itself, but for a tenant's sessions: those the store counts.
"""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator

from segue_contract.bucket import Bucket
from segue_contract.errors import QuotaExceeded
from segue_contract.limits import (
    MAX_TENANT_KEYS,
    QUOTA_BURST_S,
    QUOTA_DEVICE_S,
    QUOTA_RETRY_S,
    QUOTA_TOKENS_BURST_S,
    TenantQuotas,
)

UNLIMITED = TenantQuotas(
    sessions=math.inf,
    devices=math.inf,
    attaches=math.inf,
    turns=math.inf,
    ops_per_s=math.inf,
    bytes_per_s=math.inf,
    tokens_per_min=math.inf,
)


class _Usage:
    """Of one tenant."""

    def __init__(self, quotas: TenantQuotas, now_s: float) -> None:
        self.quotas = quotas
        self.ops = Bucket(quotas.ops_per_s, QUOTA_BURST_S, now_s)
        self.bytes = Bucket(quotas.bytes_per_s, QUOTA_BURST_S, now_s)
        self.tokens = Bucket(quotas.tokens_per_min / 60, QUOTA_TOKENS_BURST_S, now_s)
        self.attaches = 0
        self.devices: OrderedDict[str, float] = OrderedDict()  # when each was last seen

    def change(self, quotas: TenantQuotas, now_s: float) -> None:
        if quotas == self.quotas:
            return
        self.quotas = quotas
        self.ops.change(quotas.ops_per_s, QUOTA_BURST_S, now_s)
        self.bytes.change(quotas.bytes_per_s, QUOTA_BURST_S, now_s)
        self.tokens.change(quotas.tokens_per_min / 60, QUOTA_TOKENS_BURST_S, now_s)


class TenantUsage:
    """Every method that raises QuotaExceeded does so before anything was counted or written.

    Args:
        quotas: of a tenant, as they are now.
        monotonic: seconds.
    """

    def __init__(
        self, quotas: Callable[[str], TenantQuotas], monotonic: Callable[[], float]
    ) -> None:
        self._quotas = quotas
        self._now_s = monotonic
        self._tenants: OrderedDict[str, _Usage] = OrderedDict()

    def quotas(self, tenant: str) -> TenantQuotas:
        return self._quotas(tenant)

    def weight(self, tenant: str) -> float:
        """How large a part of the engine and of the places the tenant may claim beside others."""
        return self._quotas(tenant).weight

    # -- rates ---------------------------------------------------------------------------------

    def append(self, tenant: str, ops: int, size: int) -> None:
        """So many ops of so many bytes are about to be written. Raises QuotaExceeded."""
        one, now_s = self._of(tenant)
        wait_s = one.ops.wait_s(ops, now_s)
        if wait_s > 0:
            raise _too_fast("ops_per_s", one.quotas.ops_per_s, "ops a second", wait_s)
        wait_s = one.bytes.wait_s(size, now_s)
        if wait_s > 0:
            raise _too_fast("bytes_per_s", one.quotas.bytes_per_s, "bytes a second", wait_s)
        one.ops.take(ops, now_s)
        one.bytes.take(size, now_s)

    def turn(self, tenant: str, running: int) -> None:
        """A turn is about to begin beside `running` others. Raises QuotaExceeded."""
        one, now_s = self._of(tenant)
        wait_s = one.tokens.wait_s(1.0, now_s)
        if wait_s > 0:
            raise _too_fast("tokens_per_min", one.quotas.tokens_per_min, "tokens a minute", wait_s)
        if running >= one.quotas.turns:
            raise _too_many("turns", one.quotas.turns, "turns at once", QUOTA_RETRY_S)

    def computed(self, tenant: str, tokens: int) -> None:
        """Tokens of prompts and replies that the tenant's turns took. What runs goes on when they
        are too many; what begins next waits."""
        one, now_s = self._of(tenant)
        one.tokens.take(tokens, now_s)

    # -- what is held --------------------------------------------------------------------------

    @contextlib.contextmanager
    def attached(self, tenant: str) -> Iterator[None]:
        """While inside, one more stream follows a session. Raises QuotaExceeded."""
        one, _ = self._of(tenant)
        if one.attaches >= one.quotas.attaches:
            raise _too_many("attaches", one.quotas.attaches, "followed sessions", QUOTA_RETRY_S)
        one.attaches += 1
        try:
            yield
        finally:
            one.attaches -= 1

    def device(self, tenant: str, device: str) -> None:
        """A device opens a session. Raises QuotaExceeded where it is one too many of those that
        did so in the last `QUOTA_DEVICE_S`."""
        one, now_s = self._of(tenant)
        if math.isinf(one.quotas.devices):
            return
        seen = one.devices
        while seen and next(iter(seen.values())) < now_s - QUOTA_DEVICE_S:
            seen.popitem(last=False)
        if device not in seen and len(seen) >= one.quotas.devices:
            oldest_s = next(iter(seen.values())) if seen else now_s
            wait_s = max(QUOTA_RETRY_S, oldest_s + QUOTA_DEVICE_S - now_s)
            raise _too_many("devices", one.quotas.devices, "devices in use", wait_s)
        seen[device] = now_s
        seen.move_to_end(device)

    # -- inside --------------------------------------------------------------------------------

    def _of(self, tenant: str) -> tuple[_Usage, float]:
        now_s = self._now_s()
        quotas = self._quotas(tenant)
        one = self._tenants.get(tenant)
        if one is None:
            one = self._tenants[tenant] = _Usage(quotas, now_s)
            self._forget()
        self._tenants.move_to_end(tenant)
        one.change(quotas, now_s)
        return one, now_s

    def _forget(self) -> None:
        """The tenant that was seen longest ago, of more than there can be keys."""
        if len(self._tenants) > MAX_TENANT_KEYS:
            oldest = next(iter(self._tenants))
            if not self._tenants[oldest].attaches:
                del self._tenants[oldest]


def unlimited(monotonic: Callable[[], float]) -> TenantUsage:
    """For an open loopback: one tenant, and no quotas."""
    return TenantUsage(lambda tenant: UNLIMITED, monotonic)


def no_more_sessions(limit: float) -> QuotaExceeded:
    """The tenant has as many sessions as it may."""
    return QuotaExceeded(
        f"Your app has {limit:g} sessions, and may have no more.",
        hint="Delete some that are not needed (`segue session delete`, or --session-ttl).",
        what="sessions",
        limit=limit,
    )


def _too_fast(what: str, limit: float, words: str, wait_s: float) -> QuotaExceeded:
    return QuotaExceeded(
        f"Your app may use {limit:g} {words}, and did.",
        hint=f"Try again in {wait_s:.2g} s.",
        what=what,
        limit=limit,
        retry_after_s=round(wait_s, 3),
    )


def _too_many(what: str, limit: float, words: str, wait_s: float) -> QuotaExceeded:
    return QuotaExceeded(
        f"Your app has {limit:g} {words}, and may have no more.",
        hint="Try again when one of them has ended.",
        what=what,
        limit=limit,
        retry_after_s=round(wait_s, 3),
    )
