"""One broker for all clouds of a store: a device of one cloud must see what another appends.

The store keeps which. A cloud that was given another one does not start; one that was given none
uses it. A broker that a cloud brought itself goes with that cloud, and is replaced by the next.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import TracebackType

import structlog

from segue_cloud.sessions.broker import BrokerRecord, KnownBroker
from segue_contract.errors import OtherBroker, SegueError
from segue_contract.limits import CONNECT_ATTEMPT_S
from segue_contract.transport.mqtt import canonical_mqtt_url, parse_mqtt_url
from segue_contract.transport.together import end

log = structlog.get_logger("segue.mqtt")

_RENEWALS = 3  # within a lease


class OneBroker:
    """`settle` first; inside `async with` it is kept, and `moved` told of another one."""

    def __init__(
        self, record: BrokerRecord, instance: str, start: Callable[[], Awaitable[str]]
    ) -> None:
        """`start`: brings a broker of our own, and returns its URL."""
        self._record = record
        self._instance = instance
        self._start = start
        self.moved: Callable[[str], None] = lambda url: None
        self._url = ""
        self._owner: str | None = None  # as we claim it; None: it is another instance's
        self._task: asyncio.Task[None] | None = None

    async def settle(self, given: str) -> str:
        """The URL to publish through; `given`: --mqtt-url, or "".

        Raises:
            OtherBroker: `given` is another one than that of the clouds that run.
            InvalidArgument: `given` is no address.
            StoreUnavailable.
        """
        if given:
            await self._take(given)
        else:
            await self._adopt_or_start()
        return self._url

    async def __aenter__(self) -> OneBroker:
        self._task = asyncio.create_task(self._keep(), name="one broker")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._task is not None:
            await end(self._task)
        if self._owner:
            try:
                await self._record.release(self._url, self._owner)
            except SegueError as failed:  # the lease runs out
                log.warning("broker_not_released", error=str(failed))

    # -- inside -------------------------------------------------------------------------------

    async def _take(self, given: str) -> None:
        url = canonical_mqtt_url(given)
        while True:
            known = await self._record.claim(url)
            if known.url == url:
                break
            if known.owner and not await _answers(known.url):
                known = await self._record.claim(url, replaces=known.url)
                if known.url == url:
                    break
            await asyncio.sleep(known.left_s)  # of a cloud that is gone, the lease runs out
            again = await self._record.look()
            if again is not None and again.url == known.url:
                raise OtherBroker(
                    f"The clouds on this store publish through {known.url}, and this one was "
                    f"given {url}: devices of one would not see what the other appends.",
                    hint=f"Give --mqtt-url {known.url}, or none, or stop the others first.",
                    url=known.url,
                )
        self._url, self._owner = url, ""

    async def _adopt_or_start(self) -> None:
        known = await self._record.look()
        if known is not None and (not known.owner or await _answers(known.url)):
            self._adopt(known)
            return
        url = await self._start()
        mine = await self._record.claim(
            url, self._instance, replaces=known.url if known is not None else ""
        )
        if mine.url == url:
            self._url, self._owner = url, self._instance
        else:  # somebody began at the same time
            self._adopt(mine)

    def _adopt(self, known: KnownBroker) -> None:
        self._url = known.url
        self._owner = None if known.owner else ""
        log.info("broker_of_others", url=known.url, owner=known.owner)

    async def _keep(self) -> None:
        """Renew what is ours, follow what is others'."""
        said = ""
        while True:
            await asyncio.sleep(self._record.lease_s / _RENEWALS)
            try:
                if self._owner is None:
                    known = await self._record.look()
                else:
                    known = await self._record.claim(self._url, self._owner)
            except SegueError as error:
                log.warning("broker_record_unknown", error=str(error))
                continue
            now = known.url if known is not None else ""
            if now == self._url:
                said = ""
            elif self._owner is None and known is not None:
                log.warning("broker_moved", url=now, before=self._url)
                self._adopt(known)
                self.moved(now)
            elif said != now:
                said = now
                log.error("broker_lost", url=self._url, others=now or "none",
                          hint="Give all clouds of a store the same --mqtt-url.")  # fmt: skip


async def _answers(url: str) -> bool:
    """Whether anybody listens there."""
    host, port = parse_mqtt_url(url).address
    try:
        async with asyncio.timeout(CONNECT_ATTEMPT_S):
            _, writer = await asyncio.open_connection(host, port)
    except OSError:  # TimeoutError is one
        return False
    writer.close()
    return True
