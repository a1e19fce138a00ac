"""Ranks: how a model is cut, what is refused, and that none is left behind or waited for."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest
import torch

from segue_cloud.cli import load_settings
from segue_cloud.engine.options import EngineOptions, rank_threads
from segue_cloud.engine.tensor_parallel.group import Group
from segue_cloud.engine.tensor_parallel.lead import LeadRunner
from segue_cloud.engine.tensor_parallel.messages import Array, Control, Failed, WriteBlock
from segue_cloud.engine.tensor_parallel.ranks import Ranks
from segue_cloud.engine.tensor_parallel.split import split
from segue_cloud.engine.torch_engine import TorchEngine
from segue_contract.errors import BadLength, EngineGone, InvalidArgument, ModelMismatch, RankLost
from tests.support.tiny_engine import Tiny
from tests.support.tiny_llama import TINY, WEIGHTS, build_tiny_llama
from tests.support.tiny_ranks import (
    FP32,
    GONE_S,
    SEED,
    UNEVEN,
    collect,
    engine_of,
    rank_processes,
    tiny_with_replies,
)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_with_replies(tmp_path_factory.mktemp("uneven"), UNEVEN)


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


# -- what ranks say to each other -----------------------------------------------------------------


def test_bytes_become_a_message_or_a_typed_error() -> None:
    ours, theirs = socket.socketpair()
    control = Control(1, ours)
    numbers = np.arange(6, dtype=np.int64).reshape(2, 3)
    with theirs:
        Control(0, theirs).send(WriteBlock((1, 2), Array.of(numbers), Array.of(numbers[:0])))
        message = control.receive(GONE_S)
        assert isinstance(message, WriteBlock)
        assert np.array_equal(message.k.numpy(), numbers)
        assert message.v.numpy().shape == (0, 3)
        Control(0, theirs).send(Failed(ModelMismatch("It differs.").to_bytes()))
        with pytest.raises(ModelMismatch, match="It differs"):
            control.receive(GONE_S)
        theirs.sendall((1 << 50).to_bytes(8, "little"))
        with pytest.raises(RankLost, match="announced"):
            control.receive(GONE_S)
        theirs.sendall((3).to_bytes(8, "little") + b"abc")
        with pytest.raises(RankLost):
            control.receive(GONE_S)
        with pytest.raises(RankLost, match="does not answer"):
            control.receive(0.05)
    with pytest.raises(RankLost, match="is gone"):
        control.receive(GONE_S)
    control.close()


@pytest.mark.parametrize(
    "array",
    [
        Array("int64", (2, 2), bytes(24)),
        Array("int64", (-1, -1), bytes(8)),
        Array("object", (1,), bytes(8)),
        Array("float32", (2**40, 2**40), b""),
        Array("float32", (1,), bytes(3)),
    ],
)
def test_arrays_whose_bytes_do_not_fit_are_refused(array: Array) -> None:
    with pytest.raises(BadLength):
        array.numpy()


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
            with pytest.raises(EngineGone, match="The engine died"):
                async for _ in stream:
                    pass
        await asyncio.wait_for(engine.died.wait(), GONE_S)
        with pytest.raises(EngineGone):
            engine.submit(uneven.turn(0))


async def test_a_rank_killed_while_nobody_asks_is_noticed(uneven: Tiny) -> None:
    async with engine_of(uneven, 2) as engine:
        await collect(engine, uneven.turn(3))
        rank_processes()[0].kill()
        await asyncio.wait_for(engine.died.wait(), GONE_S)
        with pytest.raises(EngineGone):
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
                ranks=ranks,
            ).warm_up(1)
    finally:
        await ranks.stop()


async def test_closing_in_mid_turn_ends_turn_and_ranks(uneven: Tiny) -> None:
    async with engine_of(uneven, 2) as engine:
        stream = engine.submit(uneven.turn(2, max_tokens=500, end_tokens=frozenset()))
        await anext(stream)
        await engine.close()
        with pytest.raises(EngineGone, match="shut down"):
            async for _ in stream:
                pass


_PROGRAM = """
import asyncio, sys
from dataclasses import replace
from pathlib import Path
from segue_cloud.engine.options import EngineOptions
from segue_cloud.engine.torch_engine import TorchEngine
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
