"""A tiny model that ranks share unevenly, an engine over them, and their processes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import psutil

from segue_cloud.engine.options import EngineOptions
from segue_cloud.engine.port import EngineOutput, EngineTurn
from segue_cloud.engine.worker import TorchEngine
from segue_contract.model.manifest import Manifest, ModelGeometry
from tests.support.tiny_llama import TINY, HfReference, build_tiny_llama

# As the default model has it: three query heads share each of three KV heads, which 2 ranks cannot
# share evenly; nor can 2 or 3 ranks deal out the other widths in large units.
UNEVEN = msgspec.structs.replace(TINY, hidden=72, heads=9, kv_heads=3, ffn=176, vocab=518)
FP32 = EngineOptions(dtype="fp32", pool_bytes=32 << 20)
ENDS = frozenset((0, 3))
NEW = 24
SEED = 31
SIZES = [1, 15, 17, 64, 65, 100, 129, 200, 300, 410]
GONE_S = 60.0  # for a process that was told to end; it takes milliseconds


@dataclass(frozen=True)
class Tiny:
    directory: Path
    manifest: Manifest
    prompts: list[tuple[int, ...]]
    replies: list[list[int]]
    reference: HfReference

    def turn(self, index: int, **changes: object) -> EngineTurn:
        turn = EngineTurn(
            turn=f"t{index}", prompt=self.prompts[index], max_tokens=NEW, end_tokens=ENDS
        )
        return replace(turn, **changes)  # type: ignore[arg-type]

    @property
    def turns(self) -> list[EngineTurn]:
        return [self.turn(index) for index in range(len(self.prompts))]


def tiny_with_replies(directory: Path, geometry: ModelGeometry) -> Tiny:
    manifest = build_tiny_llama(directory, geometry=geometry)
    reference = HfReference(directory, manifest)
    print("prompt seed", SEED)
    rng = random.Random(SEED)
    prompts = [tuple(rng.randrange(4, geometry.vocab) for _ in range(size)) for size in SIZES]
    replies = [reference.greedy(prompt, NEW, ENDS) for prompt in prompts]
    assert any(len(reply) == NEW for reply in replies)
    return Tiny(directory, manifest, prompts, replies, reference)


@asynccontextmanager
async def engine_of(tiny: Tiny, ranks: int, **changes: object) -> AsyncIterator[TorchEngine]:
    options = replace(FP32, tensor_parallel=ranks, **changes)  # type: ignore[arg-type]
    engine = await TorchEngine.load(tiny.directory, tiny.manifest, options)
    children = rank_processes()
    assert len(children) == ranks - 1
    try:
        yield engine
    finally:
        await engine.close()
        engine.check_integrity()
        assert psutil.wait_procs(children, GONE_S)[1] == []


def rank_processes(parent: int | None = None) -> list[psutil.Process]:
    children = psutil.Process(parent).children(recursive=True)
    return [child for child in children if "tensor_parallel.rank" in " ".join(child.cmdline())]


async def collect(engine: TorchEngine, turn: EngineTurn) -> tuple[list[int], list[EngineOutput]]:
    outputs = [output async for output in engine.submit(turn)]
    return [token for output in outputs for token in output.tokens], outputs


async def all_replies(engine: TorchEngine, turns: Sequence[EngineTurn]) -> list[list[int]]:
    return [tokens for tokens, _ in await asyncio.gather(*(collect(engine, t) for t in turns))]
