"""Who follows which session, and what each has yet to see. Pure.

A follower stands at a cursor. An entry that follows on directly waits in its bounded queue; any
other one is not kept, only remembered as the channel's tail: a follower that stands before it with
an empty queue is *behind* and has to read the log. So nothing is lost, whatever is dropped here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from segue_cloud.sessions.port import StoredEntry
from segue_contract.ids import SessionName
from segue_contract.limits import FOLLOWER_QUEUE_ENTRIES
from segue_contract.sync.state import Cursor

_NOTHING = Cursor(0, 0)


@dataclass
class _Follower:
    session: SessionName
    position: Cursor | None = None  # None until its snapshot is there
    queue: deque[StoredEntry] = field(default_factory=deque)

    @property
    def end(self) -> Cursor | None:
        """Where it stands once its queue is emptied."""
        return self.queue[-1].cursor if self.queue else self.position


@dataclass
class _Channel:
    tail: Cursor = _NOTHING
    followers: set[int] = field(default_factory=set)


class HubState:
    """Followers are known by numbers; methods return those that have something to do."""

    def __init__(self, queue_entries: int = FOLLOWER_QUEUE_ENTRIES) -> None:
        self._queue_entries = queue_entries
        self._channels: dict[SessionName, _Channel] = {}
        self._followers: dict[int, _Follower] = {}
        self._next = 1

    @property
    def followed(self) -> list[SessionName]:
        return list(self._channels)

    def join(self, session: SessionName) -> int:
        """A follower that stands nowhere yet: read, then `move`."""
        number = self._next
        self._next += 1
        self._followers[number] = _Follower(session)
        self._channels.setdefault(session, _Channel()).followers.add(number)
        return number

    def leave(self, follower: int) -> None:
        session = self._followers.pop(follower).session
        channel = self._channels[session]
        channel.followers.discard(follower)
        if not channel.followers:
            del self._channels[session]

    def offer(self, session: SessionName, entries: Sequence[StoredEntry]) -> Iterable[int]:
        """Entries that the log holds now, in order. Returns who has to be woken."""
        channel = self._channels.get(session)
        if channel is None or not entries:
            return ()
        channel.tail = max(channel.tail, entries[-1].cursor)
        for number in channel.followers:
            follower = self._followers[number]
            for entry in entries:
                end = follower.end
                if (
                    end is not None
                    and entry.cursor == Cursor(end.generation, end.offset + 1)
                    and len(follower.queue) < self._queue_entries
                ):
                    follower.queue.append(entry)
        return channel.followers

    def announce(self, session: SessionName, tail: Cursor) -> Iterable[int]:
        """The log's tail, seen elsewhere. Returns who has to be woken."""
        channel = self._channels.get(session)
        if channel is None or tail <= channel.tail:
            return ()
        channel.tail = tail
        return channel.followers

    def take(self, follower: int, max_bytes: int) -> list[StoredEntry]:
        """The next entries for it, about `max_bytes` of them; it stands behind them then."""
        state = self._followers[follower]
        taken: list[StoredEntry] = []
        size = 0
        while state.queue and (not taken or size + len(state.queue[0].op) <= max_bytes):
            entry = state.queue.popleft()
            size += len(entry.op)
            taken.append(entry)
        if taken:
            state.position = taken[-1].cursor
        return taken

    def behind(self, follower: int) -> Cursor | None:
        """The tail it has to read up to; None where it misses nothing beyond its queue."""
        state = self._followers[follower]
        tail = self._channels[state.session].tail
        if state.queue or (state.position is not None and tail <= state.position):
            return None
        return tail

    def move(self, follower: int, position: Cursor) -> None:
        """It has read up to `position`."""
        state = self._followers[follower]
        state.position = position
        while state.queue and state.queue[0].cursor <= position:
            state.queue.popleft()
        if state.queue and state.queue[0].cursor != Cursor(
            position.generation, position.offset + 1
        ):
            state.queue.clear()

    def check_integrity(self) -> None:
        """Assert what must always hold."""
        for number, follower in self._followers.items():
            channel = self._channels[follower.session]
            assert number in channel.followers
            assert len(follower.queue) <= self._queue_entries
            at = follower.position
            for entry in follower.queue:
                assert at is not None
                assert entry.cursor == Cursor(at.generation, at.offset + 1), "a hole in a queue"
                at = entry.cursor
            assert not follower.queue or follower.queue[-1].cursor <= channel.tail
        for channel in self._channels.values():
            assert channel.followers, "a channel nobody follows"
            assert channel.followers <= self._followers.keys()
