"""A device, an edge and a cloud that are far from each other: 300 ms there and back, each link."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import segue
from segue.local.parts import Program, module_command
from segue.testing import LocalStack
from tests.support.devices import text_in_log, watching
from tests.support.slow_proxy import SlowProxy

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="package")]

ONE_WAY_S = 0.15
THIN_BYTES_PER_S = 60_000
STORY = "Tell me a story of the sea, of the people who live by it, and of a lighthouse. " * 8


@asynccontextmanager
async def far_edge(
    stack: LocalStack, log: Path, bytes_per_s: float = float("inf")
) -> AsyncIterator[str]:
    """An edge that reaches the stack's cloud over a far link; its address, as far away again."""
    cloud_port = int(stack.cloud_address.rpartition(":")[2])
    async with SlowProxy(cloud_port, lambda: ONE_WAY_S, bytes_per_s) as to_cloud:
        cloud = f"127.0.0.1:{to_cloud.port}"
        command = module_command("segue", "edge", "--port", "0", "--cloud", cloud)
        edge = Program("far-edge", command, log=log)
        await edge.start()
        try:
            edge_port = int(edge.address.rpartition(":")[2])
            async with SlowProxy(edge_port, lambda: ONE_WAY_S) as to_edge:
                yield f"127.0.0.1:{to_edge.port}"
        finally:
            await edge.stop()


async def test_far_devices_have_the_whole_reply_and_the_link_is_known(
    stack: LocalStack, tmp_path: Path
) -> None:
    async with (
        far_edge(stack, tmp_path / "edge.log") as address,
        segue.Client(address, device="phone") as phone,
        watching(stack.cloud_address, "far", "laptop") as laptop,
    ):
        session = await phone.session("far")
        async with session.run(STORY, max_tokens=200, plan="ship") as turn:
            reply = await turn.result()
        assert reply.reason in ("stop", "length")
        assert reply.text == await text_in_log(stack.cloud_address, "far", turn.id)
        assert reply.text == await laptop.until_ended(turn.id)
        assert reply.plan is not None
        assert reply.plan.shape == "ship"
        assert reply.plan.shipped_blocks > 0
        assert reply.plan.inputs["rtt_s"] >= 2 * ONE_WAY_S


async def test_a_thin_link_is_used_for_text_not_for_kv(stack: LocalStack, tmp_path: Path) -> None:
    async with (
        far_edge(stack, tmp_path / "edge.log", THIN_BYTES_PER_S) as address,
        segue.Client(address, device="phone") as phone,
    ):
        session = await phone.session("thin")
        async with session.run(STORY, max_tokens=20) as turn:
            reply = await turn.result()
        assert reply.text == await text_in_log(stack.cloud_address, "thin", turn.id)
        assert reply.plan is not None
        assert not reply.plan.offline
        assert reply.plan.inputs["goodput_bytes_per_s"] < 4 * THIN_BYTES_PER_S
        assert reply.plan.shape != "ship"
        assert reply.plan.shipped_blocks == 0
