"""A follower's view of one log: entries in any order in, each entry once and in order out. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from segue._digests import Digests
from segue._inbox import RawEntry
from segue.events import Entry, Snapshot
from segue_contract.errors import InvalidArgument
from segue_contract.limits import FOLLOWER_QUEUE_BYTES, FOLLOWER_QUEUE_ENTRIES
from segue_contract.sync.ops import Unknown, decode_op
from segue_contract.sync.replica import Applied, Replica
from segue_contract.sync.state import Cursor, SessionState, decode_state, encode_state


class LogView:
    """Wraps a `Replica`, keeps early entries until the missing ones come, and knows the head.

    Begun at an `offset` above 0, it knows nothing of what was before: then only the entries count.
    `head` is the furthest cursor that anyone spoke of since the log itself was asked; `behind` says
    that something is missing, `contradicted` that two ops were told of one offset.
    """

    def __init__(self, generation: int, offset: int = 0) -> None:
        self._replica = Replica(SessionState(cursor=Cursor(generation, offset)))
        self._early: dict[int, RawEntry] = {}
        self._digests = Digests()
        self.head = Cursor(generation, offset)
        self.contradicted = False

    @property
    def cursor(self) -> Cursor:
        return self._replica.cursor

    @property
    def state(self) -> SessionState:
        """The folded state; it changes with every entry."""
        return self._replica.state

    @property
    def behind(self) -> bool:
        head, known = self.head, self.cursor
        if head.generation != known.generation and known.offset:
            return True
        return head.offset > known.offset

    def snapshot(self) -> Snapshot:
        """The state now, copied."""
        copy = decode_state(encode_state(self.state))
        return Snapshot(copy, self.cursor.offset, self.cursor.generation)

    def saw_head(self, cursor: Cursor) -> None:
        if cursor.generation != self.head.generation or cursor.offset > self.head.offset:
            self.head = cursor

    def read_to(self, tail: Cursor, *, follows: bool = True) -> None:
        """The log says that it ends at `tail`: what was said of entries beyond it was not so.

        `follows`: it goes on from what is known here. Otherwise some of that was lost, and the log
        may have grown to the same offset again.
        """
        self.head = tail
        if follows and self.cursor.offset == tail.offset:
            self._replica.adopt_generation(tail.generation)
        self._early = {
            offset: entry for offset, entry in self._early.items() if offset <= tail.offset
        }

    def load(self, state: SessionState) -> Snapshot | None:
        """Replace everything by the log's state; None where `state` is no news.

        Any other generation is news, not only a later one: clocks go back.
        """
        known = self.cursor
        if state.cursor.generation == known.generation and state.cursor.offset <= known.offset:
            return None
        self._replica.load(state)
        self._digests.clear()
        self.saw_head(state.cursor)
        self._early = {
            offset: entry
            for offset, entry in self._early.items()
            if entry.generation == state.cursor.generation and offset > state.cursor.offset
        }
        return self.snapshot()

    def follow_on(self, entry: RawEntry) -> None:
        """The log itself goes on from here with `entry`: nothing of what is known is lost."""
        if entry.offset == self.cursor.offset + 1:
            self._replica.adopt_generation(entry.generation)

    def forget(self) -> None:
        """Know nothing; the next state is news."""
        self._replica.load(SessionState())
        self._digests.clear()
        self._early.clear()

    def matches(self, tail: Cursor, digest: bytes) -> bool:
        """False: what is known here up to `tail` is not what the log has. b"": it does not say."""
        if not digest or tail.generation != self.cursor.generation:
            return True
        return self._digests.at(tail.offset) in (None, digest)

    def confirm(self, tail: Cursor, digest: bytes) -> bool:
        """As `matches`, for what the log said as it was read up to `tail`, where this stands."""
        if not self.matches(tail, digest):
            return False
        self.contradicted = False
        known = digest or not tail.offset  # that of an empty log is b""
        if known and self.cursor == tail and self._digests.at(tail.offset) is None:
            self._digests.start(tail.offset, digest)
        return True

    def offer(self, entries: Iterable[RawEntry]) -> Iterator[Entry]:
        """Entries that are next in line because of `entries`, in order.

        Each is applied when it is taken from the iterator: `state` is then exactly at it.
        """
        entries = tuple(entries)
        for entry in entries:
            self.saw_head(Cursor(entry.generation, entry.offset))
        for entry in entries:
            if self._is_next(entry):
                yield self._apply(entry)
                while (early := self._next_early()) is not None:
                    yield self._apply(early)
            elif self._may_wait(entry):
                # of others nothing is kept: `behind` stays true and Read brings it
                self._early[entry.offset] = entry
            elif entry.generation == self.cursor.generation:
                self.contradicted |= self._digests.contradict(entry.offset, entry.op)

    def _next_early(self) -> RawEntry | None:
        """The kept entry that is next. One of another generation may have been lost: it is dropped,
        and Read brings what the log has in its place."""
        early = self._early.pop(self.cursor.offset + 1, None)
        if early is None or early.generation != self.cursor.generation:
            return None
        return early

    def _is_next(self, entry: RawEntry) -> bool:
        known = self.cursor
        if not known.offset:  # who knows nothing yet belongs to no generation
            return entry.offset == 1
        return entry.generation == known.generation and entry.offset == known.offset + 1

    def _may_wait(self, entry: RawEntry) -> bool:
        """It is later than the next one, and what waits stays below FOLLOWER_QUEUE_BYTES."""
        known = self.cursor
        later = entry.generation == known.generation and entry.offset > known.offset
        small = len(entry.op) <= FOLLOWER_QUEUE_BYTES // FOLLOWER_QUEUE_ENTRIES
        return later and small and len(self._early) < FOLLOWER_QUEUE_ENTRIES

    def _apply(self, raw: RawEntry) -> Entry:
        try:
            op = decode_op(raw.op)
        except InvalidArgument:
            # it holds its place in the log, whatever it was meant to say
            op = Unknown(id=f"unreadable-{raw.offset}", original=raw.op)
        applied = self._replica.apply_op(raw.generation, raw.offset, op)
        assert applied is Applied.APPLIED, applied
        self._digests.add(raw.offset, raw.op)
        return Entry(raw.offset, op, raw.generation)
