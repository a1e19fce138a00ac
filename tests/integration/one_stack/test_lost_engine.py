"""An engine dies: its turns go on in another cloud, without an error and without a gap."""

from __future__ import annotations

import asyncio
from pathlib import Path

import psutil
import pytest

import segue
from segue.local.parts import Program
from segue.testing import LocalStack
from tests.integration.one_stack.conftest import second_cloud
from tests.support.devices import WAIT_S, text_in_log, watching

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="package")]

STORY = "Tell me a long story about a lighthouse keeper and the sea."


def rank_of(cloud: Program) -> psutil.Process:
    """The process of the cloud's rank 1."""
    (rank,) = (
        child
        for child in psutil.Process(cloud.pid).children(recursive=True)
        if "segue_cloud.engine.tensor_parallel.rank" in child.cmdline()
    )
    return rank


async def test_a_reply_goes_on_in_another_cloud_when_a_rank_dies(
    stack: LocalStack, model_dir: Path, tmp_path: Path
) -> None:
    other = stack.cloud_address
    ended = asyncio.Event()
    arguments = ("--tensor-parallel", "2")
    cloud = second_cloud(stack, model_dir, tmp_path, *arguments, on_crash=lambda _: ended.set())
    await cloud.start()
    try:
        async with (
            segue.Client([cloud.address, other], device="phone") as phone,
            watching(other, "rank-dies", "laptop") as laptop,
        ):
            session = await phone.session("rank-dies")
            async with session.run(STORY, max_tokens=200, seed=5) as turn:
                reading = asyncio.create_task(turn.result())
                await laptop.until_text(turn.id, 20)
                rank_of(cloud).kill()
                reply = await asyncio.wait_for(reading, WAIT_S)
            assert reply.reason in ("stop", "length")
            assert await laptop.until_ended(turn.id) == reply.text
            assert reply.text == await text_in_log(other, "rank-dies", turn.id)
            state = await session.state()
            assert [(t.turn, t.epoch) for t in state.turns] == [(turn.id, 2)]
        await asyncio.wait_for(ended.wait(), WAIT_S)
        assert cloud.ended_how == "exit code 1"
    finally:
        await cloud.stop()
