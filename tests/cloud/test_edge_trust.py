"""What an edge ships is for its own turns until some was computed again. A real server and log,
with certificates' names and tokens as the gate is told of them, and the real engine for checks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from segue_cloud.engine.options import EngineOptions
from segue_cloud.engine.torch_engine import TorchEngine
from segue_cloud.tenants.trust import EdgeTrust
from segue_cloud.turns.spot_checks import Shipped, SpotChecks
from segue_contract.kv.frame import encode_frames
from segue_contract.kv.layout import BLOCK_TOKENS, KvBlock, block_ids
from segue_contract.kv.quantize import decode_block, encode_block
from segue_contract.kv.steps import codec_named
from segue_contract.limits import KV_CHECKS_TRUSTED
from segue_contract.servers import Valkey
from segue_contract.transport.bearer import bearer
from segue_contract.transport.gate import Gate
from segue_contract.v1 import agent_pb2 as pb
from segue_contract.v1 import decode_pb2 as dpb
from tests.support.cloud_rpc import CloudRpc, cloud_rpc
from tests.support.principals import KnownTokens
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tiny_edge import MANIFEST, tiny_tokenizer
from tests.support.tiny_engine import Tiny, make_tiny

NODE = "x-test-node"  # stands for the certificate of the connection
ONE, TWO = "edge/here/one", "edge/there/two"
PROMPT = list(range(1, 2 * BLOCK_TOKENS + 20))
WAIT_S = 20.0


@dataclass
class Place:
    cloud: CloudRpc
    tokens: KnownTokens
    trust: EdgeTrust
    turns: int = 0

    def said(self, tenant: str, edge: str) -> tuple[tuple[str, str], ...]:
        return (*(bearer(self.tokens.device(tenant)) or ()), (NODE, edge))

    async def run(self, tenant: str, edge: str, *, ship: bool = False) -> tuple[int, list[str]]:
        """Blocks that the cloud says it has, and the recipes that it takes of the edge; with `ship`
        all blocks are sent, until the cloud is ready."""
        self.turns += 1
        turn, said = f"t{self.turns}", self.said(tenant, edge)
        session = f"s{self.turns}"
        agent, decode = self.cloud.agent, self.cloud.decode
        open_ = pb.OpenSessionRequest(session=session, device="phone")
        await agent.OpenSession(open_, timeout=WAIT_S, metadata=said)
        asked = pb.RunTurnRequest(
            session=session, device="phone", turn=turn, prompt="Hello", max_tokens=5
        )
        begun = await decode.Begin(dpb.BeginRequest(turn=asked), timeout=WAIT_S, metadata=said)
        recipe = MANIFEST.edge_recipe.digest
        ids = block_ids(recipe, PROMPT)
        spec = dpb.TurnSpec(
            session=session, device="phone", turn=turn, epoch=begun.epoch, prompt=PROMPT,
            blocks=ids, recipe=recipe, max_tokens=5, sampling=pb.Sampling(), shape="ship",
            ship_blocks=len(ids),
        )  # fmt: skip
        call = decode.Run(timeout=WAIT_S, metadata=said)
        try:
            await call.write(dpb.RunRequest(open=spec))
            opened = await _next(call, "opened")
            if ship:
                for data in _kv(ids):
                    await call.write(dpb.RunRequest(kv=dpb.KvPart(data=data)))
                await _next(call, "ready")
            return opened.opened.have_blocks, list(opened.opened.facts.recipes)
        finally:
            call.cancel()


async def _next(call: Any, kind: str) -> Any:
    while (reply := await call.read()) is not grpc.aio.EOF:
        if reply.WhichOneof("kind") == kind:
            return reply
    raise AssertionError(f"the stream ended before {kind}")


def _kv(ids: list[bytes]) -> list[bytes]:
    recipe, sizes = MANIFEST.edge_recipe, MANIFEST.geometry.kv
    shape = (sizes.layers, sizes.kv_heads, BLOCK_TOKENS, sizes.head_dim)
    random = np.random.default_rng(7)
    codec = codec_named(recipe.codec)
    frames = []
    for index, one in enumerate(ids):
        k, v = (random.standard_normal(shape).astype(np.float32) for _ in range(2))
        block = KvBlock(one, recipe.digest, k, v)
        frames.append(encode_frames(block, codec.step.name, sink_tokens=codec.sinks_of(index)))
    return frames


@pytest.fixture
async def here(valkey: Valkey, tmp_path: Path) -> AsyncIterator[Place]:
    tokens = KnownTokens()
    trust = EdgeTrust(keyed=True, chance=lambda: 0.0, monotonic=time.monotonic)
    gate = Gate(
        "default",
        tokens,
        peer_name=lambda context: dict(context.invocation_metadata()).get(NODE, ""),
    )
    async with cloud_rpc(
        valkey.url, tmp_path, ScriptedEngine([*b"words"]), manifest=MANIFEST,
        tokenizer=tiny_tokenizer(), gate=gate, trust=trust,
    ) as cloud:  # fmt: skip
        yield Place(cloud, tokens, trust)


async def test_have_blocks_tells_nobody_of_others(here: Place) -> None:
    assert (await here.run("acme", ONE, ship=True))[0] == 0
    assert (await here.run("acme", ONE))[0] == 2
    assert (await here.run("other", ONE))[0] == 0, "another tenant's"
    assert (await here.run("acme", TWO))[0] == 0, "an edge's that nobody checked"
    for _ in range(KV_CHECKS_TRUSTED):
        here.trust.found(ONE, right=True)
    assert (await here.run("acme", ONE))[0] == 2, "its own are there as before"
    here.cloud.engine.blocks.clear()
    assert (await here.run("acme", ONE, ship=True))[0] == 0
    assert (await here.run("acme", TWO))[0] == 2
    assert (await here.run("other", TWO))[0] == 0
    last = here.cloud.engine.turns[-1]
    assert last.domains == here.trust.domains(last.tenant, TWO)


async def test_an_edge_whose_block_is_wrong_ships_nothing_more(here: Place) -> None:
    """The engine says that it computed zeros: what the edge shipped is none of that."""
    sizes = MANIFEST.geometry.kv
    shape = (sizes.layers, sizes.kv_heads, BLOCK_TOKENS, sizes.head_dim)
    zeros = np.zeros(shape, np.float32)
    here.cloud.engine.computed = KvBlock(b"", "", zeros, zeros)
    have, recipes = await here.run("acme", ONE, ship=True)
    assert (have, recipes) == (0, sorted(MANIFEST.allowed_recipes()))
    async with asyncio.timeout(WAIT_S):
        while not here.trust.refuses(ONE):  # noqa: ASYNC110 - nothing else says when
            await asyncio.sleep(0.01)
    assert here.trust.checks["wrong"] >= 1
    there = dict(here.cloud.engine.blocks)
    have, recipes = await here.run("acme", ONE, ship=True)
    assert (have, recipes) == (2, []), "nothing is asked of it, and no recipe is taken"
    assert here.cloud.engine.blocks == there, "what it sends all the same goes nowhere"
    assert (await here.run("acme", TWO))[1] == sorted(MANIFEST.allowed_recipes())


async def test_a_check_has_the_weight_of_its_tenant() -> None:
    """The engine shares by the weight that it saw last of a tenant."""
    engine, shape = ScriptedEngine([7]), (1, 1, BLOCK_TOKENS, 2)
    trust = EdgeTrust(keyed=True, chance=lambda: 0.0, monotonic=time.monotonic)
    checks = SpotChecks(engine, trust, {"acme": 0.01, "other": 4.0}.__getitem__)
    block = KvBlock(b"", "", np.zeros(shape, np.float32), np.zeros(shape, np.float32))
    for tenant in ("acme", "other"):
        await checks.check(Shipped(ONE, tenant, tuple(range(BLOCK_TOKENS)), block))
    assert [(turn.tenant, turn.weight) for turn in engine.turns] == [("acme", 0.01), ("other", 4.0)]


# -- the check itself, by a real engine -------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"), [200, 220], 4, 3)


async def test_a_check_tells_right_from_wrong(tiny: Tiny) -> None:
    """Honest blocks in eight bits pass; another prompt's, or noise, do not. And neither tenants nor
    what they asked before make a difference."""
    options = EngineOptions(dtype="fp32", pool_bytes=32 << 20, host_bytes=0)
    engine = await TorchEngine.load(tiny.directory, tiny.manifest, options)
    try:
        trust = EdgeTrust(keyed=True, chance=lambda: 0.0, monotonic=time.monotonic)
        checks = SpotChecks(engine, trust, lambda tenant: 1.0)
        prompt = tiny.prompts[0]
        honest = [_coded(tiny, b) for b in tiny.reference.blocks(prompt, tiny.manifest.edge_recipe)]
        other = tiny.reference.blocks(tiny.prompts[1], tiny.manifest.edge_recipe)
        for number, block in enumerate(honest, 1):
            shipped = Shipped(ONE, "acme", prompt[: number * BLOCK_TOKENS], block)
            assert await checks.check(shipped) is not None
        assert (trust.checks["right"], trust.refuses(ONE)) == (len(honest), False)
        domains = trust.domains("acme", TWO)
        assert engine.have_blocks([block.id for block in honest], domains) == len(honest)
        assert engine.have_blocks([block.id for block in honest], trust.domains("other", ONE)) == 0
        for number, (mine, wrong) in enumerate(zip(honest, other, strict=False), 1):
            forged = replace(mine, k=wrong.k, v=wrong.v)
            shipped = Shipped(f"edge/x/{number}", "acme", prompt[: number * BLOCK_TOKENS], forged)
            await checks.check(shipped)
            assert trust.refuses(f"edge/x/{number}")
    finally:
        await engine.close()
        engine.check_integrity()


def _coded(tiny: Tiny, block: KvBlock) -> KvBlock:
    return decode_block(encode_block(block, "k8v8"), tiny.manifest.geometry.kv, "k8v8", id=block.id)
