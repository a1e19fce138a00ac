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
from segue_contract.limits import FOLLOWER_QUEUE_BYTES, FOLLOWER_QUEUE_ENTRIES, HUB_QUEUE_BYTES
from segue_contract.sync.state import Cursor

_NOTHING = Cursor(0, 0)


@dataclass
class _Follower:
    session: SessionName
    position: Cursor | None = None  # None until its snapshot is there
    queue: deque[StoredEntry] = field(default_factory=deque)
    queued_bytes: int = 0

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

    def __init__(
        self,
        queue_entries: int = FOLLOWER_QUEUE_ENTRIES,
        queue_bytes: int = FOLLOWER_QUEUE_BYTES,
        all_bytes: int = HUB_QUEUE_BYTES,
    ) -> None:
        self._queue_entries = queue_entries
        self._queue_bytes = queue_bytes
        self._room = self._all_bytes = all_bytes
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
        left = self._followers.pop(follower)
        self._room += left.queued_bytes
        session = left.session
        channel = self._channels[session]
        channel.followers.discard(follower)
        if not channel.followers:
            del self._channels[session]

    def offer(self, session: SessionName, entries: Sequence[StoredEntry]) -> Iterable[int]:
        """Entries that the log holds now, in order. Returns who has to be woken."""
        channel = self._channels.get(session)
        if channel is None or not entries:
            return ()
        last = entries[-1].cursor
        if channel.tail.generation != last.generation or channel.tail.offset < last.offset:
            channel.tail = last
        for number in channel.followers:
            follower = self._followers[number]
            for entry in entries:
                end = follower.end
                if (
                    end is not None
                    and entry.cursor == Cursor(end.generation, end.offset + 1)
                    and self._has_room(follower, entry)
                ):
                    follower.queue.append(entry)
                    follower.queued_bytes += len(entry.op)
                    self._room -= len(entry.op)
        return channel.followers

    def tail(self, session: SessionName) -> Cursor:
        """The furthest that is known of the session's log."""
        channel = self._channels.get(session)
        return channel.tail if channel is not None else _NOTHING

    def told(self, session: SessionName, tail: Cursor) -> Iterable[int]:
        """The log's tail, as the store told of it: what was appended here since is ahead of it.

        Returns who has to be woken.
        """
        channel = self._channels.get(session)
        if channel is None:
            return ()
        if tail.generation == channel.tail.generation and tail.offset <= channel.tail.offset:
            return ()
        channel.tail = tail
        return channel.followers

    def announce(self, session: SessionName, tail: Cursor, asked_at: Cursor) -> Iterable[int]:
        """The log's tail as the log itself says, asked when this side knew `asked_at`: it was
        looked up, or came with what a follower read.

        A tail that went back, or of another generation, is a loss: whoever stands elsewhere reads.
        Returns who has to be woken: all, as the store's news of a tail that is known wakes nobody.
        """
        channel = self._channels.get(session)
        if channel is None or tail == channel.tail:
            return ()
        newer = tail.generation == channel.tail.generation and tail.offset > channel.tail.offset
        if channel.tail != asked_at and not newer:
            return ()  # there was news meanwhile: the answer may be older than that
        channel.tail = tail
        return channel.followers

    def lost(self, session: SessionName) -> Iterable[int]:
        """There is no such log any more: whoever follows it has to look. Returns who."""
        channel = self._channels.get(session)
        if channel is None:
            return ()
        channel.tail = _NOTHING
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
        state.queued_bytes -= size
        self._room += size
        if taken:
            state.position = taken[-1].cursor
        return taken

    def behind(self, follower: int) -> Cursor | None:
        """The tail it has to read up to; None where it misses nothing beyond its queue."""
        state = self._followers[follower]
        tail = self._channels[state.session].tail
        at = state.position
        if state.queue or at == tail:
            return None
        return tail

    def move(self, follower: int, position: Cursor) -> None:
        """It has read up to `position`."""
        state = self._followers[follower]
        state.position = position
        kept = list(state.queue)
        while kept and kept[0].cursor.offset <= position.offset:
            kept.pop(0)
        if kept and kept[0].cursor != Cursor(position.generation, position.offset + 1):
            kept.clear()
        state.queue = deque(kept)
        size = sum(len(entry.op) for entry in kept)
        self._room += state.queued_bytes - size
        state.queued_bytes = size

    def _has_room(self, follower: _Follower, entry: StoredEntry) -> bool:
        size = len(entry.op)
        return (
            len(follower.queue) < self._queue_entries
            and follower.queued_bytes + size <= self._queue_bytes
            and size <= self._room
        )

    def check_integrity(self) -> None:
        """Assert what must always hold."""
        for number, follower in self._followers.items():
            channel = self._channels[follower.session]
            assert number in channel.followers
            assert len(follower.queue) <= self._queue_entries
            assert follower.queued_bytes == sum(len(entry.op) for entry in follower.queue)
            assert follower.queued_bytes <= self._queue_bytes
            at = follower.position
            for entry in follower.queue:
                assert at is not None
                assert entry.cursor == Cursor(at.generation, at.offset + 1), "a hole in a queue"
                at = entry.cursor
        queued = sum(follower.queued_bytes for follower in self._followers.values())
        assert self._room == self._all_bytes - queued >= 0
        for channel in self._channels.values():
            assert channel.followers, "a channel nobody follows"
            assert channel.followers <= self._followers.keys()
