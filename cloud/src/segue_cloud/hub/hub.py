"""Live followers in this process: a snapshot first, then every entry, in order, once.

Entries that this process appends come at once; of those of other instances the store tells. Where
it does not, tails of followed sessions are looked up every `HUB_POLL_S`, some in one round trip.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType

import structlog

from segue_cloud.hub.feed import TailFeed
from segue_cloud.hub.state import HubState
from segue_cloud.sessions.news import LogTail
from segue_cloud.sessions.port import Reading, StoredEntry
from segue_cloud.sessions.reader import LogReader, Page
from segue_contract.errors import CursorAhead, SegueError
from segue_contract.ids import SessionName
from segue_contract.limits import (
    HUB_EVENT_BYTES,
    HUB_POLL_S,
    HUB_POLL_SESSIONS,
    MAX_READ_ENTRIES,
)
from segue_contract.sync.state import Cursor, SessionState
from segue_contract.transport.together import end

log = structlog.get_logger("segue.hub")


@dataclass(frozen=True)
class Following:
    """One step of a follower: a state to start (over) from, or entries that follow on."""

    entries: list[StoredEntry]
    snapshot: SessionState | None = None
    lost_from: int = 0  # entries from that offset on, told earlier, are not in the log


class Hub:
    """`async with Hub(store, reader) as hub:` learns of tails in the background."""

    def __init__(
        self,
        store: Reading,
        reader: LogReader,
        *,
        poll_s: float = HUB_POLL_S,
        state: HubState | None = None,
    ) -> None:
        self._reader = reader
        self._store = store
        self._poll_s = poll_s
        self._state = state or HubState()
        self._feed = TailFeed(store, self)
        self._polled = 0  # where the next look at the followed sessions begins
        self._wakes: dict[int, asyncio.Event] = {}
        self._gone: set[SessionName] = set()  # followed ones that are not in the store now
        self._someone = asyncio.Event()
        self._poller: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Hub:
        await self._feed.__aenter__()
        self._poller = asyncio.create_task(self._poll(), name="hub poll")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._poller is not None:
            await end(self._poller)
        await self._feed.__aexit__(kind, error, trace)

    @property
    def followers(self) -> int:
        return len(self._wakes)

    def offer(self, session: SessionName, entries: Sequence[StoredEntry]) -> None:
        """Entries that were just appended here."""
        self._wake(self._state.offer(session, entries))

    def deleted(self, session: SessionName) -> None:
        """The session is gone: its followers look, and end with SessionDeleted."""
        self._wake(self._state.lost(session))

    # -- of tails, by the feed ----------------------------------------------------------------

    def told(self, session: SessionName, tail: Cursor) -> None:
        self._wake(self._state.told(session, tail))

    async def look(self, sessions: Sequence[SessionName]) -> list[LogTail | None]:
        """Their tails as the store has them; followers are woken where that is news. A session that
        the store lost is waited for: somebody may open it again.

        Raises:
            StoreUnavailable.
        """
        asked_at = [self._state.tail(session) for session in sessions]
        tails = await self._store.tails(sessions)
        missing: list[SessionName] = []
        for session, tail, at in zip(sessions, tails, asked_at, strict=True):
            if tail is not None:
                self._gone.discard(session)
                self._wake(self._state.announce(session, tail.cursor, at))
            elif session not in self._gone:
                missing.append(session)
        for session in await self._store.deleted(missing):
            self.deleted(session)
        self._gone.update(missing)
        return tails

    # -- followers ----------------------------------------------------------------------------

    @property
    def tails_fresh(self) -> bool:
        return self._feed.fresh

    async def tails(self, sessions: Sequence[SessionName]) -> list[LogTail | None]:
        """See `TailFeed.tails`."""
        return await self._feed.tails(sessions)

    @contextlib.asynccontextmanager
    async def follow(
        self, session: SessionName, after: Cursor | None = None
    ) -> AsyncIterator[AsyncIterator[Following]]:
        """Iterate over a snapshot, then entries as they come; a later snapshot starts over.

        `after`: what the caller has. An empty step comes first then, and no snapshot as long as the
        log goes on from there. Leaving the context ends it.

        Raises (while iterating):
            UnknownSession, StoreUnavailable.
            SessionDeleted: it was deleted meanwhile.
        """
        number = self._state.join(session)
        self._wakes[number] = asyncio.Event()
        self._someone.set()
        self._feed.hold(session)
        steps = self._steps(number, session, after)
        try:
            yield steps
        finally:
            await steps.aclose()
            del self._wakes[number]
            self._state.leave(number)
            self._gone.discard(session)
            self._feed.release(session)
            if not self._wakes:
                self._someone.clear()

    def check_integrity(self) -> None:
        self._state.check_integrity()
        self._feed.check_integrity()
        assert self._someone.is_set() == bool(self._wakes)

    # -- inside -------------------------------------------------------------------------------

    async def _steps(
        self, number: int, session: SessionName, after: Cursor | None
    ) -> AsyncGenerator[Following, None]:
        wake = self._wakes[number]
        if after is None:
            asked_at = self._state.tail(session)
            state = await self._reader.state(session)
            at = state.cursor
            self._wake(self._state.announce(session, at, asked_at))
        else:  # where that is not the tail, it has to read
            state, at = None, after
        self._state.move(number, at)
        yield Following([], state)
        while True:
            wake.clear()
            if taken := self._state.take(number, HUB_EVENT_BYTES):
                at = taken[-1].cursor
                yield Following(taken)
            elif (known_tail := self._state.behind(number)) is not None:
                try:
                    page = await self._reader.read(session, at, MAX_READ_ENTRIES)
                except CursorAhead:  # the log was told of, and ends before it
                    state = await self._reader.state(session)
                    page = Page(state.cursor, [], state, state.cursor.offset + 1)
                at = page.end or Cursor(page.tail.generation, at.offset)
                self._state.move(number, at)
                self._wake(self._state.announce(session, page.tail, known_tail))
                if page.end is not None:
                    yield Following(page.entries, page.snapshot, page.lost_from)
            else:
                await wake.wait()

    def _wake(self, followers: Iterable[int]) -> None:
        for number in followers:
            self._wakes[number].set()

    async def _poll(self) -> None:
        """Look tails up where the store does not tell of them."""
        healthy = True
        while True:
            await self._someone.wait()
            await asyncio.sleep(self._poll_s)
            if self._feed.fresh:
                continue
            try:
                await self._poll_some()
                healthy = True
            except SegueError as error:
                if healthy:
                    log.warning("tails_unknown", error=str(error))
                healthy = False

    async def _poll_some(self) -> None:
        followed = self._state.followed
        start = self._polled if self._polled < len(followed) else 0
        some = followed[start : start + HUB_POLL_SESSIONS]
        self._polled = start + len(some)
        await self.look(some)
