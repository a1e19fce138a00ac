"""An engine dies: its turns go on in another cloud, without an error and without a gap."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

import segue
from segue.local.parts import Program, module_command
from segue.testing import LocalStack
from tests.support.devices import WAIT_S, text_in_log, watching
from tests.support.servers import require_broker, require_valkey

pytestmark = pytest.mark.slow

STORY = "Tell me a long story about a lighthouse keeper and the sea."


@pytest_asyncio.fixture
async def two_clouds(model_dir: Path, tmp_path: Path) -> AsyncIterator[tuple[LocalStack, str]]:
    """A stack whose cloud has two ranks, and the address of a second cloud beside it."""
    require_valkey()
    require_broker()
    model = str(model_dir)
    async with LocalStack(model=model, cloud_args=("--tensor-parallel", "2")) as stack:
        servers = {"SEGUE_REDIS_URL": stack.redis_url, "SEGUE_MQTT_URL": stack.mqtt_url}
        second = Program(
            "cloud-2",
            module_command("segue", "cloud", "--port", "0", "--model", model),
            log=tmp_path / "cloud-2.log",
            env={**os.environ, **servers},
        )
        await second.start()
        try:
            yield stack, second.address
        finally:
            await second.stop()


def rank_of(cloud: Program) -> psutil.Process:
    """The process of the cloud's rank 1."""
    (rank,) = (
        child
        for child in psutil.Process(cloud.pid).children(recursive=True)
        if "segue_cloud.engine.tensor_parallel.rank" in child.cmdline()
    )
    return rank


async def test_a_reply_goes_on_in_another_cloud_when_a_rank_dies(
    two_clouds: tuple[LocalStack, str],
) -> None:
    stack, other = two_clouds
    async with (
        segue.Client([stack.cloud_address, other], device="phone") as phone,
        watching(other, "rank-dies", "laptop") as laptop,
    ):
        session = await phone.session("rank-dies")
        async with session.run(STORY, max_tokens=200, seed=5) as turn:
            reading = asyncio.create_task(turn.result())
            await laptop.until_text(turn.id, 20)
            rank_of(stack.cloud).kill()
            reply = await asyncio.wait_for(reading, WAIT_S)
        assert reply.reason in ("stop", "length")
        assert await laptop.until_ended(turn.id) == reply.text
        assert reply.text == await text_in_log(other, "rank-dies", turn.id)
        state = await session.state()
        assert [(t.turn, t.epoch) for t in state.turns] == [(turn.id, 2)]
        async with asyncio.timeout(WAIT_S):
            assert await stack.wait_crash() is stack.cloud
        assert stack.cloud.ended_how == "exit code 1"
