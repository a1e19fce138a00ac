"""What was revoked, heard from the clouds: a device that has no access any more gets nothing from
an edge's memory either."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable

import structlog

from segue_contract.errors import SegueError
from segue_contract.limits import REVOKED_KEPT_S, REVOKED_LOOK_S
from segue_contract.transport.gate import Gate
from segue_contract.transport.together import in_background
from segue_edge.uplink.clouds import CloudSet

log = structlog.get_logger("segue.revoked")


@contextlib.asynccontextmanager
async def following_revoked(
    clouds: CloudSet,
    gate: Gate,
    *,
    every_s: float = REVOKED_LOOK_S,
    now_s: Callable[[], float] = time.time,
) -> AsyncIterator[None]:
    """While inside, one cloud that answers is asked at that pace; all of them know the same within
    a second. Each other probe brings what is new, too (`CloudSet(revoked=...)`)."""

    async def follow() -> None:
        while True:
            await asyncio.sleep(every_s)
            try:
                await _ask_one(clouds)
            except Exception as error:  # nothing more would be heard of
                log.error("revocations_unread", exc_info=error)
            gate.forget_revoked(now_s() - REVOKED_KEPT_S)

    async with in_background(follow(), "revocations"):
        yield


async def _ask_one(clouds: CloudSet) -> None:
    for cloud in clouds.clouds.values():
        if not cloud.healthy:
            continue
        try:
            await cloud.ask_revoked()
        except SegueError:  # whoever needs it finds out, and says so
            continue
        return
