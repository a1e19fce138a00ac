"""Parts that die: what a user sees of it is a pause, never a lost or doubled token."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

import segue
from segue.local.parts import Program, module_command
from segue.local.revival import keep_up
from segue.testing import LocalStack
from tests.support.devices import WAIT_S, text_in_log, watching
from tests.support.slow_proxy import SlowProxy

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="package")]

STORE_HOLD_S = 8.0  # a call of the store is given up after 5
STORY = "Tell me a long story about a lighthouse keeper and the sea."


async def test_the_edge_is_restarted_between_turns(stack: LocalStack) -> None:
    async with segue.Client(stack.edge_address, device="phone") as phone:
        session = await phone.session("restart")
        async with session.run("My name is Ada. Hello!", max_tokens=16) as turn:
            first = await turn.result()
        edge = stack.edges[0]
        await edge.kill()
        await edge.restart()
        async with session.run("What is my name?", max_tokens=16) as turn:
            second = await turn.result()
        state = await session.state()
    assert [t.text for t in state.turns] == [first.text, second.text]


async def test_a_broker_and_a_cloud_that_die_are_started_again(stack: LocalStack) -> None:
    """As `segue up` does: who tries a kill -9 finds everything back, the sessions included."""
    ended: list[str] = []
    keeping = asyncio.create_task(keep_up(stack, lambda part: ended.append(part.name)))
    try:
        async with segue.Client([stack.edge_address, stack.cloud_address], device="phone") as phone:
            session = await phone.session("revived")
            async with session.run(STORY, max_tokens=16) as turn:
                first = await turn.result()
            for name in ("broker", "cloud"):
                before = stack.processes[name].pid
                os.kill(before, signal.SIGKILL)
                async with asyncio.timeout(WAIT_S):
                    while stack.processes[name].pid == before or stack.crashed is not None:  # noqa: ASYNC110 - another process starts
                        await asyncio.sleep(0.05)
            async with session.run("And then?", max_tokens=16) as turn:
                second = await turn.result()
            state = await session.state()
        assert ended == ["broker", "cloud"]
        assert [turn.text for turn in state.turns] == [first.text, second.text]
    finally:
        keeping.cancel()
        await asyncio.wait({keeping})


async def test_the_edge_dies_in_mid_turn_and_the_cloud_finishes(stack: LocalStack) -> None:
    edge = stack.edges[0]
    addresses = [stack.edge_address, stack.cloud_address]
    async with (
        segue.Client(addresses, device="phone") as phone,
        watching(stack.cloud_address, "edge-dies", "laptop") as laptop,
    ):
        session = await phone.session("edge-dies")
        async with session.run(STORY, max_tokens=150, seed=5) as turn:
            reading = asyncio.create_task(turn.result())
            await laptop.until_text(turn.id, 20)
            await edge.kill()
            reply = await asyncio.wait_for(reading, WAIT_S)
        assert reply.reason in ("stop", "length")
        assert await laptop.until_ended(turn.id) == reply.text
        assert reply.text == await text_in_log(stack.cloud_address, "edge-dies", turn.id)
    await edge.restart()


async def test_a_second_device_on_a_second_edge(stack: LocalStack) -> None:
    second = await stack.add_edge()
    async with (
        segue.Client(stack.edge_address, device="phone") as phone,
        segue.Client(second.address, device="laptop") as laptop,
        watching(second.address, "two-edges", "tablet") as tablet,
    ):
        one = await phone.session("two-edges")
        two = await laptop.session("two-edges")
        async with one.run("Tell me about tides.", max_tokens=40, plan="ship") as turn:
            first = await turn.result()
        assert await tablet.until_ended(turn.id) == first.text
        async with two.run("Say that again, shorter.", max_tokens=30, plan="ship") as turn:
            reply = await turn.result()
        assert await tablet.until_ended(turn.id) == reply.text
        state = await one.state()
        assert [t.text for t in state.turns] == [first.text, reply.text]
    await second.stop()


async def test_the_broker_is_away_and_the_view_goes_on(stack: LocalStack) -> None:
    async with (
        segue.Client(stack.edge_address, device="phone") as phone,
        watching(stack.edge_address, "no-broker", "laptop") as laptop,
    ):
        session = await phone.session("no-broker")
        async with session.run(STORY, max_tokens=120, seed=6) as turn:
            reading = asyncio.create_task(turn.result())
            await laptop.until_text(turn.id, 10)
            await stack.processes["broker"].kill()
            reply = await asyncio.wait_for(reading, WAIT_S)
        assert await laptop.until_ended(turn.id) == reply.text
        await stack.processes["broker"].restart()
        async with session.run("Thanks!", max_tokens=8) as turn:
            thanks = await turn.result()
        assert await laptop.until_ended(turn.id) == thanks.text
        assert laptop.offsets == sorted(set(laptop.offsets))


async def test_the_cloud_is_restarted_in_mid_turn(stack: LocalStack) -> None:
    async with (
        segue.Client(stack.edge_address, device="phone") as phone,
        watching(stack.edge_address, "cloud-dies", "laptop") as laptop,
    ):
        session = await phone.session("cloud-dies")
        async with session.run(STORY, max_tokens=150, seed=9) as turn:
            reading = asyncio.create_task(turn.result())
            await laptop.until_text(turn.id, 20)
            await stack.cloud.kill()
            await stack.cloud.restart()
            reply = await asyncio.wait_for(reading, WAIT_S)
        assert await laptop.until_ended(turn.id) == reply.text
        assert reply.text == await text_in_log(stack.cloud_address, "cloud-dies", turn.id)
        assert laptop.offsets == sorted(set(laptop.offsets))


async def test_the_cloud_dies_that_served_a_device_without_an_edge(stack: LocalStack) -> None:
    async with segue.Client(stack.cloud_address, device="phone") as phone:
        session = await phone.session("direct")
        async with session.run(STORY, max_tokens=120, seed=11) as turn:
            async for event in turn:
                if isinstance(event, segue.Frame) and event.next_index >= 5:
                    break
            reading = asyncio.create_task(turn.result())
            await stack.cloud.kill()
            await stack.cloud.restart()
            reply = await asyncio.wait_for(reading, WAIT_S)
        assert reply.reason in ("stop", "length")
        assert reply.text == await text_in_log(stack.cloud_address, "direct", turn.id)


async def test_what_was_said_offline_survives_the_edges_death(stack: LocalStack) -> None:
    edge = stack.edges[0]
    async with segue.Client(stack.edge_address, device="phone") as phone:
        session = await phone.session("offline")
        async with session.run("Hello!", max_tokens=8) as turn:
            await turn.result()
        await stack.cloud.kill()
        async with session.run("My name is Ada.", max_tokens=12) as turn:
            told = await asyncio.wait_for(turn.result(), WAIT_S)
        assert turn.ended is not None
        assert not turn.ended.durable
    await edge.kill()
    await stack.cloud.restart()
    async with watching(stack.cloud_address, "offline", "laptop") as laptop:
        await edge.restart()
        assert await laptop.until_ended(turn.id) == told.text
    assert await text_in_log(stack.cloud_address, "offline", turn.id) == told.text


async def the_whole_reply(
    turn: segue.Turn, see: Callable[[segue.events.TurnEvent], None] = lambda _: None
) -> str:
    """What the asker has in the end, the log's word on an offline reply included."""
    async with asyncio.timeout(2 * WAIT_S):
        async for event in turn:
            see(event)
        async for event in turn.settled():
            see(event)
    assert turn.ended is not None
    assert turn.ended.durable
    assert turn.ended.error is None
    return turn.text


async def test_the_store_stands_still_for_longer_than_a_call_waits(stack: LocalStack) -> None:
    plans = ("text", "edge")
    store, name = stack.processes["store"], "store-stands"
    async with AsyncExitStack() as open_here:
        phone = await open_here.enter_async_context(
            segue.Client(stack.edge_address, device="phone")
        )
        sessions = {plan: await phone.session(f"{name}-{plan}") for plan in plans}
        laptops, turns = {}, {}
        for plan, session in sessions.items():
            follower = watching(stack.edge_address, session.name, "laptop")
            laptops[plan] = await open_here.enter_async_context(follower)
            run = session.run(STORY, max_tokens=100, seed=4, plan=plan)
            turns[plan] = await open_here.enter_async_context(run)
        reading = asyncio.gather(*(the_whole_reply(turns[plan]) for plan in plans))
        for plan in plans:
            await laptops[plan].until_text(turns[plan].id, 20)
        store.pause()
        try:
            await asyncio.sleep(STORE_HOLD_S)
        finally:
            store.resume()
        for plan, told in zip(plans, await reading, strict=True):
            turn = turns[plan].id
            assert await laptops[plan].until_ended(turn) == told
            assert told == await text_in_log(stack.cloud_address, sessions[plan].name, turn)
            # A device that comes back to it through the same edge is told the same.
            async with sessions[plan].run(STORY, max_tokens=100, seed=4, turn=turn) as again:
                assert (await again.result()).text == told


async def test_the_cloud_is_back_before_the_edge_has_made_the_rest_alone(
    stack: LocalStack, tmp_path: Path
) -> None:
    """Killed in mid-reply, and out of the edge's reach until it goes on alone; meanwhile the cloud
    finishes the same turn from what the log had of it, at this temperature with other tokens."""
    async with SlowProxy(int(stack.cloud_address.rpartition(":")[2])) as link:
        cloud = f"127.0.0.1:{link.port}"  # and no other
        command = module_command("segue", "edge", "--port", "0", "--cloud", cloud)
        edge = Program("cut-off-edge", command, log=tmp_path / "edge.log")
        await edge.start()
        async with (
            segue.Client(edge.address, device="phone") as phone,
            watching(stack.cloud_address, "back-early", "laptop") as laptop,
        ):
            session = await phone.session("back-early")
            alone = asyncio.Event()
            made_alone: list[int] = []
            rewound: list[segue.Rewound] = []
            turn = session.run(STORY, max_tokens=220, temperature=1.5, seed=3, plan="text")

            def see(event: segue.events.TurnEvent) -> None:
                if isinstance(event, segue.Frame) and event.made_by == "edge":
                    made_alone.extend(event.tokens)
                    if len(made_alone) > 40:
                        alone.set()
                elif isinstance(event, segue.Rewound):
                    rewound.append(event)

            async with turn:
                async for event in turn:
                    if isinstance(event, segue.Frame) and event.next_index > 20:
                        break
                reading = asyncio.create_task(the_whole_reply(turn, see))
                link.refuse = True
                link.cut()
                await stack.cloud.kill()
                await stack.cloud.restart()
                known = await text_in_log(stack.cloud_address, "back-early", turn.id)
                await laptop.until_text(turn.id, len(known) + 150)  # the cloud goes on by itself
                await asyncio.wait_for(alone.wait(), WAIT_S)
                link.refuse = False
                told = await reading
            assert rewound, "the cloud and the edge made the same tokens at this temperature"
            print(f"rewound at {[event.index for event in rewound]} of {len(turn.tokens)} tokens")
            assert told == await text_in_log(stack.cloud_address, "back-early", turn.id)
            async with session.run(
                STORY, max_tokens=220, temperature=1.5, seed=3, turn=turn.id
            ) as again:
                assert (await again.result()).text == told
        await edge.stop()
