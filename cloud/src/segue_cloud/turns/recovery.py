"""Turns whose owner died are found and finished, even if nobody asks for their session."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol

import structlog

from segue_cloud.sessions.port import SessionSummary
from segue_cloud.turns.manager import TurnManager
from segue_contract.errors import SegueError
from segue_contract.ids import SessionName
from segue_contract.limits import RECOVERY_SESSIONS, RECOVERY_SWEEP_S

log = structlog.get_logger("segue.turns")


class SessionList(Protocol):
    async def list_sessions(self, tenant: str, max_sessions: int) -> list[SessionSummary]: ...


@asynccontextmanager
async def recovering(
    manager: TurnManager,
    sessions: SessionList,
    tenant: str,
    *,
    every_s: float = RECOVERY_SWEEP_S,
) -> AsyncIterator[None]:
    """While inside, orphans among the newest sessions are looked for every `every_s`."""
    task = asyncio.create_task(_sweep(manager, sessions, tenant, every_s), name="recovery sweep")
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _sweep(manager: TurnManager, sessions: SessionList, tenant: str, every_s: float) -> None:
    while True:
        await asyncio.sleep(every_s)
        try:
            for one in await sessions.list_sessions(tenant, RECOVERY_SESSIONS):
                session = SessionName(tenant, one.session)
                if one.running_turn and not manager.knows(session, one.running_turn):
                    await manager.recover(session)
        except SegueError as error:  # the store is away, say: the next round finds them
            log.warning("recovery_sweep_failed", error=str(error))
