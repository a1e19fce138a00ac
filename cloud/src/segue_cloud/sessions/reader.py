"""Reading a session: its folded state, and pages of its log, with what is folded kept at hand."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import msgspec
import structlog

from segue_cloud.sessions.port import PageStatus, RawPage, Reading, StoredEntry
from segue_cloud.sessions.slices import in_slices
from segue_contract.errors import CursorAhead, StoreUnavailable
from segue_contract.ids import SessionName
from segue_contract.limits import (
    MAX_READ_ENTRIES,
    MEND_ATTEMPTS,
    SESSION_CACHE,
    SESSION_CACHE_BYTES,
    STATE_SLICE_BYTES,
)
from segue_contract.sync.ops import (
    Frame,
    Op,
    ToolCall,
    TurnEnded,
    TurnStarted,
    Usage,
    decode_op,
)
from segue_contract.sync.replica import Applied, Replica
from segue_contract.sync.state import Cursor, SessionState, TurnState

log = structlog.get_logger("segue.sessions")

_TURNS_FREED = 64  # at a time: of 200 tokens each, half a millisecond

_LATER = (TurnStarted, Frame, ToolCall, TurnEnded)  # what a turn has after its message


@dataclass(frozen=True)
class Page:
    """What a reader gets: perhaps a snapshot to start over from, then entries that follow on.

    `lost_from`: entries that the reader knew, from that offset on, are not in the log; 0: none.
    """

    tail: Cursor
    entries: list[StoredEntry]
    snapshot: SessionState | None = None
    lost_from: int = 0
    digest: bytes = b""  # of the log up to `tail`

    @property
    def end(self) -> Cursor | None:
        """Where the reader stands after it; None where it stands where it stood."""
        if self.entries:
            return self.entries[-1].cursor
        return self.snapshot.cursor if self.snapshot is not None else None


@dataclass
class _Folded:
    replica: Replica = field(default_factory=Replica)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    written: int = 0  # bytes of the ops up to the replica's cursor
    digest: bytes = b""  # at the tail, as the store had it last
    users: int = 0  # who fold or read it now, or wait to


class LogReader:
    """Folds sessions on demand; keeps the latest ones, by number and by bytes of their ops."""

    def __init__(
        self,
        store: Reading,
        *,
        max_sessions: int = SESSION_CACHE,
        max_bytes: int = SESSION_CACHE_BYTES,
    ) -> None:
        self._store = store
        self._max_sessions = max_sessions
        self._max_bytes = max_bytes
        self._folded: OrderedDict[SessionName, _Folded] = OrderedDict()
        self._freeing: set[asyncio.Task[None]] = set()

    async def state(self, session: SessionName) -> SessionState:
        """The session folded up to the tail it has now; the caller's own, to keep.

        Raises:
            UnknownSession, StoreUnavailable.
        """
        return (await self.folded(session))[0]

    async def folded(self, session: SessionName) -> tuple[SessionState, int]:
        """As `state`, and how many bytes of ops it is made of."""
        state, written, _ = await self._fold(session)
        return state, written

    async def _fold(self, session: SessionName) -> tuple[SessionState, int, bytes]:
        """As `folded`, and the digest there."""
        folded = self._get(session)
        folded.users += 1
        try:
            async with folded.lock:
                try:
                    await self._refresh(session, folded)
                except BaseException:
                    self._folded.pop(session, None)  # maybe folded half: start over
                    raise
                self._evict(session)
                return _copy(folded.replica.state), folded.written, folded.digest
        finally:
            folded.users -= 1

    async def read(self, session: SessionName, after: Cursor, max_entries: int) -> Page:
        """Entries that follow `after`, or a snapshot where the log cannot go on from there: it was
        compacted past it, or entries that `after` knows of were lost.

        Raises:
            UnknownSession, StoreUnavailable.
            CursorAhead: nobody was ever told of that place. The session stays as it is.
        """
        wanted = min(max(max_entries, 1), MAX_READ_ENTRIES)
        page = await self._store.read(session, after, wanted, judged=True)
        tail, entries = page.tail, page.entries
        if page.status is PageStatus.AHEAD:
            raise CursorAhead(
                f"The log of {session.session} ends at offset {tail.offset}; there is no "
                f"{after.offset}.",
                hint="Read from an offset that the log has.",
                generation=tail.generation,
                offset=tail.offset,
            )
        follows = page.status is PageStatus.OK
        if after.offset < tail.offset:
            follows = follows and bool(entries) and entries[0].cursor.offset == after.offset + 1
        if follows:
            return Page(tail, entries, digest=page.digest)
        return replace(await self.whole(session), lost_from=page.lost_from)

    async def whole(self, session: SessionName) -> Page:
        """The session up to its tail, folded, for who knows nothing of it.

        Raises:
            UnknownSession, StoreUnavailable.
        """
        state, _, digest = await self._fold(session)
        return Page(state.cursor, [], state, digest=digest)

    def offer(self, session: SessionName, entries: Sequence[StoredEntry]) -> None:
        """Fold entries that were just appended here, where they follow directly."""
        folded = self._folded.get(session)
        if folded is None or folded.lock.locked():
            return
        for entry in entries:
            if folded.replica.apply_op(*_parts(entry)) is not Applied.APPLIED:
                return
            folded.written += len(entry.op)

    def forget(self, session: SessionName) -> None:
        """The session is gone."""
        self._free(self._folded.pop(session, None))

    # -- inside -------------------------------------------------------------------------------

    def _get(self, session: SessionName) -> _Folded:
        folded = self._folded.get(session)
        if folded is None:
            folded = self._folded[session] = _Folded()
        self._folded.move_to_end(session)
        return folded

    def _evict(self, but: SessionName) -> None:
        size = sum(folded.written for folded in self._folded.values())
        while len(self._folded) > 1 and (
            len(self._folded) > self._max_sessions or size > self._max_bytes
        ):
            oldest = next(iter(self._folded))
            if oldest == but:
                break
            evicted = self._folded.pop(oldest)
            size -= evicted.written
            self._free(evicted)

    def _free(self, folded: _Folded | None) -> None:
        """A state that is in the way no more goes a piece at a time; one in use with its users."""
        if folded is None or folded.users or folded.written <= STATE_SLICE_BYTES:
            return
        freeing = in_slices(folded.replica.free_in_slices(_TURNS_FREED))
        task = asyncio.create_task(freeing, name="free a folded session")
        self._freeing.add(task)
        task.add_done_callback(self._freeing.discard)

    async def _refresh(self, session: SessionName, folded: _Folded) -> None:
        replica = folded.replica
        mended = 0
        while True:
            known = replica.cursor
            page = await self._store.read(session, known, MAX_READ_ENTRIES, judged=True)
            tail, entries = page.tail, page.entries
            if page.status is not PageStatus.OK:
                # What is folded holds entries that the log lost: fold it again from the start.
                replica.load(SessionState())
                continue
            folded.written, folded.digest = page.written, page.digest
            if known.offset >= tail.offset:
                replica.adopt_generation(tail.generation)
                if page.bare:
                    await self._store.restore(session, replica.state)
                return
            if not entries or entries[0].cursor.offset > known.offset + 1:
                snapshot = await self._store.load_snapshot(session)
                if snapshot is not None and snapshot.cursor.offset > known.offset:
                    replica.load(snapshot)
                    replica.adopt_generation(tail.generation)
                    continue
                if mended >= MEND_ATTEMPTS:
                    raise StoreUnavailable(
                        f"The store loses entries of {session.session} as they are read.",
                        hint="Give it memory, or set maxmemory-policy noeviction.",
                    )
                mended += 1
                await self._mend(session, replica, page)
                replica.load(SessionState())
                continue
            for entry in entries:
                replica.adopt_generation(entry.cursor.generation)
                replica.apply_op(*_parts(entry))

    async def _mend(self, session: SessionName, replica: Replica, page: RawPage) -> None:
        """Entries are gone from the store. What is left of them is folded, and goes on.

        Of a turn whose beginning is gone nothing is left: nobody could tell what was asked. One
        that has its end and not all of its tokens is not over.
        """
        entries = page.entries
        while entries:
            for entry in entries:
                at, op = entry.cursor, entry.value or decode_op(entry.op)
                replica.load_cursor(Cursor(at.generation, at.offset - 1))
                if isinstance(op, _LATER) and replica.turn(op.turn) is None:
                    replica.load_cursor(at)
                else:
                    replica.apply_op(at.generation, at.offset, op)
            entries = (await self._store.read(session, replica.cursor, MAX_READ_ENTRIES)).entries
        replica.load_cursor(page.tail)
        turns = [_without_false_end(turn) for turn in replica.state.turns]
        left = msgspec.structs.replace(replica.state, turns=turns)
        log.error("entries_missing", session=session.session, tail=page.tail.offset)
        await self._store.mend(session, left)


def _without_false_end(turn: TurnState) -> TurnState:
    if not turn.ended or turn.usage.completion_tokens <= len(turn.tokens):
        return turn
    return msgspec.structs.replace(
        turn, reason="", usage=Usage(), plan=b"", error_code="", error_message=""
    )


def _parts(entry: StoredEntry) -> tuple[int, int, Op | bytes]:
    return entry.cursor.generation, entry.cursor.offset, entry.value or entry.op


def _copy(state: SessionState) -> SessionState:
    """A copy that later folding does not change. Ended turns change no more (but for feedback)."""
    turns = [turn if turn.ended else _copy_turn(turn) for turn in state.turns]
    return msgspec.structs.replace(
        state,
        turns=turns,
        waiting=list(state.waiting),
        values=dict(state.values),
        docs={name: list(updates) for name, updates in state.docs.items()},
        claims=dict(state.claims),
        results=dict(state.results),
    )


def _copy_turn(turn: TurnState) -> TurnState:
    return msgspec.structs.replace(turn, tokens=list(turn.tokens), pieces=list(turn.pieces))
