"""One device's reply, and what a follower and a writer of values saw meanwhile."""

from __future__ import annotations

import asyncio
import itertools
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import segue
from segue_contract.errors import SegueError
from segue_contract.limits import RPC_TIMEOUT_S
from segue_contract.sync import ops

CATCH_UP_S = 30.0  # a follower that lacks the end of the log for longer counts as that late
VALUE_PAUSE_S = 0.25


@dataclass(frozen=True)
class Way:
    """How a device asks."""

    name: str  # "ship", "text" (a forced plan, over an edge) or "direct" (a cloud, no edge)

    @property
    def direct(self) -> bool:
        return self.name == "direct"

    @property
    def plan(self) -> str:
        """A cloud alone forces no plan that needs an edge."""
        return "" if self.direct else self.name


@dataclass(eq=False)
class Reader:
    """The asking device: when each token and the end came, and which offsets it was told to be in
    the log. `epochs`: the owner's number, as of each arrival."""

    way: Way = Way("ship")
    arrivals: list[float] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)
    in_log: list[tuple[float, int]] = field(default_factory=list)
    told: tuple[int, ...] = ()  # tokens that it was told to be durable
    turn: segue.Turn | None = None
    over: bool = False
    broken: str = ""
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def address(self) -> str:
        """Who serves it now."""
        return self.turn.address if self.turn is not None else ""

    async def read(self, session: segue.Session, prompt: str, max_tokens: int) -> None:
        turn = self.turn = session.run(prompt, max_tokens=max_tokens, plan=self.way.plan)
        epoch = 1
        try:
            async with turn:
                async for event in turn:
                    now = time.monotonic()
                    offset = getattr(event, "offset", 0)
                    if offset and getattr(event, "durable", True):
                        self.in_log.append((now, offset))
                    if isinstance(event, segue.Frame | segue.Ended):
                        epoch = max(epoch, event.epoch)
                        self.arrivals.append(now)
                        self.epochs.append(epoch)
                        self.changed.set()
        except SegueError as error:
            self.broken = type(error).__name__
        finally:
            self.over = True
            self.told = turn.tokens[: turn.durable_index]
            self.changed.set()

    def since(self, at: float) -> int:
        """How many arrivals it had after `at`."""
        return len(self.arrivals) - bisect_right(self.arrivals, at)

    def pause_s(self, since: float, until: float) -> float:
        """The longest gap that ends within these times; a reply that has no end at `until` has
        one that ends there."""
        ended = self.over and not self.broken
        times = [*self.arrivals, *([] if ended else [until])]
        gaps = [b - a for a, b in itertools.pairwise(times) if since < b <= until]
        return max(gaps, default=0.0)

    def taken_over(self, since: float, until: float) -> bool:
        """Another owner went on with the reply within these times."""
        before, after = (bisect_right(self.arrivals, at) for at in (since, until))
        return after > before > 0 and self.epochs[after - 1] > self.epochs[before - 1]

    async def until(self, reached: Callable[[], bool]) -> None:
        """Return when that is so, or the reply is over."""
        while not (self.over or reached()):
            self.changed.clear()
            await self.changed.wait()


@dataclass
class Follower:
    """Another device: when it had the log up to which offset."""

    seen: list[tuple[float, int]] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def follow(self, session: segue.Session) -> None:
        async for item in session.follow():
            self.seen.append((time.monotonic(), item.offset))
            self.changed.set()

    async def until(self, offset: int) -> None:
        """Wait for `offset`, CATCH_UP_S at most."""
        try:
            async with asyncio.timeout(CATCH_UP_S):
                while not self.seen or self.seen[-1][1] < offset:
                    self.changed.clear()
                    await self.changed.wait()
        except TimeoutError:
            pass  # `lag_s` says so

    def lag_s(
        self, in_log: list[tuple[float, int]], since: float, until: float = float("inf")
    ) -> float:
        """The longest wait for an offset that was in the log at some time within these."""
        now = time.monotonic()
        worst = 0.0
        for at, offset in in_log:
            if since <= at < until:
                first = next((seen for seen, upto in self.seen if upto >= offset), now)
                worst = max(worst, first - at)
        return worst


async def write_values(session: segue.Session, acknowledged: list[str]) -> None:
    """Set one named value after another; a call that fails says nothing about its value."""
    number = 0
    while True:
        number += 1
        name = f"value-{number}"
        try:
            async with asyncio.timeout(RPC_TIMEOUT_S):
                await session.set(name, b"x")
            acknowledged.append(name)
        except (SegueError, TimeoutError):
            pass
        await asyncio.sleep(VALUE_PAUSE_S)


@dataclass
class Found:
    """What was told, compared with the log afterwards."""

    tokens: int = 0
    values: int = 0
    lost: int = 0
    doubled: int = 0
    what: tuple[str, ...] = ()  # of these two, in words

    def __add__(self, other: Found) -> Found:
        return Found(
            self.tokens + other.tokens,
            self.values + other.values,
            self.lost + other.lost,
            self.doubled + other.doubled,
            self.what + other.what,
        )


async def compare(
    addresses: Sequence[str], name: str, reader: Reader, acknowledged: Sequence[str]
) -> Found:
    """Count what the reader and the writer were told against the log as it is now."""
    assert reader.turn is not None
    turn = reader.turn.id
    async with segue.Client(addresses, device="auditor") as client:
        session = await client.session(name)
        state = await session.state()
        entries = await session.read()
    names: Counter[str] = Counter()
    ends = 0
    covered: Counter[int] = Counter()
    for item in entries:
        if not isinstance(item, segue.Entry):
            continue
        if isinstance(item.op, ops.Set):
            names[item.op.name] += 1
        elif isinstance(item.op, ops.Frame) and item.op.turn == turn:
            covered.update(range(item.op.index, item.op.index + len(item.op.tokens)))
        elif isinstance(item.op, ops.TurnEnded) and item.op.turn == turn:
            ends += 1
    kept = [one for one in state.turns if one.turn == turn]
    logged = kept[0].tokens if kept else []
    same = sum(a == b for a, b in zip(reader.told, logged, strict=False))
    told_end = reader.turn.ended is not None and reader.turn.ended.durable
    missing = [one for one in acknowledged if one not in state.values]
    twice = [one for one, count in names.items() if count > 1]
    tokens_lost, end_lost = len(reader.told) - same, told_end and not ends
    tokens_twice = sum(count - 1 for count in covered.values() if count > 1)
    what = [
        *(f"{name}: {one} is lost" for one in missing),
        *(f"{name}: {one} is there twice" for one in twice),
        *([f"{name}: {tokens_lost} of {len(reader.told)} tokens told"] if tokens_lost else []),
        *([f"{name}: the end that was told"] if end_lost else []),
        *(
            [f"{name}: {tokens_twice} tokens twice, {ends} ends"]
            if tokens_twice or ends > 1
            else []
        ),
    ]
    return Found(
        tokens=len(reader.told),
        values=len(acknowledged),
        lost=tokens_lost + len(missing) + end_lost,
        doubled=sum(names[one] - 1 for one in twice) + tokens_twice + max(0, ends - 1),
        what=tuple(what),
    )
