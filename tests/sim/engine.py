"""A decode engine whose every token is known, at the pace of a real one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from random import Random

from segue_cloud.engine.domains import OPEN
from segue_cloud.engine.port import EngineOutput, EngineStats, EngineTurn
from segue_contract.kv.layout import KvBlock
from segue_contract.sync.ops import Sampling
from tests.sim.world import World
from tests.support.tiny_edge import END, next_token

_STEP_S = (0.01, 0.06)


def reply(prompt: Sequence[int], sampling: Sampling, max_tokens: int) -> tuple[int, ...]:
    """What any decoder makes of this prompt."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_tokens:
        token = next_token(tokens)
        if token == END:
            break
        tokens.append(token)
    return tuple(tokens[len(prompt) :])


class SimEngine:
    """The engine port over `next_token`, which follows from all tokens before it."""

    def __init__(self, world: World) -> None:
        self._rng: Random = world.rng(f"engine {world.loop.steps}")
        self._blocks: dict[bytes, KvBlock] = {}
        self._running = 0
        self.died = asyncio.Event()

    async def submit(self, turn: EngineTurn) -> AsyncIterator[EngineOutput]:
        self._running += 1
        try:
            tokens = [*turn.prompt, *turn.made]
            for index in range(len(turn.made), turn.max_tokens):
                await asyncio.sleep(self._rng.uniform(*_STEP_S))
                tokens.append(next_token(tokens))
                last = index + 1 == turn.max_tokens
                yield EngineOutput(index, (tokens[-1],), "length" if last else "")
        finally:
            self._running -= 1

    async def offer_blocks(self, blocks: Sequence[KvBlock], domain: bytes = OPEN) -> int:
        assert domain == OPEN, "an open loopback tells nobody apart"
        self._blocks.update((block.id, block) for block in blocks)
        return len(blocks)

    def have_blocks(self, ids: Sequence[bytes], domains: Sequence[bytes] = (OPEN,)) -> int:
        assert tuple(domains) == (OPEN,), "an open loopback tells nobody apart"
        return next((n for n, one in enumerate(ids) if one not in self._blocks), len(ids))

    async def computed_block(self, turn: EngineTurn) -> KvBlock | None:
        return None

    def stats(self) -> EngineStats:
        return EngineStats(self._running, 0, 100, 100, 0.0, 1000.0, 0.05, 0, 0)

    async def close(self) -> None:
        return None
