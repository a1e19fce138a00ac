"""What the devices of one turn read: one list of events, any number of readers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from segue_contract.errors import SegueError
from segue_contract.v1 import agent_pb2 as pb


class TurnFeed:
    """Append-only while the turn runs; a reader keeps only its place in the list.

    The list is bounded by the turn itself (MAX_NEW_TOKENS frames and their notices), so that a
    slow or lost reader costs nothing and a new one can start from any token.
    """

    def __init__(self) -> None:
        self._events: list[pb.TurnEvent] = []
        self._changed = asyncio.Event()
        self._closed = False
        self._error: SegueError | None = None

    def publish(self, event: pb.TurnEvent) -> None:
        assert not self._closed, "an event after the end"
        self._events.append(event)
        self._wake()

    def close(self, error: SegueError | None = None) -> None:
        """No event follows; with `error` the readers' calls fail with it. Idempotent."""
        if not self._closed:
            self._closed = True
            self._error = error
            self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def read(self, from_index: int = 0) -> AsyncIterator[pb.TurnEvent]:
        """All events from the first on, but for tokens before `from_index`, until the end.

        Raises:
            SegueError: the turn could not be served.
        """
        position = 0
        while True:
            while position < len(self._events):
                event = trim(self._events[position], from_index)
                position += 1
                if event is not None:
                    yield event
            if self._closed:
                if self._error is not None:
                    raise self._error
                return
            await self._changed.wait()


def trim(event: pb.TurnEvent, from_index: int) -> pb.TurnEvent | None:
    """`event` without tokens before `from_index`; None where nothing is left of it."""
    kind = event.WhichOneof("kind")
    if kind == "durable" and event.durable.next_index <= from_index:
        return None
    if kind != "frame" or event.frame.index >= from_index:
        return event
    skip = from_index - event.frame.index
    if skip >= len(event.frame.tokens):
        return None
    rest = pb.TokenFrame()
    rest.CopyFrom(event.frame)
    rest.index = from_index
    del rest.tokens[:skip]
    del rest.pieces[:skip]
    return pb.TurnEvent(frame=rest)
