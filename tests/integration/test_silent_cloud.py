"""A cloud that hangs in mid-reply: its turns go on in another one."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

import segue
from segue.local.parts import Program, module_command
from segue.testing import LocalStack
from tests.support.devices import WAIT_S, Pauses, text_in_log
from tests.support.servers import require_broker, require_valkey

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

STORY = "Tell me a long story about a lighthouse keeper and the sea."


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(
    model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[LocalStack, Program, Program]]:
    """A stack, a second cloud on the same servers, and an edge that knows both."""
    require_valkey()
    require_broker()
    folder = tmp_path_factory.mktemp("pair")
    model = ["--model", str(model_dir)]
    async with LocalStack(model=str(model_dir)) as stack:
        servers = {"SEGUE_REDIS_URL": stack.redis_url, "SEGUE_MQTT_URL": stack.mqtt_url}
        cloud = Program(
            "cloud-2",
            module_command("segue", "cloud", "--port", "0", *model),
            log=folder / "cloud-2.log",
            env={**os.environ, **servers},
        )
        await cloud.start()
        both = ["--cloud", stack.cloud_address, "--cloud", cloud.address]
        edge = Program(
            "edge-2",
            module_command("segue", "edge", "--port", "0", *both, *model),
            log=folder / "edge-2.log",
            env=dict(os.environ),
        )
        await edge.start()
        try:
            yield stack, cloud, edge
        finally:
            await edge.stop()
            await cloud.stop()


@pytest.mark.parametrize("plan", ["text", "ship"])
async def test_a_cloud_that_hangs_in_mid_reply(
    pair: tuple[LocalStack, Program, Program], plan: str
) -> None:
    """Seen through an edge. Whichever cloud serves the session is stopped: the other goes on."""
    stack, second, edge = pair
    name = f"cloud-hangs-{plan}"
    async with segue.Client(edge.address, device="phone") as phone:
        session = await phone.session(name)
        async with session.run("Hello!", max_tokens=4, plan=plan) as turn:
            await turn.result()
        for cloud, other in ((stack.cloud, second), (second, stack.cloud)):
            async with session.run(STORY, max_tokens=120, seed=5, plan=plan) as turn:
                pauses = Pauses()
                reading = asyncio.create_task(pauses.read(turn))
                await asyncio.wait_for(pauses.begun.wait(), WAIT_S)
                cloud.pause()
                try:
                    reply = await asyncio.wait_for(reading, WAIT_S)
                finally:
                    cloud.resume()
            print(f"{plan}, {cloud.name}: the longest pause was {pauses.longest_s:.2f} s")
            assert reply.reason in ("stop", "length")
            assert reply.text == await text_in_log(other.address, name, turn.id)
