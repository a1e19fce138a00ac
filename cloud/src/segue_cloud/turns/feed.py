"""The events of one turn, kept while it runs, for any number of readers.

A turn is bounded (`MAX_NEW_TOKENS`), so its events are too: the feed keeps them all, a reader
holds a position, and a slow reader delays nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from segue_contract.v1 import agent_pb2 as pb


class TurnFeed:
    """Written by the turn's owner, read by RPC handlers on the same event loop."""

    def __init__(self) -> None:
        self._events: list[pb.TurnEvent] = []
        self._closed = False
        self._changed = asyncio.Event()

    def publish(self, event: pb.TurnEvent) -> None:
        self._events.append(event)
        self._wake()

    def close(self) -> None:
        """No event follows; readers end after the last one."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def read(self, from_index: int = 0) -> AsyncIterator[pb.TurnEvent]:
        """All events from the first on; tokens before `from_index` are left out."""
        position = 0
        while True:
            while position < len(self._events):
                event = trim_frame(self._events[position], from_index)
                position += 1
                if event is not None:
                    yield event
            if self._closed:
                return
            await self._changed.wait()


def trim_frame(event: pb.TurnEvent, from_index: int) -> pb.TurnEvent | None:
    """`event` without its tokens before `from_index`; None where nothing is left of it."""
    if event.WhichOneof("kind") != "frame" or event.frame.index >= from_index:
        return event
    frame = event.frame
    skip = from_index - frame.index
    if skip >= len(frame.tokens):
        return None
    trimmed = pb.TurnEvent()
    trimmed.frame.CopyFrom(frame)
    del trimmed.frame.tokens[:skip]
    del trimmed.frame.pieces[:skip]
    trimmed.frame.index = from_index
    return trimmed
