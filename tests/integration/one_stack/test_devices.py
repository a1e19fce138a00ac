"""Devices of one session, over real processes: edge, cloud, Valkey, broker, model."""

from __future__ import annotations

import asyncio
import signal
import sys
import textwrap

import pytest

import segue
from segue.testing import LocalStack
from segue_contract.errors import SessionBusy
from tests.support.devices import WAIT_S, text_in_log, watching

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="package")]

STORY = "Tell me a long story about a lighthouse keeper and the sea."


async def test_two_devices_see_the_same_reply(stack: LocalStack) -> None:
    async with (
        segue.Client(stack.edge_address, device="phone") as phone,
        watching(stack.edge_address, "two", "laptop") as laptop,
    ):
        session = await phone.session("two")
        text = ""
        frames: list[segue.Frame] = []
        async with session.run("Name three colours.", max_tokens=40, seed=7) as turn:
            async for event in turn:
                text += event.text
                if isinstance(event, segue.Frame):
                    frames.append(event)
                if isinstance(event, segue.Ended):
                    ended = event
        assert text
        assert await laptop.until_ended(turn.id) == text
        assert await text_in_log(stack.cloud_address, "two", turn.id) == text
        assert laptop.offsets == sorted(set(laptop.offsets))
        indexes = [index for f in frames for index in range(f.index, f.next_index)]
        assert indexes == list(range(ended.usage.completion_tokens))
        assert ended.plan is not None


async def test_the_edge_makes_the_first_token_when_it_ships(stack: LocalStack) -> None:
    async with segue.Client(stack.edge_address, device="phone") as phone:
        session = await phone.session("ship")
        prompt = "Please summarise: " + "the quick brown fox jumps over the lazy dog. " * 20
        async with session.run(prompt, max_tokens=24, plan="ship") as turn:
            frames = [e async for e in turn if isinstance(e, segue.Frame)]
            reply = await turn.result()
        assert frames[0].made_by == "edge"
        assert not frames[0].durable
        assert frames[-1].made_by == "cloud"
        assert reply.plan is not None
        assert reply.plan.shape == "ship"
        assert reply.plan.shipped_blocks > 0
        assert 0 < reply.plan.shipped_bytes < 0.55 * reply.plan.shipped_fp16_bytes


@pytest.mark.parametrize("shape", ["edge", "ship", "text"])
async def test_every_shape_ends_with_the_log_having_it_all(stack: LocalStack, shape: str) -> None:
    name = f"shape-{shape}"
    async with segue.Client(stack.edge_address, device="phone") as phone:
        session = await phone.session(name)
        async with session.run("Count from one to ten.", max_tokens=20, plan=shape) as turn:
            reply = await turn.result()
        assert reply.plan is not None
        assert reply.plan.shape == shape
        assert reply.plan.forced
        assert reply.text == await text_in_log(stack.cloud_address, name, turn.id)


_PHONE = textwrap.dedent(
    """
    import asyncio, sys, segue
    async def main(address, session, prompt):
        async with segue.Client(address, device="phone") as client:
            opened = await client.session(session)
            async with opened.run(prompt, max_tokens=120, seed=3) as turn:
                print(turn.id, flush=True)
                async for event in turn:
                    if event.text:
                        print("frame", flush=True)
    asyncio.run(main(*sys.argv[1:]))
    """
)


async def test_a_device_killed_in_mid_turn_loses_nothing_for_the_others(stack: LocalStack) -> None:
    async with watching(stack.edge_address, "killed", "laptop") as laptop:
        phone = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            _PHONE,
            stack.edge_address,
            "killed",
            STORY,
            stdout=asyncio.subprocess.PIPE,
        )
        assert phone.stdout is not None
        async with asyncio.timeout(WAIT_S):
            turn = (await phone.stdout.readline()).decode().strip()
            for _ in range(3):
                assert await phone.stdout.readline() == b"frame\n"
        phone.send_signal(signal.SIGKILL)
        await phone.wait()
        assert turn not in laptop.reasons, "the reply was over before the phone was killed"
        text = await laptop.until_ended(turn)
    assert laptop.reasons[turn] in ("stop", "length")
    assert text == await text_in_log(stack.cloud_address, "killed", turn)
    assert len(text) > 100


async def test_the_next_turn_reuses_the_kv_of_the_session(stack: LocalStack) -> None:
    async with segue.Client(stack.edge_address, device="phone") as phone:
        session = await phone.session("reuse")
        long = "Here is a text: " + "rivers run to the sea and mountains stand still. " * 12
        async with session.run(long, max_tokens=40, plan="ship") as turn:
            await turn.result()
        async with session.run("And what else?", max_tokens=10, plan="ship") as turn:
            second = await turn.result()
        assert second.plan is not None
        assert second.plan.edge_cached_blocks >= 2
        assert second.usage.cloud_cached_tokens >= 128
        assert second.plan.shipped_blocks < second.plan.prompt_blocks


async def test_another_device_stops_the_turn(stack: LocalStack) -> None:
    async with (
        segue.Client(stack.edge_address, device="phone") as phone,
        segue.Client(stack.cloud_address, device="laptop") as laptop,
        watching(stack.edge_address, "stop", "tablet") as tablet,
    ):
        session = await phone.session("stop")
        other = await laptop.session("stop")
        async with session.run(STORY, max_tokens=600, seed=1) as turn:
            reading = asyncio.create_task(turn.result())
            await tablet.until_text(turn.id, 20)
            await other.stop()
            reply = await asyncio.wait_for(reading, WAIT_S)
        assert reply.reason == "cancelled"
        assert reply.usage.completion_tokens < 600
        assert await tablet.until_ended(turn.id) == reply.text
        await other.stop()  # nothing runs: no error


async def test_leaving_a_turn_does_not_cancel_it(stack: LocalStack) -> None:
    async with watching(stack.cloud_address, "leave", "laptop") as laptop:
        async with segue.Client(stack.edge_address, device="phone") as phone:
            session = await phone.session("leave")
            async with session.run("Tell me about whales.", max_tokens=60, seed=2) as turn:
                async for event in turn:
                    if event.text:
                        break
        await laptop.until_ended(turn.id)
        assert laptop.reasons[turn.id] in ("stop", "length")


async def test_a_second_turn_waits_or_is_refused(stack: LocalStack) -> None:
    async with (
        segue.Client(stack.edge_address, device="phone") as phone,
        segue.Client(stack.edge_address, device="laptop") as laptop,
        watching(stack.edge_address, "busy", "tablet") as tablet,
    ):
        one = await phone.session("busy")
        two = await laptop.session("busy")
        async with one.run(STORY, max_tokens=80, seed=4) as first:
            reading = asyncio.create_task(first.result())
            await tablet.until_text(first.id, 1)
            with pytest.raises(SessionBusy):
                async with two.run("Me too!", max_tokens=4, when_busy="refuse") as refused:
                    await refused.result()
            async with two.run("And me?", max_tokens=4, when_busy="wait") as second:
                waited = await second.result()
            reply = await reading
        assert reply.reason in ("stop", "length")
        assert waited.reason in ("stop", "length")


async def test_the_same_turn_id_joins_and_never_runs_twice(stack: LocalStack) -> None:
    async with segue.Client(stack.edge_address, device="phone") as phone:
        session = await phone.session("join")
        async with session.run("Say hello.", max_tokens=12, turn="only-once") as turn:
            first = await turn.result()
        async with session.run("Say hello.", max_tokens=12, turn="only-once") as turn:
            again = await turn.result()
        state = await session.state()
        assert again.text == first.text
        assert [t.turn for t in state.turns] == ["only-once"]


async def test_thirty_two_sessions_at_once(stack: LocalStack) -> None:
    async def one(number: int) -> None:
        name = f"many-{number}"
        async with segue.Client(stack.edge_address, device="phone") as client:
            session = await client.session(name)
            async with session.run(f"What is {number} plus one?", max_tokens=12) as turn:
                reply = await turn.result()
        assert reply.reason in ("stop", "length")
        assert reply.text == await text_in_log(stack.cloud_address, name, turn.id)

    async with asyncio.timeout(2 * WAIT_S), asyncio.TaskGroup() as group:
        for number in range(32):
            group.create_task(one(number))
