"""Which parts of the house work now: what ended is started again beside the next faults."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Sequence
from types import TracebackType

from segue.local.parts import Part, Program
from segue_contract.limits import PROBE_INTERVAL_S
from tests.bench.suites._fault_house import House, Kind

# An edge has asked a cloud that is back for its facts by then, and counts it among the healthy.
KNOWN_S = PROBE_INTERVAL_S + 0.5
LOOK_S = 0.1
_NICE = 15


class Stock:
    """`async with Stock(house) as stock`: knows what is well. Leaving it ends all restarts."""

    def __init__(self, house: House) -> None:
        self.house = house
        self._clock = asyncio.get_running_loop().time
        self._well_at: dict[str, float] = {}  # since when; a part that was never broken: always
        self._down: set[str] = set()
        self._restarts: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Stock:
        if _may_renice():
            for one in (*self.house.clouds, *self.house.edges):
                one.argv = (*_nice(), *one.argv)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for task in self._restarts:
            task.cancel()
        await asyncio.gather(*self._restarts, return_exceptions=True)

    def well(self, part: str) -> list[Program]:
        """Edges or clouds that serve; clouds only where every edge knows so."""
        now = self._clock()
        if part == "edge":
            return [one for one in self.house.edges if one.name not in self._down]
        return [
            one
            for one in self.house.clouds
            if one.name not in self._down and now - self._well_at.get(one.name, 0) >= KNOWN_S
        ]

    def can(self, kind: Kind) -> bool:
        """Whether such a fault leaves one that can go on, as its row says."""
        return not kind.others_go_on or len(self.well(kind.part)) > 1

    async def until_possible(self, kinds: Sequence[Kind]) -> Kind:
        """The first of `kinds` that is possible, once one is.

        Raises:
            StartFailed: a part did not come back.
        """
        while True:
            self._check()
            for kind in kinds:
                if self.can(kind) and self.well("edge") and self.well("cloud"):
                    return kind
            if self._restarts:
                await asyncio.wait(self._restarts, timeout=LOOK_S)
            else:
                await asyncio.sleep(LOOK_S)  # until a cloud that is back is known to be

    def broken(self, part: Part) -> None:
        self._down.add(part.name)

    async def mend(self, part: Part, kind: Kind) -> None:
        """As it was: resumed where it stood still. A server that ended is started again at once,
        a program beside what follows, and takes no time from it where this may be arranged."""
        part.resume()
        if kind.how == "silent":
            self._back(part)
        elif isinstance(part, Program):
            self._restarts.add(asyncio.create_task(self._restart(part), name=f"start {part.name}"))
        else:
            await part.restart()
            self._back(part)

    async def _restart(self, part: Program) -> None:
        await part.restart()
        if part.argv[: len(_nice())] == _nice():
            _renice(part.pid)
        self._back(part)

    def _back(self, part: Part) -> None:
        self._down.discard(part.name)
        self._well_at[part.name] = self._clock()

    def _check(self) -> None:
        for task in [task for task in self._restarts if task.done()]:
            self._restarts.discard(task)
            task.result()


def _nice() -> tuple[str, ...]:
    return (shutil.which("nice") or "nice", "-n", str(_NICE))


def _may_renice() -> bool:
    """A starting program may wait for those that serve: elsewhere it would have its own machine.
    Only where it can be raised again when it serves itself."""
    return os.name == "posix" and os.geteuid() == 0 and shutil.which("nice") is not None


def _renice(pid: int) -> None:
    """All its threads, twice: one that was not raised yet may have started another."""
    for _ in range(2):
        for thread in os.listdir(f"/proc/{pid}/task"):
            try:
                os.setpriority(os.PRIO_PROCESS, int(thread), 0)
            except ProcessLookupError:
                continue
