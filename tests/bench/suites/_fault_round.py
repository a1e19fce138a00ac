"""Some replies at once, and faults that strike them one after another.

A round's readers ask in different ways, through one edge or at one cloud; each has a session, a
follower and a writer of its own. What a fault did is seen in the time from it to the next one. A
part goes on (or is started again) once every reply got further; so what wakes up meets replies that
somebody else serves now.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

import segue
from segue.local.parts import Part, Program
from segue_contract.errors import SegueError
from segue_contract.limits import TURN_SILENCE_S
from segue_edge.uplink.rendezvous import Standing, rank
from tests.bench.suites._fault_house import Kind, strike
from tests.bench.suites._fault_stock import Stock
from tests.bench.suites._fault_turn import (
    Follower,
    Found,
    Reader,
    Way,
    compare,
    write_values,
)

# A block of KV and more, that no cache has: the number comes first.
STORY = (
    "Number {number}. This is the logbook of a lighthouse keeper. In spring the fog came "
    "early, and the horn was heard as far as the harbour. In autumn a storm broke two panes "
    "of the lantern, and he stood all night with a lamp in his hand. Now tell me a long story "
    "about this keeper and the sea, year by year, as he would have told it."
)
WAYS = (Way("ship"), Way("text"), Way("direct"))
REPLY_TOKENS = 400  # as long as usual ones: whoever takes one over computes all of it again
SHORT = (32, 320)  # one reply of a round has so many: its end may fall beside a fault
STRIKES = 3  # faults in a round
BEFORE, AFTER = 12, 8  # frames that every reply gets before the first fault, and after each
FLIGHT_S = 0.1  # what a killed part had sent arrives within it
HOLD_S = 20.0  # a silent part goes on after so long, where nobody went on in its place
SERVER_HOLD_S = {"store": 2.5, "broker": 3.5}  # above SILENCE_S, and the goal for a follower's lag
GIVE_UP_S = 60.0  # a reply that makes no progress for so long counts as broken
END_S = 30.0  # likewise one that was stopped

NextKind = Callable[[], Awaitable[Kind | None]]


@dataclass(frozen=True)
class Sample:
    """What one reader saw of one fault. `pause_s`: its longest one from that fault to the next."""

    way: str
    pause_s: float
    taken_over: bool
    broken: str


@dataclass
class Fault:
    """`lags_s`: of each follower, the longest time from "in the log" to "seen"."""

    kind: str
    round: int
    samples: list[Sample] = field(default_factory=list)
    lags_s: list[float] = field(default_factory=list)
    held_out: bool = False  # some reader got nothing until the silent part went on


@dataclass
class Strike:
    """`running`: readers whose replies were under way. `owned`: how many of them the victim owned,
    where it is a cloud."""

    kind: Kind
    victim: Part
    at: float
    running: list[Reader]
    owned: int = 0
    served: list[Reader] = field(default_factory=list)  # whose device was connected to the victim
    held_out: bool = False

    def hit(self, until: float) -> list[Reader]:
        """The readers that it struck, as seen at `until`.

        A cloud's: those whose replies were taken over or that were connected to it. It owned a
        known number: where fewer show it, those with the longest pauses are taken for the rest.
        """
        if self.kind.part == "edge":
            return self.served
        if self.kind.part != "cloud":
            return self.running
        hit = [r for r in self.running if r in self.served or r.taken_over(self.at, until)]
        rest = [reader for reader in self.running if reader not in hit]
        rest.sort(key=lambda reader: reader.pause_s(self.at, until), reverse=True)
        return hit + rest[: max(0, self.owned - len(hit))]


class Round:
    """`run` is its whole life; `faults`, `found` and `broken` are what it saw."""

    def __init__(self, stock: Stock, number: int, random: Random, ways: Sequence[Way] = WAYS):
        self.faults: list[Fault] = []
        self.found = Found()
        self.broken = 0
        self.ended: Counter[str] = Counter()
        self._stock = stock
        self._number = number
        self._random = random
        self._readers = [Reader(way) for way in ways]
        self._followers = [Follower() for _ in ways]
        self._values: list[list[str]] = [[] for _ in ways]
        self._strikes: list[Strike] = []
        clouds, edges = stock.well("cloud"), stock.well("edge")
        self._cloud = clouds[number % len(clouds)].address
        self._names = [self._name(index) for index in range(len(ways))]
        self._edges = _rotated([edge.address for edge in edges], number)

    def _name(self, index: int) -> str:
        """A session of which `self._cloud` is the first choice."""
        well = self._stock.well("cloud")
        clouds = {one.address: Standing(healthy=one in well) for one in self._stock.house.clouds}
        for salt in itertools.count():
            name = f"round-{self._number}-{index}-{salt}"
            if rank(name, clouds)[0] == self._cloud:
                return name
        raise AssertionError

    def _addresses(self, reader: Reader) -> list[str]:
        if not reader.way.direct:
            return self._edges
        others = [one.address for one in self._stock.house.clouds if one.address != self._cloud]
        return [self._cloud, *others]

    async def run(self, next_kind: NextKind, strikes: int = STRIKES) -> None:
        """Strike up to `strikes` times, as `next_kind` says, while replies are under way."""
        async with AsyncExitStack() as devices, _tasks() as background:
            reading = [
                background(await self._start(devices, background, index))
                for index in range(len(self._readers))
            ]
            await self._all(lambda one: len(one.arrivals) >= BEFORE, GIVE_UP_S)
            for _ in range(strikes):
                if not self._running or (kind := await next_kind()) is None:
                    break
                await self._strike(kind)
            await self._end(reading)
            ended = time.monotonic()
            for reader, follower in zip(self._readers, self._followers, strict=True):
                if reader.in_log:
                    await follower.until(reader.in_log[-1][1])
        self._note_faults(ended)
        self.broken = sum(bool(one.broken) for one in self._readers)
        await self._compare()

    @property
    def _running(self) -> list[Reader]:
        return [one for one in self._readers if not one.over]

    # -- the devices ---------------------------------------------------------------------------

    async def _start(
        self,
        devices: AsyncExitStack,
        background: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        index: int,
    ) -> Coroutine[Any, Any, None]:
        """The session with its follower and writer; returns what reads the reply."""
        reader = self._readers[index]
        addresses = self._addresses(reader)
        phone = await devices.enter_async_context(segue.Client(addresses, device="phone"))
        laptop = await devices.enter_async_context(segue.Client(addresses[::-1], device="laptop"))
        session = await phone.session(self._names[index])
        other = await laptop.session(self._names[index])
        background(self._followers[index].follow(other))
        background(write_values(session, self._values[index]))
        short = (self._number + index) % len(WAYS) == 0
        tokens = self._random.randint(*SHORT) if short else REPLY_TOKENS
        prompt = STORY.format(number=f"{self._number}.{index}")
        return reader.read(session, prompt, tokens)

    async def _all(self, reached: Callable[[Reader], bool], timeout_s: float) -> bool:
        """Whether every reply under way reached it in time."""
        waiting = [one.until(lambda one=one: reached(one)) for one in self._running]
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.gather(*waiting)
        except TimeoutError:
            return False
        return True

    async def _end(self, reading: Sequence[asyncio.Task[None]]) -> None:
        """Stop what is under way; who gets no end counts as broken."""
        stopping = [asyncio.create_task(_stopped(one)) for one in self._running]
        await asyncio.gather(*stopping)
        await asyncio.wait(reading, timeout=END_S)
        for reader, task in zip(self._readers, reading, strict=True):
            if not task.done():
                reader.broken = reader.broken or "no end"
                task.cancel()
            ended = reader.turn.ended if reader.turn is not None else None
            self.ended[ended.reason if ended is not None else "none"] += 1
        await asyncio.gather(*reading, return_exceptions=True)

    # -- the faults ----------------------------------------------------------------------------

    async def _strike(self, kind: Kind) -> None:
        one = await self._aim(kind)
        if one is None:
            return
        self._strikes.append(one)
        self._stock.broken(one.victim)
        try:
            await strike(one.victim, kind)  # a planned stop: to the process's end
            if not kind.others_go_on:
                if kind.how == "silent":
                    await asyncio.sleep(SERVER_HOLD_S[kind.part])
                await self._stock.mend(one.victim, kind)
            if kind.how == "silent" and kind.others_go_on:
                since = one.at + TURN_SILENCE_S
            else:
                since = time.monotonic() + FLIGHT_S
            on = await self._all(lambda reader: reader.since(since) >= AFTER, HOLD_S)
        finally:
            if kind.others_go_on:
                await self._stock.mend(one.victim, kind)
        if not on:
            one.held_out = kind.how == "silent"
            back = time.monotonic()
            await self._all(lambda reader: reader.since(back) >= AFTER, GIVE_UP_S)

    async def _aim(self, kind: Kind) -> Strike | None:
        """The part that serves most of the replies; None where none of the kind serves any."""
        running = self._running
        house, now = self._stock.house, time.monotonic
        if not kind.others_go_on:
            return Strike(kind, house.servers[kind.part], now(), running)
        parts = self._stock.well(kind.part)
        served = {one.name: [r for r in running if r.address == one.address] for one in parts}
        if kind.part == "edge":
            victim = max(parts, key=lambda one: len(served[one.name]))
            found = served[victim.name]
            return Strike(kind, victim, now(), running, served=found) if found else None
        owned = dict(zip(parts, await asyncio.gather(*map(house.turns, parts)), strict=True))
        busiest: Program = max(parts, key=lambda one: owned[one])
        if not owned[busiest]:
            return None
        return Strike(kind, busiest, now(), running, owned[busiest], served[busiest.name])

    def _note_faults(self, ended: float) -> None:
        if not self._strikes:  # the time was over before the first
            return
        until = [*(one.at for one in self._strikes[1:]), ended]
        for one, end in zip(self._strikes, until, strict=True):
            lags = [
                follower.lag_s(reader.in_log, one.at, end)
                for reader, follower in zip(self._readers, self._followers, strict=True)
            ]
            fault = Fault(one.kind.name, self._number, lags_s=lags, held_out=one.held_out)
            for reader in one.hit(end):
                fault.samples.append(
                    Sample(
                        reader.way.name,
                        reader.pause_s(one.at, end),
                        reader.taken_over(one.at, end),
                        reader.broken,
                    )
                )
            self.faults.append(fault)

    # -- afterwards ----------------------------------------------------------------------------

    async def _compare(self) -> None:
        addresses = [one.address for one in self._stock.well("cloud")]
        for index, reader in enumerate(self._readers):
            if reader.turn is None:
                continue
            name, values = self._names[index], self._values[index]
            self.found = self.found + await compare(addresses, name, reader, values)


async def _stopped(reader: Reader) -> None:
    """A stop is asked for again where its answer was lost."""
    for _ in range(3):
        with contextlib.suppress(SegueError):
            if reader.over or reader.turn is None or await reader.turn.stop():
                return


@asynccontextmanager
async def _tasks() -> AsyncIterator[Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]]:
    """Starts tasks; what still runs at the end is cancelled."""
    started: list[asyncio.Task[None]] = []

    def start(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        started.append(asyncio.create_task(work))
        return started[-1]

    try:
        yield start
    finally:
        for task in started:
            task.cancel()
        await asyncio.gather(*started, return_exceptions=True)


def _rotated(items: list[str], by: int) -> list[str]:
    by %= len(items)
    return items[by:] + items[:by]
