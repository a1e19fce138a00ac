"""Turns served while the cloud was away: kept in order until the log has them. Bounded."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from segue_contract.errors import Overloaded, SegueError
from segue_contract.limits import OUTBOX_TURNS, PROBE_INTERVAL_S
from segue_edge.turns.asked import Asked

log = structlog.get_logger("segue.outbox")


@dataclass(frozen=True)
class OfflineTurn:
    """A whole turn as the device saw it.

    Attributes:
        prompt: its token ids as they were then.
        begun: it began in the log, and has no end there that this edge knows of.
    """

    asked: Asked
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    pieces: tuple[str, ...]
    reason: str
    plan: bytes
    begun: bool = False


Deliver = Callable[[OfflineTurn], Awaitable[None]]


class Outbox:
    """First in, first out; delivers when a cloud has come back, and what is left after a pause."""

    def __init__(self) -> None:
        self._turns: list[OfflineTurn] = []
        self._delivering = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._turns)

    def holds(self, session: str) -> bool:
        return any(turn.asked.session == session for turn in self._turns)

    def check_room(self) -> None:
        """Raises Overloaded where one more turn would not fit."""
        if len(self._turns) >= OUTBOX_TURNS:
            raise Overloaded(
                f"{OUTBOX_TURNS} turns wait for the cloud to come back.",
                hint="Bring the cloud back; this edge keeps no more of them.",
                retry_after_s=5.0,
            )

    def add(self, turn: OfflineTurn) -> None:
        self._turns.append(turn)

    def start(self, returned: Callable[[], Awaitable[None]], deliver: Deliver) -> None:
        self._task = asyncio.create_task(self._run(returned, deliver), name="outbox")

    async def _run(self, returned: Callable[[], Awaitable[None]], deliver: Deliver) -> None:
        while True:
            # A turn may come, or be refused for now, while the cloud is there and stays there.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PROBE_INTERVAL_S):
                    await returned()
            await self.flush(deliver)

    async def flush(self, deliver: Deliver) -> bool:
        """Deliver all; False where one could not be delivered for now. A turn the log refuses is
        dropped."""
        async with self._delivering:
            while self._turns:
                turn = self._turns[0]
                try:
                    await deliver(turn)
                except SegueError as error:
                    if error.retryable:
                        log.info("outbox_waits", turn=turn.asked.turn, error=str(error))
                        return False
                    log.warning("offline_turn_refused", turn=turn.asked.turn, error=str(error))
                except Exception as error:  # a fault of ours is no reason to lose what was said
                    log.error("outbox_failed", turn=turn.asked.turn, exc_info=error)
                    return False
                self._turns.pop(0)
        return True

    async def close(self) -> None:
        if self._turns:
            log.warning("offline_turns_lost", turns=len(self._turns))
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
