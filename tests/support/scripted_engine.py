"""An engine that says what a test told it to: for tests of turns, without torch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from segue_cloud.engine.domains import OPEN, named
from segue_cloud.engine.port import EngineOutput, EngineStats, EngineTurn
from segue_contract.errors import SegueError
from segue_contract.kv.layout import KvBlock


class ScriptedEngine:
    """Decodes `script` one token at a time; each needs one `allow()` unless `free`.

    The reply's token at index i is `script[i]`, whoever made the ones before.
    """

    def __init__(self, script: Sequence[int], *, free: bool = True) -> None:
        self.script = tuple(script)
        self.turns: list[EngineTurn] = []
        self.cancelled = 0
        self.decoded = 0  # tokens, of all turns
        self.fail_at: tuple[int, SegueError] | None = None
        self.blocks: dict[bytes, KvBlock] = {}
        self.died = asyncio.Event()
        self.stalled = False
        self.computed: KvBlock | None = None  # what it says that it computed itself
        self.waiting = 0  # how many turns wait for a place in the batch, it says
        self.queue_s = 0.0
        self._free = free
        self._allowed = asyncio.Semaphore(0)

    def hold(self) -> None:
        """From now on each token needs its `allow`."""
        self._free = False

    def allow(self, tokens: int) -> None:
        for _ in range(tokens):
            self._allowed.release()

    async def submit(self, turn: EngineTurn) -> AsyncIterator[EngineOutput]:
        self.turns.append(turn)
        done = False
        try:
            for index in range(len(turn.made), min(len(self.script), turn.max_tokens)):
                if self.fail_at is not None and index == self.fail_at[0]:
                    raise self.fail_at[1]
                if not self._free:
                    await self._allowed.acquire()
                await asyncio.sleep(0)
                last = index + 1 == min(len(self.script), turn.max_tokens)
                reason = ("length" if index + 1 == turn.max_tokens else "stop") if last else ""
                done = last
                self.decoded += 1
                yield EngineOutput(index, (self.script[index],), reason)
        finally:
            if not done:
                self.cancelled += 1

    async def offer_blocks(self, blocks: Sequence[KvBlock], domain: bytes = OPEN) -> int:
        self.blocks.update((named(domain, block.id), block) for block in blocks)
        return len(blocks)

    def have_blocks(self, ids: Sequence[bytes], domains: Sequence[bytes] = (OPEN,)) -> int:
        has = [any(named(domain, one) in self.blocks for domain in domains) for one in ids]
        return has.index(False) if False in has else len(has)

    async def computed_block(self, turn: EngineTurn) -> KvBlock | None:
        return self.computed

    def stats(self) -> EngineStats:
        return EngineStats(
            0, self.waiting, 100, 100, self.queue_s, 1000.0, 0.01, 0, 0, self.stalled
        )

    async def close(self) -> None:
        return None
