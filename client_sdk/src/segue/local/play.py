"""The demo's play: two devices, one session; one of them is cut off in the middle of a reply."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

from segue.client import Client
from segue.local.device import Happened, asked_for, heard, parse
from segue.local.measure import DemoNumbers, Seen, TurnNumbers, delays_s
from segue.local.parts import module_command
from segue.session import Session
from segue_contract.errors import DeadlineExceeded, TurnFailed
from segue_contract.limits import RPC_TIMEOUT_S, TURN_TIMEOUT_S
from segue_contract.plan import PlanReport, decode_plan
from segue_contract.servers import ChildProcess
from segue_contract.sync.state import SessionState, TurnState
from segue_contract.transport.together import end

SESSION = "trip"
KILL_AFTER_TOKENS = 48  # well inside the reply, and enough tokens to speak of a p99

FIRST_PROMPT = """\
Write a letter to my sister Anna about our day at the sea, in a warm and friendly voice.

What happened: We left the house at nine in the morning and took the small train along the coast. \
My mother wanted to see the gardens first, so we walked slowly up the hill, where old men played \
chess under the trees and my son Leo sailed a little wooden boat on the pond. Then we had coffee \
and warm bread in a bookshop near the harbour, and mother bought a book of poems. At noon it \
began to rain, and we went into the museum and looked at the old ships until the sun came back. \
In the afternoon we took a boat around the island. Leo waved at everyone. In the evening we \
climbed the lighthouse and saw the lights of the whole town."""
SECOND_PROMPT = "Thank you. What did Leo like best on that day, and why?"


@dataclass(frozen=True)
class Script:
    """What is said, and how long the replies may get."""

    first: str = FIRST_PROMPT
    second: str = SECOND_PROMPT
    max_tokens: int = 160
    second_max_tokens: int = 100
    temperature: float = 0.8
    top_p: float = 0.9
    seed: int = 17
    first_plan: str = "ship"  # so that the hand-over is seen whatever is cheapest here
    second_plan: str = ""


@dataclass
class Screen:
    """What one device shows. `role`: asks, follows; "" while it is not there."""

    name: str
    role: str = ""
    note: str = ""
    turns: dict[str, Seen] = field(default_factory=dict)
    current: str = ""
    asked_at: float = 0.0
    joined_with: str | None = None
    error: str = ""
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def seen(self) -> Seen:
        """The latest turn as this device has it."""
        return self.turns.get(self.current) or Seen()

    def apply(self, event: Happened) -> None:
        if event.event == "asked":
            self.asked_at = event.at
        elif event.event == "error":
            self.error = event.text
        elif event.event == "joined":
            self.joined_with = event.text
        else:
            self.current = event.turn
            self.turns.setdefault(event.turn, Seen()).apply(event)
        self.changed.set()

    async def until(self, condition: Callable[[], bool], what: str, timeout_s: float) -> None:
        """Wait until `condition` holds of this screen.

        Raises:
            DeadlineExceeded: not in time.
            TurnFailed: the device reported an error.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while not condition():
                    if self.error:
                        raise TurnFailed(f"The {self.name} reports: {self.error}")
                    self.changed.clear()
                    await self.changed.wait()
        except TimeoutError:
            raise DeadlineExceeded(f"{what} took longer than {timeout_s:.0f} s.") from None


class Watcher(Protocol):
    """Whoever shows the play."""

    def scene(self, title: str) -> None:
        """A new scene begins."""

    def told(self, text: str, *, good: bool) -> None:
        """Something worth a line happened; `good`: as it should."""

    def begin(self, prompt: str, screens: tuple[Screen, ...]) -> None:
        """A turn begins: the screens change from now on."""

    def end(self) -> None:
        """The turn is over."""


class RemoteDevice:
    """A device in a process of its own, shown on `screen`; killed on leaving."""

    def __init__(self, screen: Screen, node: str, what: str, *args: str) -> None:
        self.screen = screen
        self._command = module_command("segue.local.device", what, "--node", node, *args)
        self._command += ["--session", SESSION, "--device", screen.name]
        self._process: ChildProcess | None = None

    async def __aenter__(self) -> Self:
        def on_line(line: str) -> None:
            if (event := parse(line)) is not None:
                self.screen.apply(event)

        self._process = await ChildProcess.start(
            self.screen.name,
            self._command,
            ready=lambda line: parse(line) is not None,
            on_line=on_line,
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.kill()

    async def kill(self) -> None:
        """SIGKILL: it is gone in the middle of whatever it did."""
        if self._process is not None:
            self._process.kill()
            await self._process.stop()
            self._process = None


async def play(node: str, watcher: Watcher, script: Script, start_s: float) -> DemoNumbers:
    """Play both turns at `node` ("host:port"); what was measured.

    Raises:
        SegueError: of any part; nothing keeps running.
    """
    phone, laptop = Screen("phone"), Screen("laptop", role="follows")
    async with Client(node, device=laptop.name, token="", tls_ca="") as client:
        session = await client.session(SESSION)
        following = asyncio.create_task(_follow(session, laptop), name="laptop follows")
        try:
            await laptop.until(
                lambda: laptop.joined_with is not None, "Following the session", RPC_TIMEOUT_S
            )
            first = await _first_turn(node, session, phone, laptop, watcher, script)
        finally:
            await end(following)
        second = await _second_turn(node, session, phone, laptop, watcher, script)
    return DemoNumbers(
        turns=[first.numbers, second.numbers],
        start_s=start_s,
        killed_after_tokens=first.killed_after,
        same_text=first.same and second.same,
    )


@dataclass
class _Outcome:
    numbers: TurnNumbers
    same: bool
    killed_after: int = 0


async def _first_turn(
    node: str, session: Session, phone: Screen, laptop: Screen, watcher: Watcher, script: Script
) -> _Outcome:
    watcher.scene("The phone asks, the laptop follows; then the phone is cut off")
    phone.role = "asks"
    watcher.begin(script.first, (phone, laptop))
    options = ["--prompt", script.first, "--max-tokens", str(script.max_tokens)]
    options += ["--temperature", str(script.temperature), "--top-p", str(script.top_p)]
    options += ["--seed", str(script.seed), "--plan", script.first_plan]
    try:
        async with RemoteDevice(phone, node, "ask", *options) as device:
            await phone.until(
                lambda: len(phone.seen.at) >= KILL_AFTER_TOKENS or bool(phone.seen.reason),
                "The first half of the reply",
                TURN_TIMEOUT_S,
            )
            await device.kill()
        killed_after = len(phone.seen.at)
        phone.note = f"killed after {killed_after} tokens"
        await laptop.until(lambda: bool(laptop.seen.reason), "The reply", TURN_TIMEOUT_S)
    finally:
        watcher.end()
    turn = (await session.state()).turns[-1]
    same = turn.text == laptop.seen.text
    watcher.told(f"The phone was killed (SIGKILL) after {killed_after} tokens.", good=True)
    words = "exactly as in the log" if same else "and NOT as in the log"
    watcher.told(f"The laptop has all {len(laptop.seen.at)}, {words}.", good=same)
    numbers = _numbers(phone, laptop, turn, rate=laptop.seen.tokens_per_s, whole=laptop.seen)
    return _Outcome(numbers, same, killed_after)


async def _second_turn(
    node: str, session: Session, phone: Screen, laptop: Screen, watcher: Watcher, script: Script
) -> _Outcome:
    watcher.scene("The phone is back and follows; the laptop asks on, with the session's KV")
    before = (await session.state()).turns[-1].text
    phone.role, phone.note, laptop.role = "follows", "", "asks"
    async with RemoteDevice(phone, node, "follow"):
        await phone.until(
            lambda: phone.joined_with is not None, "Coming back to the session", RPC_TIMEOUT_S
        )
        caught_up = phone.joined_with == before
        words = "nothing twice, nothing missing" if caught_up else "and NOT as in the log"
        watcher.told(f"The phone came back: it has the whole reply, {words}.", good=caught_up)
        watcher.begin(script.second, (phone, laptop))
        try:
            await _ask(session, laptop, script)
            await phone.until(lambda: bool(phone.seen.reason), "The reply", TURN_TIMEOUT_S)
        finally:
            watcher.end()
    state: SessionState = await session.state()
    turn = state.turns[-1]
    same = turn.text == laptop.seen.text == phone.seen.text
    words = "exactly as in the log" if same else "and NOT as in the log"
    watcher.told(f"Both devices have {len(turn.tokens)} tokens, {words}.", good=same)
    numbers = _numbers(laptop, phone, turn, rate=laptop.seen.tokens_per_s, whole=laptop.seen)
    return _Outcome(numbers, same and caught_up)


async def _ask(session: Session, screen: Screen, script: Script) -> None:
    screen.apply(Happened(event="asked", at=time.monotonic()))
    running = session.run(
        script.second,
        max_tokens=script.second_max_tokens,
        temperature=script.temperature,
        top_p=script.top_p,
        seed=script.seed,
        plan=script.second_plan,
    )
    async with running as turn:
        async for event in turn:
            if (told := asked_for(event, turn.id, time.monotonic())) is not None:
                screen.apply(told)


async def _follow(session: Session, screen: Screen) -> None:
    async for item in session.follow():
        if (event := heard(item, time.monotonic())) is not None:
            screen.apply(event)


def _numbers(
    asking: Screen, other: Screen, turn: TurnState, *, rate: float, whole: Seen
) -> TurnNumbers:
    plan = decode_plan(turn.plan) if turn.plan else PlanReport(shape="unknown")
    seen = asking.seen
    return TurnNumbers(
        asked_by=asking.name,
        ttft_s=seen.at[0] - asking.asked_at if seen.at else 0.0,
        first_token_by=seen.made_by[0] if seen.made_by else "",
        tokens=len(whole.at),
        edge_tokens=whole.made("edge"),
        tokens_per_s=rate,
        delays=delays_s(seen, other.seen),
        plan=plan,
        usage=turn.usage,
    )
