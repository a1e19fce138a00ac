"""Sessions as wholes: listed, deleted, expired, exported, imported."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager

import msgspec
import structlog

from segue_cloud.sessions.port import PageStatus, Store, StoredEntry
from segue_cloud.sessions.reader import LogReader
from segue_cloud.sessions.slices import encoded
from segue_cloud.sessions.whole import (
    Deleted,
    SessionImport,
    SessionSummary,
    Shown,
    all_shown,
)
from segue_contract.errors import (
    Overloaded,
    SegueError,
    SessionBusy,
    UnknownSession,
)
from segue_contract.ids import SessionName
from segue_contract.limits import (
    EXPIRE_INTERVAL_S,
    MAX_EXPIRED_AT_ONCE,
    MAX_READ_ENTRIES,
    MAX_TRANSFERS,
)
from segue_contract.sync.export import Export, ExportHead, ExportReader, ExportWriter
from segue_contract.sync.ops import Op, TurnEnded, TurnWithdrawn, encode_op
from segue_contract.sync.state import Cursor, SessionState, encode_state
from segue_contract.transport.together import in_background

log = structlog.get_logger("segue.log")

_TRIES = 3  # of a first page that a compaction overtook


class SessionKeeping:
    """Its owner is the `SessionLog`.

    Args:
        on_deleted: told of every session that is gone.
    """

    def __init__(
        self,
        store: Store,
        reader: LogReader,
        *,
        now_ms: Callable[[], int],
        on_deleted: Callable[[SessionName], None],
        max_transfers: int = MAX_TRANSFERS,
    ) -> None:
        self._store = store
        self._reader = reader
        self._now_ms = now_ms
        self._on_deleted = on_deleted
        self._transfers = 0
        self._max_transfers = max_transfers

    async def list_sessions(
        self, tenant: str, max_sessions: int, after: str = "", shown: Shown = all_shown
    ) -> tuple[list[SessionSummary], str]:
        """As the store's keeper."""
        return await self._store.keeper.list_sessions(tenant, max_sessions, after, shown)

    async def count(self, tenant: str) -> int:
        """As the store's keeper."""
        return await self._store.keeper.count(tenant)

    async def deleted(self, sessions: list[SessionName]) -> set[SessionName]:
        """Those that are not there because they were deleted lately."""
        return await self._store.deleted(sessions)

    # -- deletion -----------------------------------------------------------------------------

    async def delete(self, session: SessionName) -> bool:
        """False where there is none of that name. Followers end with SessionDeleted.

        Raises:
            SessionBusy: a turn runs in it.
        """
        return await self._delete(session, None) is Deleted.YES

    async def expire(
        self, tenant: str, idle_s: float, most: int = MAX_EXPIRED_AT_ONCE
    ) -> tuple[list[SessionName], bool]:
        """Delete sessions that nobody wrote to, opened or used for `idle_s`, the oldest first.

        At most `most` are looked at. Returns those that are gone, and whether there may be more.
        """
        most = min(max(most, 1), MAX_EXPIRED_AT_ONCE)
        old = await self._store.keeper.oldest(tenant, idle_s, most)
        gone: list[SessionName] = []
        for session in old:
            try:
                if await self._delete(session, idle_s) is Deleted.YES:
                    gone.append(session)
            except SessionBusy:
                await self._store.keeper.postpone(session)
        return gone, len(old) == most

    async def _delete(self, session: SessionName, idle_s: float | None) -> Deleted:
        what = await self._store.keeper.delete(session, idle_s)
        if what is Deleted.YES:
            self._on_deleted(session)
            log.info("session_deleted", session=session.session, expired=idle_s is not None)
        return what

    # -- export -------------------------------------------------------------------------------

    async def export(self, session: SessionName) -> AsyncIterator[bytes]:
        """The session's file, piece by piece, as of the tail it has now.

        Raises (while iterating):
            UnknownSession, StoreUnavailable.
            Overloaded: others are exported or imported now.
            SessionBusy: it was compacted while it was read; from the start again it will do.
        """
        with self._transfer():
            writer = ExportWriter()
            head, state, entries = await self._begin_export(session)
            yield writer.head(head)
            if state is not None:
                for piece in writer.state(await encoded(state)):
                    yield piece
            while entries:
                first, last = entries[0].cursor, entries[-1].cursor
                ops = [one.op for one in entries if one.cursor.offset <= head.tail]
                yield writer.entries(first.offset, ops)
                if last.offset >= head.tail:
                    break
                page = await self._store.read(session, last, MAX_READ_ENTRIES, judged=True)
                entries = page.entries
                follows = bool(entries) and entries[0].cursor.offset == last.offset + 1
                if page.status is not PageStatus.OK or not follows:
                    raise SessionBusy(
                        f"The session {session.session} changed while it was exported.",
                        hint="Export it again.",
                    )
            yield writer.end()

    async def _begin_export(
        self, session: SessionName
    ) -> tuple[ExportHead, SessionState | None, list[StoredEntry]]:
        """The head, the state that the store has, and the first entries that it has one by one."""
        for _ in range(_TRIES):
            page = await self._store.read(session, Cursor(), MAX_READ_ENTRIES)
            folded, entries, tail = page.snapshot_offset, page.entries, page.tail
            state = await self._store.load_snapshot(session) if folded else None
            summary = await self._store.keeper.summary(session)
            if summary is None:
                raise UnknownSession(f"The session {session.session} is gone.")
            if (state.cursor.offset if state is not None else 0) != folded:
                continue  # compacted between the two looks
            first = entries[0].cursor.offset if entries else tail.offset + 1
            if first > folded + 1:
                await self._reader.state(session)  # entries are missing: it mends that
                continue
            head = ExportHead(
                session=session.session,
                generation=tail.generation,
                folded=folded,
                tail=tail.offset,
                title=summary.title,
                turns=summary.turns,
                at_ms=self._now_ms(),
            )
            return head, state, entries
        raise SessionBusy(
            f"The session {session.session} changes faster than it is read.",
            hint="Export it again.",
        )

    # -- import -------------------------------------------------------------------------------

    async def import_(
        self, session: SessionName, pieces: AsyncIterator[bytes]
    ) -> tuple[Cursor, int]:
        """Make `session` of the file in `pieces`; returns its tail and how many turns it has.

        Nothing is written before the whole file was found right. Turns that ran when it was
        exported end here, as failed; those that waited are withdrawn.

        Raises:
            BadExport: the file is none, or not whole.
            SessionNotEmpty, SessionBusy, Overloaded, StoreUnavailable.
        """
        with self._transfer():
            reader = ExportReader()
            async for piece in pieces:
                reader.feed(piece)
            found = await asyncio.to_thread(reader.finish)
            latest = await self._store.keeper.latest_generation(session)
            generation = max(latest, found.head.generation) + 1
            made = await asyncio.to_thread(_import_of, found, generation, self._now_ms())
            tail = await self._store.keeper.make(session, made, os.urandom(8).hex())
            log.info("session_imported", session=session.session, entries=len(made.ops))
            return tail, len(made.session.turns)

    @contextmanager
    def _transfer(self) -> Iterator[None]:
        if self._transfers >= self._max_transfers:
            raise Overloaded(
                f"{self._transfers} sessions are exported or imported here already.",
                hint="Try again in a moment.",
                retry_after_s=1.0,
            )
        self._transfers += 1
        try:
            yield
        finally:
            self._transfers -= 1


def _import_of(found: Export, generation: int, now_ms: int) -> SessionImport:
    session = found.session
    ends: list[Op] = [
        TurnWithdrawn(id=f"{one.turn}.imported", at_ms=now_ms, turn=one.turn)
        for one in session.waiting
    ]
    ends += [
        TurnEnded(
            id=f"{turn.turn}.imported",
            at_ms=now_ms,
            turn=turn.turn,
            epoch=turn.epoch,
            reason="error",
            error_code="turn_failed",
            error_message="The session was exported while this turn ran.",
        )
        for turn in session.turns
        if not turn.ended
    ]
    state = b""
    if found.state is not None:
        at = Cursor(generation, found.head.folded)
        folded = msgspec.structs.replace(found.state, cursor=at)
        state = f"{generation} {at.offset}\n".encode() + encode_state(folded)
    return SessionImport(
        generation=generation,
        first=found.first,
        ops=[*found.entries, *map(encode_op, ends)],
        folded=found.head.folded,
        state=state,
        session=session,
        title=found.head.title,
    )


@asynccontextmanager
async def expiring(
    keeping: SessionKeeping,
    tenants: Callable[[], Iterable[str]],
    idle_s: float,
    *,
    every_s: float = EXPIRE_INTERVAL_S,
) -> AsyncIterator[None]:
    """While inside, sessions of these tenants that were idle for `idle_s` are deleted, some of each
    every `every_s`."""

    async def sweep() -> None:
        while True:
            await asyncio.sleep(every_s)
            for tenant in tenants():
                try:
                    await keeping.expire(tenant, idle_s)
                except SegueError as error:
                    log.warning("expiry_failed", tenant=tenant, error=str(error))

    async with in_background(sweep(), "session expiry"):
        yield
