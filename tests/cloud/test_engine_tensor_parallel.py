"""One model over several processes: the tokens of one process, and no process left behind."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest
import torch

from segue_cloud.cli import load_settings
from segue_cloud.engine.options import EngineOptions, rank_threads
from segue_cloud.engine.port import EngineOutput, EngineTurn
from segue_cloud.engine.tensor_parallel.group import Group
from segue_cloud.engine.tensor_parallel.lead import LeadRunner
from segue_cloud.engine.tensor_parallel.ranks import Ranks
from segue_cloud.engine.tensor_parallel.split import split
from segue_cloud.engine.worker import TorchEngine
from segue_contract.chat.tokenizer import ChatTokenizer
from segue_contract.errors import InvalidArgument, ModelMismatch, RankLost, TurnFailed
from segue_contract.kv.layout import KvBlock, block_ids
from segue_contract.model.manifest import Manifest, ModelGeometry, read_manifest
from segue_contract.sync.ops import Sampling
from tests.support.tiny_llama import TINY, WEIGHTS, HfReference, build_tiny_llama

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


def _tiny(directory: Path, geometry: ModelGeometry) -> Tiny:
    manifest = build_tiny_llama(directory, geometry=geometry)
    reference = HfReference(directory, manifest)
    print("prompt seed", SEED)
    rng = random.Random(SEED)
    prompts = [tuple(rng.randrange(4, geometry.vocab) for _ in range(size)) for size in SIZES]
    replies = [reference.greedy(prompt, NEW, ENDS) for prompt in prompts]
    assert any(len(reply) == NEW for reply in replies)
    return Tiny(directory, manifest, prompts, replies, reference)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return _tiny(tmp_path_factory.mktemp("uneven"), UNEVEN)


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return _tiny(tmp_path_factory.mktemp("even"), TINY)


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


# -- the same tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 3])
async def test_alone_batched_and_sampled_equal_one_rank(uneven: Tiny, ranks: int) -> None:
    rule = Sampling(temperature=1.3, top_p=0.95, top_k=200, seed=5)
    sampled = [uneven.turn(i, turn=f"s{i}", sampling=rule) for i in range(4)]
    async with engine_of(uneven, 1) as engine:
        assert await all_replies(engine, uneven.turns) == uneven.replies
        expected = await all_replies(engine, sampled)
    async with engine_of(uneven, ranks) as engine:
        alone = [(await collect(engine, turn))[0] for turn in uneven.turns[:4]]
        assert alone == uneven.replies[:4]
        assert await all_replies(engine, [*uneven.turns, *sampled]) == [*uneven.replies, *expected]


@pytest.mark.parametrize(
    "changes",
    [{}, {"ahead": True}, {"step_tokens": 64, "mixed_tokens": 64, "max_batch": 4}],
    ids=["all", "ahead", "small-chunks"],
)
async def test_plain_torch_over_an_even_split(even: Tiny, changes: dict[str, object]) -> None:
    async with engine_of(even, 2, compiled=False, **changes) as engine:
        assert await all_replies(engine, even.turns) == even.replies


async def test_a_window_hides_the_same_tokens_on_every_rank(uneven: Tiny) -> None:
    replies = []
    for ranks in (1, 2):
        async with engine_of(uneven, ranks, window=48, sinks=2, step_tokens=96) as engine:
            replies.append(await all_replies(engine, uneven.turns))
    assert replies[0] == replies[1]
    assert replies[0] != uneven.replies, "the window has no effect"


async def test_shipped_blocks_reach_every_rank(uneven: Tiny) -> None:
    recipe = uneven.manifest.edge_recipe
    async with engine_of(uneven, 2) as engine:
        turns, hits = [], []
        for index, prompt in enumerate(uneven.prompts):
            blocks = uneven.reference.blocks(prompt, recipe)
            assert await engine.offer_blocks(blocks) == len(blocks)
            turns.append(uneven.turn(index, prompt_blocks=tuple(block.id for block in blocks)))
            hits.append((len(prompt) - 1) // 64 * 64)
        results = await asyncio.gather(*(collect(engine, turn) for turn in turns))
    assert [tokens for tokens, _ in results] == uneven.replies
    assert [outputs[0].cached_tokens for _, outputs in results] == hits


async def test_wrong_shipped_numbers_are_really_used(uneven: Tiny) -> None:
    """What the test above relies on: each rank attends over what was shipped to it."""
    async with engine_of(uneven, 3) as engine:
        for head, index in enumerate((7, 8, 9)):
            blocks = uneven.reference.blocks(uneven.prompts[index], uneven.manifest.edge_recipe)
            for block in blocks:
                spoilt = block.v.copy()
                spoilt[:, head] *= -3.0
                await engine.offer_blocks([replace(block, v=spoilt)])
            turn = uneven.turn(index, prompt_blocks=tuple(block.id for block in blocks))
            assert (await collect(engine, turn))[0] != uneven.replies[index]


async def test_a_follow_up_reuses_prompt_and_reply(uneven: Tiny) -> None:
    prompt, reply = uneven.prompts[9], uneven.replies[9]
    follow_up = (*prompt, *reply, 9, 8, 7)
    expected = uneven.reference.greedy(follow_up, NEW, ENDS)
    async with engine_of(uneven, 2) as engine:
        await collect(engine, uneven.turn(9))
        tokens, outputs = await collect(engine, uneven.turn(9, turn="next", prompt=follow_up))
    assert tokens == expected
    assert outputs[0].cached_tokens == (len(prompt) + len(reply) - 1) // 64 * 64 > 0


async def test_blocks_come_back_from_the_host_tier(uneven: Tiny) -> None:
    rng = random.Random(SEED + 1)
    prompts = [tuple(rng.randrange(4, 512) for _ in range(300)) for _ in range(16)]
    turns = [EngineTurn(f"h{i}", prompt, max_tokens=8) for i, prompt in enumerate(prompts)]
    # A pool of some 1,200 tokens: a quarter of what is asked for.
    small = {"pool_bytes": 1200 * 768, "host_bytes": 32 << 20}
    replies = []
    for ranks in (1, 2):
        async with engine_of(uneven, ranks, **small) as engine:
            first = await asyncio.gather(*(collect(engine, turn) for turn in turns))
            tier = engine.tier
            assert tier is not None
            tier.recompute_s = lambda: 0.0  # about what comes back, not about when it pays
            again = [await collect(engine, turn) for turn in turns]
            assert tier.brought_blocks > 0
            assert all(outputs[0].cached_tokens == 256 for _, outputs in again)
        replies.append([tokens for tokens, _ in [*first, *again]])
    assert replies[0] == replies[1]


async def test_a_block_is_read_as_it_was_written(uneven: Tiny) -> None:
    g = UNEVEN.kv
    numbers = np.random.default_rng(SEED)
    shape = (2, 2, g.layers, g.kv_heads, 64, g.head_dim)
    (k, v), (k2, v2) = numbers.standard_normal(shape, np.float32)
    options = replace(FP32, tensor_parallel=3, compiled=False)
    shards = split(UNEVEN, 3)
    ranks = await Ranks.start(3, "cpu")
    try:
        lead = LeadRunner(
            uneven.directory,
            UNEVEN,
            64,
            options,
            shards=shards,
            controls=ranks.controls,
            group=ranks.group,
            folder=ranks.folder,
        )
        lead.warm_up(1)
        lead.write_block([9, 3, 20, 7], KvBlock(b"a", "", k, v))
        lead.write_block([1, 2, 4, 40], KvBlock(b"b", "", k2, v2))
        for pages, expected in (([9, 3, 20, 7], (k, v)), ([1, 2, 4, 40], (k2, v2))):
            read = lead.pages.read_block(pages)
            assert np.array_equal(read[0], expected[0])
            assert np.array_equal(read[1], expected[1])
    finally:
        await ranks.stop()


# -- how a model is cut ---------------------------------------------------------------------------


def test_every_head_column_and_row_belongs_to_one_rank() -> None:
    print("split seed", SEED)
    rng = random.Random(SEED)
    for _ in range(300):
        kv_heads = rng.randint(1, 16)
        geometry = msgspec.structs.replace(
            TINY,
            kv_heads=kv_heads,
            heads=kv_heads * rng.randint(1, 5),
            ffn=rng.randint(64, 20_000),
            vocab=rng.randint(64, 200_000),
        )
        ranks = rng.randint(1, kv_heads)
        shards = split(geometry, ranks)
        for name in ("kv_heads", "ffn", "vocab"):
            spans = [getattr(shard, name) for shard in shards]
            assert [span.start for span in spans] == [0, *(span.end for span in spans[:-1])]
            assert spans[-1].end == getattr(geometry, name)
            sizes = [span.size for span in spans]
            assert min(sizes) > 0
            if name != "kv_heads":
                assert max(sizes) <= 1.25 * min(sizes) or max(sizes) - min(sizes) == 1
        parts = [shard.geometry(geometry) for shard in shards]
        assert sum(part.heads for part in parts) == geometry.heads
        assert {part.heads // part.kv_heads for part in parts} == {geometry.heads // kv_heads}


def test_the_default_models_shapes_are_cut_in_wide_units() -> None:
    smollm2 = msgspec.structs.replace(TINY, heads=9, kv_heads=3, ffn=1536, vocab=49152)
    two = split(smollm2, 2)
    assert [shard.kv_heads.size for shard in two] == [1, 2]
    assert [shard.ffn.size for shard in two] == [768, 768]
    assert [shard.vocab.size for shard in two] == [24576, 24576]
    assert [shard.ffn.size for shard in split(smollm2, 3)] == [512, 512, 512]


@pytest.mark.parametrize(
    ("threads", "ranks", "expected"), [(2, 2, [1, 1]), (7, 3, [2, 2, 3]), (1, 3, [1, 1, 1])]
)
def test_threads_are_divided(threads: int, ranks: int, expected: list[int]) -> None:
    options = EngineOptions(threads=threads, tensor_parallel=ranks)
    assert [rank_threads(options, rank) for rank in range(ranks)] == expected


# -- refusals -------------------------------------------------------------------------------------


async def test_more_ranks_than_kv_heads_are_refused(uneven: Tiny) -> None:
    with pytest.raises(InvalidArgument, match="from 1 to 3") as caught:
        await TorchEngine.load(uneven.directory, uneven.manifest, replace(FP32, tensor_parallel=4))
    assert caught.value.fields["most"] == 3
    assert rank_processes() == []


@pytest.mark.parametrize("ranks", [0, -1, 65])
def test_numbers_that_are_none_are_refused(ranks: int) -> None:
    with pytest.raises(InvalidArgument, match="tensor_parallel"):
        EngineOptions(tensor_parallel=ranks)


async def test_bad_weights_are_named_and_leave_no_process(tmp_path: Path) -> None:
    manifest = build_tiny_llama(tmp_path)
    data = bytearray((tmp_path / WEIGHTS).read_bytes())
    data[-4:] = b"\xff\xff\xff\xff"  # a NaN in the last tensor
    (tmp_path / WEIGHTS).write_bytes(data)
    with pytest.raises(ModelMismatch, match="not finite"):
        await TorchEngine.load(tmp_path, manifest, replace(FP32, tensor_parallel=2))
    assert rank_processes() == []


def test_the_command_line_and_the_environment_set_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings({}).tensor_parallel == 1
    monkeypatch.setenv("SEGUE_CLOUD_TENSOR_PARALLEL", "3")
    assert load_settings({}).tensor_parallel == 3
    assert load_settings({"tensor_parallel": 2}).tensor_parallel == 2
    with pytest.raises(InvalidArgument, match="tensor_parallel"):
        load_settings({"tensor_parallel": 0})


# -- ends -----------------------------------------------------------------------------------------


async def test_a_rank_killed_in_mid_turn_fails_the_turns(uneven: Tiny) -> None:
    async with engine_of(uneven, 2) as engine:
        (child,) = rank_processes()
        turns = [
            uneven.turn(i, turn=f"long{i}", max_tokens=500, end_tokens=frozenset())
            for i in range(4)
        ]
        streams = [engine.submit(turn) for turn in turns]
        for stream in streams:
            await anext(stream)
        child.kill()
        for stream in streams:
            with pytest.raises(TurnFailed, match="The engine died"):
                async for _ in stream:
                    pass
        await asyncio.wait_for(engine.died.wait(), GONE_S)
        with pytest.raises(TurnFailed):
            engine.submit(uneven.turn(0))


async def test_a_rank_killed_while_nobody_asks_is_noticed(uneven: Tiny) -> None:
    async with engine_of(uneven, 2) as engine:
        await collect(engine, uneven.turn(3))
        rank_processes()[0].kill()
        await asyncio.wait_for(engine.died.wait(), GONE_S)
        with pytest.raises(TurnFailed):
            engine.submit(uneven.turn(0))


async def test_a_rank_killed_before_it_loaded_is_named(uneven: Tiny) -> None:
    shards = split(UNEVEN, 2)
    ranks = await Ranks.start(2, "cpu")
    try:
        (child,) = rank_processes()
        child.kill()
        with pytest.raises(RankLost, match="Rank 1 is gone"):
            LeadRunner(
                uneven.directory,
                UNEVEN,
                64,
                replace(FP32, tensor_parallel=2, compiled=False),
                shards=shards,
                controls=ranks.controls,
                group=ranks.group,
                folder=ranks.folder,
            ).warm_up(1)
    finally:
        await ranks.stop()


async def test_closing_in_mid_turn_ends_turn_and_ranks(uneven: Tiny) -> None:
    async with engine_of(uneven, 3) as engine:
        stream = engine.submit(uneven.turn(2, max_tokens=500, end_tokens=frozenset()))
        await anext(stream)
        await engine.close()
        with pytest.raises(TurnFailed, match="shut down"):
            async for _ in stream:
                pass


_PROGRAM = """
import asyncio, sys
from dataclasses import replace
from pathlib import Path
from segue_cloud.engine.options import EngineOptions
from segue_cloud.engine.worker import TorchEngine
from segue_contract.model.manifest import read_manifest

async def main():
    directory = Path(sys.argv[1])
    options = EngineOptions(dtype="fp32", pool_bytes=32 << 20, tensor_parallel=2)
    await TorchEngine.load(directory, read_manifest(directory), options)
    print("loaded", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def test_ranks_die_with_a_killed_parent(uneven: Tiny) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, str(uneven.directory)], stdout=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None
        lines = iter(program.stdout)
        assert any(line.strip() == "loaded" for line in lines)
        children = rank_processes(program.pid)
        assert len(children) == 1
        assert not any(Path(word).exists() for word in children[0].cmdline() if "segue-" in word)
        os.kill(program.pid, signal.SIGKILL)
        assert psutil.wait_procs(children, GONE_S)[1] == []


def test_a_silent_rank_is_lost_in_bounded_time(tmp_path: Path) -> None:
    groups = [Group(rank, 2, "cpu", timeout_s=0.5) for rank in range(2)]
    other = threading.Thread(target=groups[1].connect, args=(tmp_path,))
    other.start()
    groups[0].connect(tmp_path)
    other.join()
    with pytest.raises(RankLost, match="Rank 0 lost another rank"):
        groups[0].sum(torch.ones(1, 4))


def test_ranks_that_never_meet_are_lost_in_bounded_time(tmp_path: Path) -> None:
    with pytest.raises(RankLost, match="did not find each other"):
        Group(0, 2, "cpu").connect(tmp_path, timeout_s=0.5)


# -- the default model ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_the_default_model_over_two_ranks(model_dir: Path) -> None:
    manifest = read_manifest(model_dir)
    tokenizer = ChatTokenizer.load(model_dir, manifest)
    questions = ["Plan a day in Paris.", "Who wrote Hamlet?", "Name three rivers. " * 20]
    prompts = [tuple(tokenizer.encode_conversation([], question)) for question in questions]
    ends = frozenset(manifest.end_tokens)
    reference = HfReference(model_dir, manifest)
    blocks = reference.blocks(prompts[2], manifest.edge_recipe)
    assert [block.id for block in blocks] == block_ids(manifest.edge_recipe.digest, prompts[2])
    options = EngineOptions(dtype="fp32", pool_bytes=256 << 20, tensor_parallel=2)
    engine = await TorchEngine.load(model_dir, manifest, options)
    try:
        assert await engine.offer_blocks(blocks) == len(blocks) > 0
        shipped = tuple(block.id for block in blocks)
        turns = [
            EngineTurn(
                turn=f"q{i}",
                prompt=prompt,
                max_tokens=NEW,
                end_tokens=ends,
                prompt_blocks=shipped if i == 2 else (),
            )
            for i, prompt in enumerate(prompts)
        ]
        replies = await all_replies(engine, turns)
    finally:
        await engine.close()
    engine.check_integrity()
    for prompt, reply in zip(prompts, replies, strict=True):
        assert reference.confirms(prompt, reply, NEW, ends)
