"""One reply with one fault in it: what its reader, a follower and a writer of values saw."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from dataclasses import dataclass, field

import segue
from segue.local.parts import Part
from segue_contract.errors import SegueError
from segue_contract.limits import RPC_TIMEOUT_S
from segue_contract.sync import ops
from tests.bench.suites._fault_house import (
    BROKER_HOLD_S,
    STORE_HOLD_S,
    House,
    Kind,
    mend,
    strike,
)

STORY = "Tell me a long story about lighthouse keeper number {number} and the sea."
REPLY_TOKENS = 160
STRIKE_AT = 16  # tokens that the reader has when the fault happens
GIVE_UP_S = 90.0  # a reply that has not ended by then counts as broken
CATCH_UP_S = 30.0  # a follower that lacks the end of the log for longer counts as that late
VALUE_PAUSE_S = 0.1


@dataclass
class Outcome:
    """What one fault did. Times in seconds."""

    pause_s: float = 0.0  # longest time between two tokens of the reader from the fault on
    lag_s: float = 0.0  # longest time from "in the log" to "seen by the follower", likewise
    held_out: bool = False  # the reader got nothing while the part stood still
    broken: str = ""  # why the reply did not reach its end at the reader
    taken_over: bool = False  # another owner finished the reply, under a higher epoch
    tokens: int = 0
    values: int = 0
    lost: int = 0
    doubled: int = 0


@dataclass
class Reader:
    """The asking device: when each token came, and which offsets it was told to be in the log."""

    arrivals: list[float] = field(default_factory=list)
    in_log: list[tuple[float, int]] = field(default_factory=list)
    told: tuple[int, ...] = ()  # tokens that it was told to be durable
    turn: str = ""
    serving: str = ""  # the address that served it when the fault happened
    broken: str = ""
    struck: asyncio.Event = field(default_factory=asyncio.Event)

    async def read(self, session: segue.Session, prompt: str, plan: str) -> None:
        turn = session.run(prompt, max_tokens=REPLY_TOKENS, plan=plan)
        self.turn = turn.id
        tokens = 0
        try:
            async with asyncio.timeout(GIVE_UP_S), turn:
                async for event in turn:
                    now = time.monotonic()
                    offset = getattr(event, "offset", 0)
                    if offset and getattr(event, "durable", True):
                        self.in_log.append((now, offset))
                    if isinstance(event, segue.Frame):
                        self.arrivals.append(now)
                        tokens = event.next_index
                    if tokens >= STRIKE_AT and not self.struck.is_set():
                        self.serving = turn.address
                        self.struck.set()
        except TimeoutError:
            self.broken = "no end"
        except SegueError as error:
            self.broken = type(error).__name__
        finally:
            self.struck.set()
            self.told = turn.tokens[: turn.durable_index]

    def pause_s(self, since: float, until: float) -> float:
        """The longest gap that ends after `since`; a broken reply's last gap ends at `until`."""
        times = [*self.arrivals, *([until] if self.broken else [])]
        gaps = [b - a for a, b in itertools.pairwise(times) if b > since]
        return max(gaps, default=0.0)


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

    def lag_s(self, in_log: list[tuple[float, int]], since: float) -> float:
        """The longest wait for an offset that was in the log at some time after `since`."""
        now = time.monotonic()
        worst = 0.0
        for at, offset in in_log:
            if at >= since:
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


async def one_fault(
    house: House, kind: Kind, number: int, hold_s: float, *, last: bool = False
) -> Outcome:
    """A reply in a session of its own, with the fault in its middle.

    `hold_s`: how long an edge or a cloud stands still at most. All is mended at the end, except
    that after the `last` fault what has ended stays so where another does its work.
    """
    name = f"{kind.name.replace('_', '-')}-{number}"
    reader, follower, acknowledged = Reader(), Follower(), list[str]()
    addresses = house.addresses(kind)
    async with (
        segue.Client(addresses, device="phone") as phone,
        segue.Client(addresses[::-1], device="laptop") as laptop,
    ):
        session = await phone.session(name)
        other = await laptop.session(name)
        following = asyncio.create_task(follower.follow(other))
        writing = asyncio.create_task(write_values(session, acknowledged))
        before = house.cpu_s()
        prompt = STORY.format(number=number)
        reading = asyncio.create_task(reader.read(session, prompt, kind.asked_plan))
        victim: Part | None = None
        try:
            await reader.struck.wait()
            victim = house.victim(kind, before, reader.serving)
            at = time.monotonic()
            await strike(victim, kind)
            held_out = await _hold(kind, reading, reader, hold_s, at)
            if not kind.others_go_on:
                await mend(victim)
            await reading
            ended = time.monotonic()
        finally:
            reading.cancel()
            if victim is not None and not (last and kind.others_go_on):
                await mend(victim)
        if reader.in_log:
            await follower.until(reader.in_log[-1][1])
        for task in (following, writing):
            task.cancel()
        await asyncio.gather(following, writing, reading, return_exceptions=True)
    outcome = Outcome(
        pause_s=reader.pause_s(at, ended),
        lag_s=follower.lag_s(reader.in_log, at),
        held_out=held_out,
        broken=reader.broken,
        tokens=len(reader.told),
        values=len(acknowledged),
    )
    await _compare(house, name, reader, acknowledged, outcome)
    return outcome


async def _hold(
    kind: Kind, reading: asyncio.Task[None], reader: Reader, hold_s: float, at: float
) -> bool:
    """Wait while the part stands still; whether the reader got nothing for all of that time."""
    if kind.how != "silent":
        return False
    if not kind.others_go_on:
        await asyncio.sleep(STORE_HOLD_S if kind.part == "store" else BROKER_HOLD_S)
        return False
    await asyncio.wait([reading], timeout=hold_s)
    return not reading.done() and (not reader.arrivals or reader.arrivals[-1] < at + 1.0)


async def _compare(
    house: House, name: str, reader: Reader, acknowledged: list[str], outcome: Outcome
) -> None:
    """Count what the reader and the writer were told against the log as it is now."""
    async with segue.Client([cloud.address for cloud in house.clouds], device="auditor") as client:
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
        elif isinstance(item.op, ops.Frame) and item.op.turn == reader.turn:
            covered.update(range(item.op.index, item.op.index + len(item.op.tokens)))
        elif isinstance(item.op, ops.TurnEnded) and item.op.turn == reader.turn:
            ends += 1
    kept = [turn for turn in state.turns if turn.turn == reader.turn]
    logged = kept[0].tokens if kept else []
    outcome.taken_over = bool(kept) and kept[0].epoch > 1
    same = sum(a == b for a, b in zip(reader.told, logged, strict=False))
    outcome.lost = len(reader.told) - same + sum(one not in state.values for one in acknowledged)
    outcome.doubled = (
        sum(count - 1 for count in names.values() if count > 1)
        + sum(count - 1 for count in covered.values() if count > 1)
        + max(0, ends - 1)
    )
