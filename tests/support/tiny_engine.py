"""A tiny model with prompts whose replies Hugging Face gave, and engines over it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from segue_cloud.engine.options import EngineOptions
from segue_cloud.engine.port import EngineTurn
from segue_cloud.engine.runner import Runner
from segue_cloud.engine.torch_engine import TorchEngine
from segue_contract.model.manifest import Manifest, ModelGeometry
from tests.support.tiny_llama import TINY, HfReference, build_tiny_llama

ENDS = frozenset((0, 3))
PAGES = 600

RunnerT = TypeVar("RunnerT", bound=Runner)


@dataclass(frozen=True)
class Tiny:
    """`replies`: up to `new` greedy tokens each, the end token included."""

    directory: Path
    manifest: Manifest
    reference: HfReference
    new: int
    prompts: list[tuple[int, ...]]
    replies: list[list[int]]

    def turn(self, index: int, **changes: object) -> EngineTurn:
        turn = EngineTurn(
            turn=f"t{index}", prompt=self.prompts[index], max_tokens=self.new, end_tokens=ENDS
        )
        return replace(turn, **changes)  # type: ignore[arg-type]

    def turns(self, **changes: object) -> list[EngineTurn]:
        return [self.turn(index, **changes) for index in range(len(self.prompts))]

    def asked(self, sizes: Sequence[int], seed: int) -> Tiny:
        """The same model with other prompts, which no engine has seen."""
        print("prompt seed", seed)
        rng = random.Random(seed)
        vocab = self.manifest.geometry.vocab
        prompts = [tuple(rng.randrange(4, vocab) for _ in range(size)) for size in sizes]
        replies = [self.reference.greedy(prompt, self.new, ENDS) for prompt in prompts]
        assert any(len(reply) == self.new for reply in replies)
        return replace(self, prompts=prompts, replies=replies)


def make_tiny(
    directory: Path, sizes: Sequence[int], new: int, seed: int, geometry: ModelGeometry = TINY
) -> Tiny:
    """`sizes`: tokens of each prompt, which are drawn by `seed`."""
    manifest = build_tiny_llama(directory, geometry=geometry)
    reference = HfReference(directory, manifest)
    return Tiny(directory, manifest, reference, new, [], []).asked(sizes, seed)


@asynccontextmanager
async def engine_with(
    runner: type[RunnerT], tiny: Tiny, options: EngineOptions, pages: int = PAGES
) -> AsyncIterator[tuple[TorchEngine, RunnerT]]:
    """An engine whose steps that kind of runner computes, and the runner."""
    built: list[RunnerT] = []

    def build() -> RunnerT:
        built.append(runner(tiny.directory, tiny.manifest.geometry, pages, options))
        return built[0]

    engine = TorchEngine(tiny.manifest, options, pages, build)
    await engine.start()
    try:
        yield engine, built[0]
    finally:
        await engine.close()
        engine.check_integrity()


async def replies_of(engine: TorchEngine, turns: Sequence[EngineTurn]) -> list[list[int]]:
    """The tokens of turns that run at once."""

    async def one(turn: EngineTurn) -> list[int]:
        return [token async for output in engine.submit(turn) for token in output.tokens]

    return await asyncio.gather(*(one(turn) for turn in turns))
