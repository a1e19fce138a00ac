"""What TLS costs a turn and a link: the same cloud twice, over loopback, in turn."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from msgspec.structs import replace

from segue_contract.kv.frame import encode_frames
from segue_contract.kv.layout import KvBlock, block_ids
from segue_contract.limits import KV_BLOCK_TOKENS, KV_PART_BYTES, MIB
from segue_contract.servers import Valkey
from segue_contract.transport.channel import open_channel
from segue_contract.transport.tls import TlsFiles
from segue_contract.v1 import agent_pb2 as pb
from segue_contract.v1 import agent_pb2_grpc, decode_pb2_grpc
from segue_contract.v1 import decode_pb2 as dpb
from tests.bench.harness import Report
from tests.support.certificates import Authority
from tests.support.cloud_rpc import cloud_rpc
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tiny_edge import MANIFEST, tiny_tokenizer

REPLY = 32
BLOCKS = 32
PROMPT = [5] * (BLOCKS * KV_BLOCK_TOKENS + 1)
# The tiny model with KV as large as the default model's.
MODEL = replace(
    MANIFEST,
    geometry=replace(MANIFEST.geometry, layers=30, kv_heads=3, head_dim=64, context=8192),
)
SIZES = MODEL.geometry.kv
RECIPE = MODEL.edge_recipe.digest
IDS = block_ids(RECIPE, PROMPT)

_Served = tuple[agent_pb2_grpc.AgentStub, decode_pb2_grpc.DecodeStub, ScriptedEngine]


async def tls_rows(report: Report, quick: bool) -> None:
    """A whole turn's time with TLS less that without; and how fast a prompt's KV is there,
    checked and decoded, with TLS over without."""
    rounds, turns, prompts = (1, 5, 1) if quick else (7, 20, 3)
    frames = _frames()
    times: dict[bool, list[float]] = {False: [], True: []}
    speeds: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder:
        authority = Authority(Path(folder))
        files = authority.issue("cloud")
        async with (
            Valkey.start() as valkey,
            _served(valkey, Path(folder), None, None) as plain,
            _served(valkey, Path(folder), files, authority.believed) as secure,
        ):
            for number in range(rounds):
                for tls, served in ((False, plain), (True, secure)):
                    times[tls] += await _turns(served[0], f"bench{number}{tls}", turns)
                    for prompt in range(prompts):
                        turn = f"kv{number}{tls}{prompt}"
                        speeds[tls].append(await _shipped(served, turn, frames))
    with_tls, without = (statistics.median(times[tls]) * 1e3 for tls in (True, False))
    note = f"a turn of {REPLY} tokens, {without:.2f} ms without"
    report.row("tls_turn_overhead_ms", max(0.0, with_tls - without), "ms", 5, "lower", note)
    with_tls, without = (statistics.median(speeds[tls]) for tls in (True, False))
    note = f"of {without / MIB:,.0f} MiB/s of KV without, taken in and decoded"
    report.row("tls_throughput_share", with_tls / without, "", 0.85, "higher", note)


@asynccontextmanager
async def _served(
    valkey: Valkey, folder: Path, tls: TlsFiles | None, believed: TlsFiles | None
) -> AsyncIterator[_Served]:
    engine = ScriptedEngine([ord("a")] * REPLY)
    async with (
        cloud_rpc(
            valkey.url, folder, engine, manifest=MODEL, tokenizer=tiny_tokenizer(), tls=tls
        ) as cloud,
        open_channel(cloud.address, tls=believed) as channel,
    ):
        agent, decode = agent_pb2_grpc.AgentStub(channel), decode_pb2_grpc.DecodeStub(channel)
        yield agent, decode, engine


async def _turns(agent: agent_pb2_grpc.AgentStub, session: str, count: int) -> list[float]:
    """Seconds of each, the first left out."""
    await agent.OpenSession(pb.OpenSessionRequest(session=session, device="phone"))
    seconds = []
    for number in range(count + 1):
        asked = pb.RunTurnRequest(
            session=session, device="phone", turn=f"t{number}", prompt="Hello", max_tokens=REPLY
        )
        began = time.perf_counter()
        async for event in agent.RunTurn(asked):
            if event.WhichOneof("kind") == "ended":
                break
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


async def _shipped(plain_or_tls: _Served, turn: str, frames: bytes) -> float:
    """Bytes a second of a prompt's KV, from the first part until the cloud has all of it."""
    agent, decode, engine = plain_or_tls
    engine.blocks.clear()
    asked = pb.RunTurnRequest(
        session=turn, device="phone", turn=turn, prompt="Hello", max_tokens=REPLY
    )
    await agent.OpenSession(pb.OpenSessionRequest(session=turn, device="phone"))
    begun = await decode.Begin(dpb.BeginRequest(turn=asked))
    spec = dpb.TurnSpec(
        session=turn, device="phone", turn=turn, epoch=begun.epoch, prompt=PROMPT, blocks=IDS,
        recipe=RECIPE, max_tokens=REPLY, sampling=pb.Sampling(), shape="ship", ship_blocks=BLOCKS,
    )  # fmt: skip
    call = decode.Run()
    try:
        await call.write(dpb.RunRequest(open=spec))
        await _until(call, "opened")
        began = time.perf_counter()
        for at in range(0, len(frames), KV_PART_BYTES):
            part = dpb.KvPart(data=frames[at : at + KV_PART_BYTES])
            await call.write(dpb.RunRequest(kv=part))
        await _until(call, "ready")
        return len(frames) / (time.perf_counter() - began)
    finally:
        call.cancel()


async def _until(call: Any, kind: str) -> None:
    while (reply := await call.read()) is not grpc.aio.EOF:
        if reply.WhichOneof("kind") == kind:
            return
    raise RuntimeError(f"the stream ended before {kind}")


def _frames() -> bytes:
    """The prompt's KV, of the default model's size, as an edge sends it."""
    shape = (SIZES.layers, SIZES.kv_heads, KV_BLOCK_TOKENS, SIZES.head_dim)
    random = np.random.default_rng(7)
    k, v = (random.standard_normal(shape).astype(np.float32) for _ in range(2))
    return b"".join(encode_frames(KvBlock(one, RECIPE, k, v), "k8v8") for one in IDS)
