"""Waiting that a process which was stopped for a while does not use up.

A deadline on the clock is over at once when a process goes on after SIGSTOP, a debugger or a
laptop's sleep, though whoever is waited for had no time to answer. Here a wait is cut into looks:
the time that the process slept through costs one of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from typing import Any, TypeVar

import structlog

from segue_contract.errors import StoreUnavailable

log = structlog.get_logger("segue.turns")

LOOKS = 4  # of one wait

_T = TypeVar("_T")


async def done_within(
    waited_for: Collection[asyncio.Future[Any]], timeout_s: float, *, looks: int = LOOKS
) -> bool:
    """Wait until one of the futures is done; False where none was within `timeout_s` seconds in
    which this process ran. Nothing is cancelled."""
    for _ in range(looks):
        done, _ = await asyncio.wait(
            waited_for, timeout=timeout_s / looks, return_when=asyncio.FIRST_COMPLETED
        )
        if done:
            return True
    return False


async def store_call(
    call: Callable[[], Awaitable[_T]],
    *,
    calls: int,
    pause_s: float,
    what: str = "",
) -> _T:
    """The result of an idempotent call to the store, repeated while the store stands still.

    Counted in calls, each of which has a deadline of its own, with a pause after one that failed.
    `what`: who waits, for the log.

    Raises:
        StoreUnavailable: `calls` of them failed.
    """
    failed = 0
    while True:
        try:
            result = await call()
        except StoreUnavailable as error:
            failed += 1
            if failed >= calls:
                raise
            if failed == 1:
                log.warning("waits_for_store", what=what, error=error.message)
        else:
            if failed:
                log.info("store_answers", what=what, calls_failed=failed)
            return result
        await asyncio.sleep(pause_s)
