"""The watch over a compute thread, for everybody who waits for it (`segue_contract.liveness`)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import structlog

from segue_contract.errors import Overloaded
from segue_contract.limits import STALL_LOOK_S, STALL_S
from segue_contract.liveness import StallWatch
from segue_contract.transport.together import end

log = structlog.get_logger("segue.stalls")

T = TypeVar("T")
Running = tuple[float, float]
"""The running step (0 where none runs), and how long such steps take, seconds."""


class StallMonitor:
    """`start`, then `stalled` says whether the thread hangs now; `close` at last.

    Args:
        running: asked at each look.
        what: whose thread it is, for the log.
    """

    def __init__(
        self, running: Callable[[], Running], what: str, *, every_s: float = STALL_LOOK_S
    ) -> None:
        self._running = running
        self._what = what
        self._every_s = every_s
        self._watch = StallWatch()
        self._stalled = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def stalled(self) -> bool:
        return self._stalled.is_set()

    async def guard(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which waits for the thread; cancelled where that hangs.

        Raises:
            Overloaded: it hangs.
        """
        working = asyncio.ensure_future(work)
        hung = asyncio.ensure_future(self._stalled.wait())
        try:
            await asyncio.wait({working, hung}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            raise Overloaded(
                f"The {self._what}'s compute makes no progress.",
                hint="Use another node.",
                retry_after_s=STALL_S,
            )
        finally:
            await end(working, hung)

    def start(self) -> None:
        self._task = asyncio.create_task(self._look_on(), name=f"watch {self._what}")

    async def close(self) -> None:
        if self._task is not None:
            await end(self._task)

    async def _look_on(self) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            step, usual_s = self._running()
            stalled = self._watch.look(step, usual_s)
            if stalled == self.stalled:
                continue
            if stalled:
                log.error("compute_hangs", what=self._what, usual_step_s=round(usual_s, 3))
                self._stalled.set()
            else:
                log.warning("compute_goes_on", what=self._what)
                self._stalled.clear()
