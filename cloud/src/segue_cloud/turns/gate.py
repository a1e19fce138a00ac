"""Who waits for a session's turn in this instance: first come, first served, bounded."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from segue_contract.errors import Overloaded
from segue_contract.limits import MAX_TURNS_WAITING_PER_SESSION

SessionKey = tuple[str, str]


class SessionGate:
    """`pass_through` lets one caller at a time try for a session; `released` tells it to retry."""

    def __init__(self) -> None:
        self._locks: dict[SessionKey, asyncio.Lock] = {}
        self._waiting: defaultdict[SessionKey, int] = defaultdict(int)
        self._released: dict[SessionKey, asyncio.Event] = {}

    def waiting(self, key: SessionKey) -> int:
        return self._waiting.get(key, 0)

    @asynccontextmanager
    async def pass_through(self, key: SessionKey) -> AsyncIterator[asyncio.Event]:
        """Yields, in order of arrival, an event that is set when a turn of the session ends here.

        Raises:
            Overloaded: too many wait already.
        """
        if self.waiting(key) > MAX_TURNS_WAITING_PER_SESSION:
            raise Overloaded(
                f"{MAX_TURNS_WAITING_PER_SESSION} turns already wait for this session.",
                hint="Wait for the running reply, or stop it.",
                retry_after_s=1.0,
            )
        lock = self._locks.setdefault(key, asyncio.Lock())
        self._waiting[key] += 1
        try:
            async with lock:
                yield self._released.setdefault(key, asyncio.Event())
        finally:
            self._waiting[key] -= 1
            if not self._waiting[key]:
                self._waiting.pop(key, None)
                self._locks.pop(key, None)
                self._released.pop(key, None)

    def release(self, key: SessionKey) -> None:
        """A turn of the session ended in this instance."""
        event = self._released.get(key)
        if event is not None:
            event.set()
