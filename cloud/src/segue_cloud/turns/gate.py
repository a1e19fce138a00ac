"""Who waits for a session's turn in this instance: first come, first served, bounded."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from segue_contract.errors import Overloaded
from segue_contract.ids import SessionName
from segue_contract.limits import MAX_TURNS_WAITING_PER_SESSION


class SessionGate:
    """`pass_through` lets one caller at a time try for a session; `release` tells it to retry."""

    def __init__(self) -> None:
        self._locks: dict[SessionName, asyncio.Lock] = {}
        self._waiting: defaultdict[SessionName, int] = defaultdict(int)
        self._released: dict[SessionName, asyncio.Event] = {}

    def waiting(self, session: SessionName) -> int:
        return self._waiting.get(session, 0)

    @asynccontextmanager
    async def pass_through(self, session: SessionName) -> AsyncIterator[asyncio.Event]:
        """Yields, in order of arrival, an event that is set when a turn of the session ends here.

        Raises:
            Overloaded: too many wait already.
        """
        if self.waiting(session) > MAX_TURNS_WAITING_PER_SESSION:
            raise Overloaded(
                f"{MAX_TURNS_WAITING_PER_SESSION} turns already wait for this session.",
                hint="Wait for the running reply, or stop it.",
                retry_after_s=1.0,
            )
        lock = self._locks.setdefault(session, asyncio.Lock())
        self._waiting[session] += 1
        try:
            async with lock:
                yield self._released.setdefault(session, asyncio.Event())
        finally:
            self._waiting[session] -= 1
            if not self._waiting[session]:
                self._waiting.pop(session, None)
                self._locks.pop(session, None)
                self._released.pop(session, None)

    def release(self, session: SessionName) -> None:
        """A turn of the session ended in this instance."""
        event = self._released.get(session)
        if event is not None:
            event.set()
