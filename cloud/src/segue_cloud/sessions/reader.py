"""Reading a session: its folded state, and pages of its log, with what is folded kept at hand."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from segue_cloud.sessions.port import Reading, StoredEntry
from segue_contract.ids import SessionName
from segue_contract.limits import (
    MAX_GRPC_MESSAGE_BYTES,
    MAX_READ_ENTRIES,
    SESSION_CACHE,
)
from segue_contract.sync.ops import Op
from segue_contract.sync.replica import Applied, Replica
from segue_contract.sync.state import Cursor, SessionState, TurnState

_PAGE_BYTES = MAX_GRPC_MESSAGE_BYTES // 2  # leaves room for the message around the entries


@dataclass(frozen=True)
class Page:
    """What a reader gets: perhaps a snapshot to start over from, then entries that follow on."""

    tail: Cursor
    entries: list[StoredEntry]
    snapshot: SessionState | None = None

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


class LogReader:
    """Folds sessions on demand; keeps the latest `max_sessions` of them."""

    def __init__(self, store: Reading, *, max_sessions: int = SESSION_CACHE) -> None:
        self._store = store
        self._max_sessions = max_sessions
        self._folded: OrderedDict[SessionName, _Folded] = OrderedDict()

    async def state(self, session: SessionName) -> SessionState:
        """The session folded up to the tail it has now; the caller's own, to keep.

        Raises:
            UnknownSession, StoreUnavailable.
        """
        folded = self._get(session)
        async with folded.lock:
            try:
                await self._refresh(session, folded)
            except BaseException:
                self._folded.pop(session, None)  # maybe folded half: start over
                raise
            return _copy(folded.replica.state)

    async def read(self, session: SessionName, after: Cursor, max_entries: int) -> Page:
        """Entries that follow `after`, or a snapshot where the log cannot go on from there.

        That is: compacted past it, of another generation, or ahead of the log, which then lost
        entries it had acknowledged and goes on under its next generation.

        Raises:
            UnknownSession, StoreUnavailable.
        """
        wanted = min(max(max_entries, 1), MAX_READ_ENTRIES)
        tail, entries = await self._store.read(session, after.offset, wanted)
        follows = not entries or entries[0].cursor.offset == after.offset + 1
        if after.offset == 0:
            follows = follows and (bool(entries) or tail.offset == 0)
        elif after.generation != tail.generation:
            follows = False
        elif after.offset > tail.offset:
            await self._store.report_loss(session, after)
            follows = False
        elif not entries and after.offset < tail.offset:
            follows = False
        if follows:
            return Page(tail, _within(entries, _PAGE_BYTES))
        state = await self.state(session)
        return Page(state.cursor, [], state)

    def offer(self, session: SessionName, entries: Sequence[StoredEntry]) -> None:
        """Fold entries that were just appended here, where they follow directly."""
        folded = self._folded.get(session)
        if folded is None or folded.lock.locked():
            return
        for entry in entries:
            if folded.replica.apply_op(*_parts(entry)) is not Applied.APPLIED:
                return

    # -- inside -------------------------------------------------------------------------------

    def _get(self, session: SessionName) -> _Folded:
        folded = self._folded.get(session)
        if folded is None:
            folded = self._folded[session] = _Folded()
            while len(self._folded) > self._max_sessions:
                self._folded.popitem(last=False)
        self._folded.move_to_end(session)
        return folded

    async def _refresh(self, session: SessionName, folded: _Folded) -> None:
        replica = folded.replica
        while True:
            known = replica.cursor
            tail, entries = await self._store.read(session, known.offset, MAX_READ_ENTRIES)
            if known.offset and (tail.generation != known.generation or tail.offset < known.offset):
                # What is folded may hold entries that the log lost: fold it again from the start.
                replica.load(SessionState())
                continue
            if entries and entries[0].cursor.offset > known.offset + 1:
                snapshot = await self._store.load_snapshot(session)
                assert snapshot is not None, "entries were dropped and there is no snapshot"
                replica.load(snapshot)
                replica.adopt_generation(entries[0].cursor.generation)
            for entry in entries:
                if entry.cursor.generation > replica.cursor.generation:
                    replica.adopt_generation(entry.cursor.generation)
                replica.apply_op(*_parts(entry))
            if not entries or replica.cursor.offset >= tail.offset:
                if not entries and replica.cursor.offset < tail.offset:
                    # All entries up to the tail were folded away.
                    snapshot = await self._store.load_snapshot(session)
                    if snapshot is not None and snapshot.cursor.offset > replica.cursor.offset:
                        replica.load(snapshot)
                        continue
                replica.adopt_generation(tail.generation)
                return


def _parts(entry: StoredEntry) -> tuple[int, int, Op | bytes]:
    return entry.cursor.generation, entry.cursor.offset, entry.value or entry.op


def _within(entries: list[StoredEntry], max_bytes: int) -> list[StoredEntry]:
    """The first entries that fit, at least one."""
    size = 0
    for count, entry in enumerate(entries):
        size += len(entry.op)
        if size > max_bytes and count:
            return entries[:count]
    return entries


def _copy(state: SessionState) -> SessionState:
    """A copy that later folding does not change. Ended turns change no more (but for feedback)."""
    turns = [turn if turn.ended else _copy_turn(turn) for turn in state.turns]
    return msgspec.structs.replace(
        state,
        turns=turns,
        values=dict(state.values),
        docs={name: list(updates) for name, updates in state.docs.items()},
        claims=dict(state.claims),
        results=dict(state.results),
    )


def _copy_turn(turn: TurnState) -> TurnState:
    return msgspec.structs.replace(turn, tokens=list(turn.tokens), pieces=list(turn.pieces))
