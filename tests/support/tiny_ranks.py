"""A tiny model that ranks share unevenly, an engine over them, and their processes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import msgspec
import psutil

from segue_cloud.engine.options import EngineOptions
from segue_cloud.engine.port import EngineOutput, EngineTurn
from segue_cloud.engine.torch_engine import TorchEngine
from segue_contract.model.manifest import ModelGeometry
from tests.support.tiny_engine import Tiny, make_tiny
from tests.support.tiny_llama import TINY

# As the default model has it: three query heads share each of three KV heads, which 2 ranks cannot
# share evenly; nor can 2 or 3 ranks deal out the other widths in large units.
UNEVEN = msgspec.structs.replace(TINY, hidden=72, heads=9, kv_heads=3, ffn=176, vocab=518)
FP32 = EngineOptions(dtype="fp32", pool_bytes=32 << 20)
NEW = 24
SEED = 31
SIZES = [1, 15, 17, 64, 65, 100, 129, 200, 300, 410]
GONE_S = 60.0  # for a process that was told to end; it takes milliseconds


def tiny_with_replies(directory: Path, geometry: ModelGeometry) -> Tiny:
    return make_tiny(directory, SIZES, NEW, SEED, geometry)


@asynccontextmanager
async def engine_of(tiny: Tiny, ranks: int, **changes: object) -> AsyncIterator[TorchEngine]:
    options = replace(FP32, tensor_parallel=ranks, **changes)  # type: ignore[arg-type]
    others = rank_processes()
    engine = await TorchEngine.load(tiny.directory, tiny.manifest, options)
    children = [child for child in rank_processes() if child not in others]
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
