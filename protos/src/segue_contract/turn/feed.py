"""The events of one turn, kept while readers may want them.

A turn is bounded (`MAX_NEW_TOKENS`), so its events are too: all are kept, a reader holds a place,
and a slow reader delays nobody.
"""

from __future__ import annotations

from segue_contract.errors import SegueError
from segue_contract.turn.events import Durable, Ended, Frame, Rewound, TurnEvent


class Feed:
    """Append-only. After `Ended`, or after `close`, nothing follows."""

    def __init__(self) -> None:
        self._events: list[TurnEvent] = []
        self.closed = False
        self.error: SegueError | None = None

    def __len__(self) -> int:
        return len(self._events)

    @property
    def ended(self) -> Ended | None:
        """The turn's end, once it is there."""
        last = self._events[-1] if self._events else None
        return last if isinstance(last, Ended) else None

    def publish(self, event: TurnEvent) -> None:
        assert not self.closed, "an event after the end"
        assert self.ended is None, "an event after the end"
        self._events.append(event)

    def close(self, error: SegueError | None = None) -> None:
        """No event follows. Without an end before it the turn goes on elsewhere, or `error` says
        why it could not be served. Idempotent: the first call counts."""
        if not self.closed:
            self.closed, self.error = True, error

    def reader(self, from_index: int = 0) -> FeedReader:
        return FeedReader(self, from_index)

    def at(self, place: int) -> TurnEvent:
        return self._events[place]


class FeedReader:
    """One reader's place: everything from the first event on, but for tokens before its index."""

    def __init__(self, feed: Feed, from_index: int) -> None:
        self._feed = feed
        self._from_index = from_index
        self._place = 0

    def next(self) -> TurnEvent | None:
        """The next event that says something new; None where there is none yet."""
        while self._place < len(self._feed):
            event = self._feed.at(self._place)
            self._place += 1
            if isinstance(event, Rewound):  # the reader's own tokens may be among them
                self._from_index = min(self._from_index, event.index)
            trimmed = trim(event, self._from_index)
            if trimmed is not None:
                return trimmed
        return None


def trim(event: TurnEvent, from_index: int) -> TurnEvent | None:
    """`event` without tokens before `from_index`; None where nothing is left of it."""
    if isinstance(event, Durable) and event.next_index <= from_index:
        return None
    if isinstance(event, Frame):
        return event.beyond(from_index)
    return event
