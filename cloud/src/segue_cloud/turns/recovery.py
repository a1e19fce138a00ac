"""Turns whose owner died are found and finished, even if nobody asks for their session."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog

from segue_cloud.turns.manager import TurnManager
from segue_cloud.turns.ports import RunningTurns
from segue_contract.errors import SegueError
from segue_contract.limits import (
    RECOVERIES_PER_SWEEP,
    RECOVERY_SWEEP_S,
    RUNNING_REFRESH_S,
)
from segue_contract.transport.together import in_background

log = structlog.get_logger("segue.turns")


@asynccontextmanager
async def recovering(
    manager: TurnManager,
    running: RunningTurns,
    *,
    every_s: float = RECOVERY_SWEEP_S,
    grace_s: float | None = None,
) -> AsyncIterator[None]:
    """While inside, orphans are looked for every `every_s`, as many as there is room for, after
    `grace_s` (None: a lease's time) at first."""
    grace_s = manager.limits.lease_s if grace_s is None else grace_s
    async with in_background(_sweep(manager, running, every_s, grace_s), "recovery sweep"):
        yield


async def _sweep(
    manager: TurnManager, running: RunningTurns, every_s: float, grace_s: float
) -> None:
    clock = asyncio.get_running_loop().time
    answered = named = clock()
    # After a restart the edges of its turns come back first: they still hold the prompts' KV.
    wait_until = clock() + grace_s
    while True:
        await asyncio.sleep(every_s)
        try:
            most = min(manager.room, RECOVERIES_PER_SWEEP)
            if clock() - named > RUNNING_REFRESH_S:
                await manager.name_running()
                named = clock()
            if clock() < wait_until or not most:
                answered = clock()
                continue
            due = await running.due(most)
            if clock() - answered > every_s + manager.limits.lease_s / 2:
                # The store, or this process, stood still: nobody could renew a lease meanwhile,
                # and owners that are alive shall do so first.
                wait_until = clock() + manager.limits.lease_s
            else:
                for session in due:
                    await manager.recover(session)
            answered = clock()
        except SegueError as error:  # the store is away, say: the next round finds them
            log.warning("recovery_sweep_failed", error=str(error))
