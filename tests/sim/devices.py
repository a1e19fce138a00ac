"""Devices as an app makes them: they follow, set values and ask, and note what they are told."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import segue
from segue import events
from segue.follow import Follower
from segue_contract.errors import SegueError, UnknownSession
from segue_contract.sync.ops import Set
from segue_contract.sync.state import SessionState
from tests.sim.invariants import History
from tests.sim.world import World


@dataclass
class Shown:
    """One turn as its asker saw it."""

    turn: str
    reply: segue.Turn = field(repr=False)
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    ended: list[events.Ended] = field(default_factory=list)
    rewinds: int = 0
    started: bool = False
    error: str = ""


class Device:
    """One device with one session open. Its process lives through the run."""

    def __init__(
        self,
        world: World,
        history: History,
        name: str,
        session: str,
        addresses: Sequence[str],
        *,
        device: str = "",
    ) -> None:
        """`name` is the process's; `device`, where it is another, the one that it says it is."""
        self.world = world
        self.history = history
        self.name = name
        self.session_name = session
        self.process = world.process(name)
        self.rng: Random = world.rng(f"device {name}")
        self.follower: Follower | None = None
        self.lost_told = 0
        self.asked: list[Shown] = []
        self.client: segue.Client
        self.session: segue.Session
        self._addresses = list(addresses)
        self._device = device or name
        self._values = 0

    async def open(self) -> None:
        self.client = segue.Client(self._addresses, device=self._device)
        while True:
            try:
                await self.client._nodes.connect()
                self.session = await self.client.session(self.session_name)
                return
            except SegueError as error:
                self.world.say("not opened", str(error))
                await asyncio.sleep(0.3)

    async def _join_again(self, error: SegueError) -> None:
        """As an app does whose session was deleted, or lost with all that the store had of it."""
        if isinstance(error, UnknownSession):
            with contextlib.suppress(SegueError):
                self.session = await self.client.session(self.session_name)

    # -- following ----------------------------------------------------------------------------

    async def follow(self) -> None:
        """For ever; a follower that gave up is made again."""
        while True:
            self.follower = self.session.follow()
            try:
                async for item in self.follower:
                    self._saw(item)
            except SegueError as error:
                self.world.say("follower ended", str(error))
                await asyncio.sleep(0.5)
                await self._join_again(error)

    def _saw(self, item: object) -> None:
        if isinstance(item, events.Entry):
            self.world.say("saw", item.generation, item.offset)
            self.history.saw(self.name, self.session_name, (item.generation, item.offset), item.op)
        elif isinstance(item, events.Snapshot):
            self.world.say("snapshot", item.generation, item.offset)

    @property
    def state(self) -> SessionState | None:
        return self.follower.state if self.follower is not None else None

    # -- writing ------------------------------------------------------------------------------

    async def set_value(self) -> bool:
        self._values += 1
        op = Set(id=f"{self.name}-{self._values}", name=f"{self.name}.{self._values % 3}",
                 value=str(self._values).encode())  # fmt: skip
        try:
            cursor = await self.session.append(op)
        except SegueError as error:
            self.world.say("append failed", op.id, type(error).__name__)
            await self._join_again(error)
            return False
        self.history.acknowledged(
            self.name, self.session_name, (cursor.generation, cursor.offset), op.id
        )
        return True

    # -- asking -------------------------------------------------------------------------------

    async def ask(self, prompt: str, max_tokens: int) -> Shown:
        turn = self.session.run(prompt, max_tokens=max_tokens)
        shown = Shown(turn.id, turn)
        self.asked.append(shown)
        self.world.say("asks", turn.id, max_tokens)
        try:
            async with turn:
                shown.started = True
                async for event in turn:
                    self._show(shown, event)
        except SegueError as error:
            shown.error = type(error).__name__
            self.world.say("ask failed", turn.id, shown.error, str(error))
            await self._join_again(error)
        return shown

    async def settle(self) -> None:
        """Learn what the log made of replies that were made out of its reach."""
        for shown in self.asked:
            if shown.ended and shown.ended[-1].pending:
                async for event in shown.reply.settled():
                    self._show(shown, event)

    def _show(self, shown: Shown, event: events.TurnEvent) -> None:
        require = self.world.require
        over = shown.ended and not shown.ended[-1].pending
        require(not over, "A turn goes on after its end.", f"{self.name} {event}")
        match event:
            case events.Frame():
                require(
                    event.index == len(shown.tokens),
                    "A frame does not follow on what was shown.",
                    f"{self.name} {shown.turn}: {event.index} after {len(shown.tokens)}",
                )
                shown.tokens += event.tokens
                if event.durable:
                    self.history.shown_durable(self.session_name, shown.turn, shown.tokens)
                text = "".join(event.pieces)
                require(
                    text == "".join(map(chr, event.tokens)),
                    "Text and tokens differ.",
                    f"{self.name} {event}",
                )
                self.world.say("shown", shown.turn, event.index, text, event.durable)
            case events.Rewound():
                require(event.index <= len(shown.tokens), "A rewind beyond what was shown.")
                del shown.tokens[event.index :]
                shown.rewinds += 1
                self.world.say("rewound", shown.turn, event.index)
            case events.Ended():
                shown.ended.append(event)
                self.world.say("ended", shown.turn, event.reason, event.durable)
            case _:
                pass
