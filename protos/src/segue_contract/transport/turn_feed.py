"""A turn's feed for readers that wait (the feed itself is `segue_contract.turn.feed`)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from segue_contract.errors import SegueError
from segue_contract.turn.events import TurnEvent
from segue_contract.turn.feed import Feed


class TurnFeed:
    """Written by whoever serves the turn, read by RPC handlers on the same event loop."""

    def __init__(self) -> None:
        self.events = Feed()
        self._changed = asyncio.Event()

    def publish(self, event: TurnEvent) -> None:
        self.events.publish(event)
        self._wake()

    def close(self, error: SegueError | None = None) -> None:
        """No event follows; with `error` the readers' calls fail with it. Idempotent."""
        self.events.close(error)
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def read(self, from_index: int = 0) -> AsyncIterator[TurnEvent]:
        """All events from the first on, but for tokens before `from_index`, until the feed is
        closed. An iteration that ends without `Ended` says that the turn goes on elsewhere.

        Raises:
            SegueError: the turn could not be served.
        """
        reader = self.events.reader(from_index)
        while True:
            while (event := reader.next()) is not None:
                yield event
            if self.events.closed:
                if self.events.error is not None:
                    raise self.events.error
                return
            await self._changed.wait()
