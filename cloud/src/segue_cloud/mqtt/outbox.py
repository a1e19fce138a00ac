"""What still has to go to the broker: log messages in order, and heads. Pure.

Log messages are an optimisation: they are bounded, and dropped while the broker is away. A head
(the tail of a log) is what makes devices read what they missed, so it stays here until the broker
has confirmed it. It goes out once its session is quiet for a moment, and now and then while it is
not: a head with every append would double the traffic and tell devices nothing new.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from segue_cloud.sessions.port import StoredEntry
from segue_contract.ids import SessionName
from segue_contract.limits import (
    HEAD_DELAY_S,
    HEAD_MAX_DELAY_S,
    MAX_APPEND_OPS,
    MAX_MQTT_PAYLOAD_BYTES,
    MQTT_PUBLISH_QUEUE,
    MQTT_UNCONFIRMED_HEADS,
    SESSION_CACHE,
)
from segue_contract.sync.state import Cursor

_OVERHEAD_BYTES = 64  # of a message and of each op in it, generously


@dataclass(frozen=True)
class LogBatch:
    """Consecutive entries of one session."""

    session: SessionName
    first: Cursor
    ops: list[bytes]


@dataclass
class _Head:
    cursor: Cursor
    due_s: float | None  # None: on its way, or confirmed
    latest_s: float = 0.0  # further appends put it off until then, not longer
    confirmed: bool = False


class Outbox:
    def __init__(
        self,
        *,
        max_entries: int = MQTT_PUBLISH_QUEUE,
        max_heads: int = SESSION_CACHE,
        max_unconfirmed: int = MQTT_UNCONFIRMED_HEADS,
        head_delay_s: float = HEAD_DELAY_S,
        head_max_delay_s: float = HEAD_MAX_DELAY_S,
    ) -> None:
        self._max_entries = max_entries
        self._max_heads = max_heads
        self._max_unconfirmed = max_unconfirmed
        self._head_delay_s = head_delay_s
        self._head_max_delay_s = head_max_delay_s
        self._pending: OrderedDict[SessionName, list[StoredEntry]] = OrderedDict()
        self._entries = 0
        self._heads: OrderedDict[SessionName, _Head] = OrderedDict()
        # of those heads: which wait for their time, and which the broker has, oldest first
        self._waiting: dict[SessionName, None] = {}
        self._known: OrderedDict[SessionName, None] = OrderedDict()
        self._clears: list[SessionName] = []
        self._soonest_s = math.inf  # no head is due before it
        self.dropped = 0
        self.max_payload_bytes = MAX_MQTT_PAYLOAD_BYTES  # less where the broker takes less

    @property
    def empty(self) -> bool:
        """Nothing waits, and every head is confirmed."""
        return not self._pending and len(self._known) == len(self._heads)

    def add(
        self, session: SessionName, entries: Sequence[StoredEntry], now_s: float, *, online: bool
    ) -> None:
        """Entries that were appended. Offline, or beyond the bound, only their head counts."""
        self._put_head(session, entries[-1].cursor, now_s, now_s + self._head_delay_s)
        if not online or self._entries + len(entries) > self._max_entries:
            self.dropped += len(entries)
            return
        self._pending.setdefault(session, []).extend(entries)
        self._entries += len(entries)

    def add_head(self, session: SessionName, cursor: Cursor, now_s: float) -> None:
        """The log's tail is `cursor`: say so at once."""
        self._put_head(session, cursor, now_s, now_s)

    def _put_head(self, session: SessionName, cursor: Cursor, now_s: float, due_s: float) -> None:
        head = self._heads.get(session)
        if head is None:
            head = self._heads[session] = _Head(cursor, None)
        elif cursor.generation == head.cursor.generation and cursor < head.cursor:
            return
        if head.due_s is None:
            head.latest_s = now_s + self._head_max_delay_s
        head.due_s = min(due_s, head.latest_s)
        head.cursor, head.confirmed = cursor, False
        self._waiting[session] = None
        self._known.pop(session, None)
        self._heads.move_to_end(session)
        self._soonest_s = min(self._soonest_s, head.due_s)
        self._forget()

    def next_batch(self) -> LogBatch | None:
        """The oldest waiting session's entries, as many as fit one message.

        An entry too large for any message is left out: its head tells devices to read it.
        """
        while self._pending:
            session, waiting = next(iter(self._pending.items()))
            size, count = _OVERHEAD_BYTES, 0
            for entry in waiting[:MAX_APPEND_OPS]:
                size += len(entry.op) + _OVERHEAD_BYTES
                follows = count == 0 or entry.cursor == _after(waiting[count - 1].cursor)
                if size > self.max_payload_bytes or not follows:
                    break
                count += 1
            taken, rest = waiting[: max(count, 1)], waiting[max(count, 1) :]
            self._entries -= len(taken)
            del self._pending[session]
            if rest:  # behind the others: one busy session holds up nobody
                self._pending[session] = rest
            if count:
                return LogBatch(session, taken[0].cursor, [entry.op for entry in taken])
            self.dropped += 1
        return None

    def due_heads(self, now_s: float) -> list[tuple[SessionName, Cursor]]:
        """Heads to send now; each needs `head_confirmed`, or `restart` where the link was lost."""
        if now_s < self._soonest_s:
            return []
        due = []
        self._soonest_s = math.inf
        for session in self._waiting:
            head = self._heads[session]
            assert head.due_s is not None
            if head.due_s <= now_s:
                head.due_s = None
                due.append((session, head.cursor))
            else:
                self._soonest_s = min(self._soonest_s, head.due_s)
        for session, _ in due:
            del self._waiting[session]
        return due

    def next_head_s(self) -> float | None:
        """No head is due before this; None where none waits."""
        return None if self._soonest_s == math.inf else self._soonest_s

    def head_confirmed(self, session: SessionName, cursor: Cursor) -> None:
        head = self._heads.get(session)
        # One that is due again is sent again: it was asked for since.
        if head is not None and head.cursor == cursor and head.due_s is None:
            head.confirmed = True
            self._known[session] = None
            self._forget()

    def clear_head(self, session: SessionName) -> None:
        """The session is idle: its head is to be taken from the broker."""
        self._drop_head(session)
        self._clears.append(session)

    def take_clears(self) -> list[SessionName]:
        """Sessions whose head is to be cleared now and that got no new one meanwhile."""
        taken, self._clears = self._clears, []
        return [session for session in taken if session not in self._heads]

    def restart(self, now_s: float) -> None:
        """The link is new: whatever was on its way is lost, and the broker may be empty."""
        for waiting in self._pending.values():
            self.dropped += len(waiting)
        self._pending.clear()
        self._entries = 0
        for head in self._heads.values():
            head.due_s = head.latest_s = now_s
            head.confirmed = False
        self._waiting = dict.fromkeys(self._heads)
        self._known.clear()
        self._soonest_s = now_s if self._heads else math.inf

    def hurry(self, now_s: float) -> None:
        """Everything is due now."""
        for session in self._waiting:
            self._heads[session].due_s = now_s
            self._soonest_s = min(self._soonest_s, now_s)

    def check_integrity(self) -> None:
        """Assert what must always hold."""
        assert self._entries == sum(map(len, self._pending.values())) <= self._max_entries
        assert all(self._pending.values()), "a session waits with nothing"
        assert set(self._waiting) == {s for s, h in self._heads.items() if h.due_s is not None}
        assert set(self._known) == {s for s, h in self._heads.items() if h.confirmed}
        for head in self._heads.values():
            assert not (head.confirmed and head.due_s is not None)
            assert head.due_s is None or self._soonest_s <= head.due_s, "a head is never sent"
        unconfirmed = len(self._heads) - len(self._known)
        assert unconfirmed <= self._max_unconfirmed
        assert len(self._heads) <= max(self._max_heads, unconfirmed)

    def _forget(self) -> None:
        """Heads that the broker has, those first that it has had for longest; of the others only
        what is beyond their bound: the sweep finds those sessions again, the store has their mark.
        """
        while len(self._heads) > self._max_heads and self._known:
            self._drop_head(next(iter(self._known)))
        while len(self._heads) - len(self._known) > self._max_unconfirmed:
            self._drop_head(next(s for s, head in self._heads.items() if not head.confirmed))

    def _drop_head(self, session: SessionName) -> None:
        self._heads.pop(session, None)
        self._waiting.pop(session, None)
        self._known.pop(session, None)


def _after(cursor: Cursor) -> Cursor:
    return Cursor(cursor.generation, cursor.offset + 1)
