"""Parts that fall silent without dying: what a user sees of it is a pause, as if they had died."""

from __future__ import annotations

import asyncio

import pytest

import segue
from segue.testing import LocalStack
from tests.support.devices import WAIT_S, Pauses, text_in_log, watching

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

STORY = "Tell me a long story about a lighthouse keeper and the sea."


@pytest.mark.parametrize("plan", ["text", "ship"])
async def test_an_edge_that_hangs_in_mid_reply(stack: LocalStack, plan: str) -> None:
    """Its connections stand, nothing comes: the device goes on at the next address."""
    name = f"edge-hangs-{plan}"
    addresses = [stack.edge_address, stack.cloud_address]
    async with (
        segue.Client(addresses, device="phone") as phone,
        watching(stack.cloud_address, name, "laptop") as laptop,
    ):
        session = await phone.session(name)
        async with session.run(STORY, max_tokens=150, seed=5, plan=plan) as turn:
            pauses = Pauses()
            reading = asyncio.create_task(pauses.read(turn))
            await asyncio.wait_for(pauses.begun.wait(), WAIT_S)
            stack.edges[0].pause()
            try:
                reply = await asyncio.wait_for(reading, WAIT_S)
                served_by = turn.address
                # what is asked next is not held up by the silent one either
                await asyncio.wait_for(session.set("seen", "yes"), WAIT_S)
            finally:
                stack.edges[0].resume()
        print(f"{plan}: the longest pause was {pauses.longest_s:.2f} s")
        assert reply.reason in ("stop", "length")
        assert served_by == stack.cloud_address
        assert await laptop.until_ended(turn.id) == reply.text
        assert reply.text == await text_in_log(stack.cloud_address, name, turn.id)


async def test_a_broker_that_hangs(stack: LocalStack) -> None:
    async with (
        segue.Client(stack.edge_address, device="phone") as phone,
        watching(stack.edge_address, "broker-hangs", "laptop") as laptop,
    ):
        session = await phone.session("broker-hangs")
        stack.processes["broker"].pause()
        try:
            async with session.run(STORY, max_tokens=40) as turn:
                reply = await asyncio.wait_for(turn.result(), WAIT_S)
            assert await laptop.until_ended(turn.id) == reply.text
        finally:
            stack.processes["broker"].resume()
