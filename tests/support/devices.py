"""A device of a session as tests need it: it keeps what it saw, and tells when it saw enough."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import segue
from segue_contract.sync.ops import Frame, TurnEnded
from segue_contract.sync.state import Cursor

WAIT_S = 90.0


@dataclass
class Watcher:
    """What a following device has of each turn's reply, and each offset it saw."""

    replies: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    offsets: list[int] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self, item: segue.Snapshot | segue.Entry) -> None:
        if isinstance(item, segue.Snapshot):
            for turn in item.state.turns:
                self.replies[turn.turn] = turn.text
                if turn.ended:
                    self.reasons[turn.turn] = turn.reason
        else:
            self.offsets.append(item.offset)
            if isinstance(item.op, Frame):
                self.replies[item.op.turn] = self.replies.get(item.op.turn, "") + item.op.text
            elif isinstance(item.op, TurnEnded):
                self.reasons[item.op.turn] = item.op.reason
        self.changed.set()

    async def until_ended(self, turn: str) -> str:
        """The reply of `turn`, once this device saw its end."""
        async with asyncio.timeout(WAIT_S):
            while turn not in self.reasons:
                self.changed.clear()
                await self.changed.wait()
        return self.replies.get(turn, "")

    async def until_text(self, turn: str, characters: int) -> None:
        async with asyncio.timeout(WAIT_S):
            while len(self.replies.get(turn, "")) < characters:
                self.changed.clear()
                await self.changed.wait()


@asynccontextmanager
async def watching(address: str, session: str, device: str) -> AsyncIterator[Watcher]:
    """A second device that follows `session`; it is following once this is entered."""
    watcher = Watcher()
    async with segue.Client(address, device=device) as client:
        opened = await client.session(session)

        async def follow() -> None:
            async for item in opened.follow(from_offset=0):
                watcher.take(item)

        task = asyncio.create_task(follow())
        try:
            async with asyncio.timeout(WAIT_S):
                await watcher.changed.wait()  # the snapshot is always first
            yield watcher
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def text_in_log(address: str, session: str, turn: str) -> str:
    """The reply as the log's frames have it, read entry by entry."""
    async with segue.Client(address, device="reader") as client:
        opened = await client.session(session)
        state = await opened.state()
        known = next(t for t in state.turns if t.turn == turn)
        assert isinstance(state.cursor, Cursor)
        return known.text


class Pauses:
    """Reads a turn to its end; `longest_s` between two tokens is printed, never asserted."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self.begun = asyncio.Event()

    async def read(self, turn: segue.Turn) -> segue.Reply:
        last: float | None = None
        async for event in turn:
            if isinstance(event, segue.Frame):
                now = time.monotonic()
                if last is not None:
                    self.longest_s = max(self.longest_s, now - last)
                last = now
                if len(turn.tokens) > 10:
                    self.begun.set()
        return await turn.result()
