"""Following a session over a real broker: duplicates, gaps, losses, where it begins and ends."""

from __future__ import annotations

import asyncio

import pytest

import segue
from segue import errors
from segue_contract.errors import UnknownDevice
from segue_contract.limits import ClientLimits
from segue_contract.servers import Broker
from segue_contract.sync.ops import encode_op
from tests.support.fake_agent import FakeAgent, FakeLog
from tests.support.followers import WAIT_S, Seen, following, op, publishing


async def test_snapshot_then_live_over_mqtt(broker: Broker) -> None:
    log = FakeLog("trip")
    log.append(op(1), op(2), op(3))
    async with (
        FakeAgent(log, mqtt_url=broker.url) as agent,
        publishing(broker, log) as cloud,
        following([agent.address]) as seen,
    ):
        (snapshot,) = seen.snapshots
        assert (snapshot.offset, snapshot.state.values) == (3, {"n": b"3"})
        log.append(op(4), op(5))
        await cloud.entries(4, 5)
        await seen.until_offset(5)
        assert seen.offsets == [4, 5]
        assert seen.lives == ["mqtt"] * 3
        assert agent.attaches == 0
        assert agent.reads == 1
        assert seen.follower.state.values == {"n": b"5"}
        assert snapshot.state.values == {"n": b"3"}, "a snapshot is a copy"


async def test_duplicates_and_disorder_over_mqtt_change_nothing(broker: Broker) -> None:
    log = FakeLog("trip")
    log.append(op(1))
    async with (
        FakeAgent(log, mqtt_url=broker.url) as agent,
        publishing(broker, log) as cloud,
        following([agent.address]) as seen,
    ):
        log.append(*[op(n) for n in range(2, 7)])
        await cloud.entries(1, 2, 2, 4, 3, 2, 3, 6, 5, 4)
        await seen.until_offset(6)
        assert seen.offsets == [2, 3, 4, 5, 6]
        assert agent.reads == 1


async def test_a_gap_is_read_from_the_log(broker: Broker) -> None:
    log = FakeLog("trip")
    async with (
        FakeAgent(log, mqtt_url=broker.url) as agent,
        publishing(broker, log) as cloud,
        following([agent.address]) as seen,
    ):
        log.append(*[op(n) for n in range(1, 5)])
        await cloud.entries(1, 2, 4)
        await seen.until_offset(4)
        assert seen.offsets == [1, 2, 3, 4]
        assert agent.reads == 2


async def test_the_head_alone_is_enough(broker: Broker) -> None:
    """The cloud died between append and publish; another instance published the head."""
    log = FakeLog("trip")
    async with (
        FakeAgent(log, mqtt_url=broker.url) as agent,
        publishing(broker, log) as cloud,
        following([agent.address]) as seen,
    ):
        log.append(op(1), op(2))
        await cloud.head()
        await seen.until_offset(2)
        assert seen.offsets == [1, 2]
        await cloud.raw(b"not a log message")
        log.append(op(3))
        await cloud.entries(3)
        await seen.until_offset(3)
        assert seen.offsets == [1, 2, 3]


async def test_without_a_broker_grpc_carries_the_live_view() -> None:
    log = FakeLog("trip")
    log.append(op(1))
    async with FakeAgent(log) as agent, following([agent.address]) as seen:
        log.append(op(2), op(3))
        await seen.until_offset(3)
        assert seen.offsets == [2, 3]
        assert set(seen.lives) == {"grpc"}


async def test_a_late_joiner_is_given_a_state_once() -> None:
    """One message for all that was, and a stream that goes on from it, also after a break."""
    log = FakeLog("trip")
    log.append(*(op(number) for number in range(1, 600)))
    async with FakeAgent(log) as agent:
        async with following([agent.address]) as seen:
            (snapshot,) = seen.snapshots
            assert snapshot.offset == 599
            log.append(op(600))
            await seen.until_offset(600)
            await agent.kill()
            log.append(op(601), op(602))
            await agent.start()
            await seen.until_offset(602)
            assert seen.offsets == [600, 601, 602]
            assert len(seen.snapshots) == 1
        assert agent.attaches == 2
        assert agent.reads == 1
        async with segue.Client(agent.address, device="laptop") as client:
            state = await (await client.session("trip")).state()
            assert state.cursor.offset == 602
        assert agent.reads == 2


async def test_a_stream_whose_device_was_forgotten_joins_again() -> None:
    log = FakeLog("trip")
    log.append(op(1))
    async with FakeAgent(log) as agent, following([agent.address]) as seen:
        agent.fail_once["Attach"] = UnknownDevice("The device never joined.")
        await agent.kill()
        log.append(op(2))
        await agent.start()
        await seen.until_offset(2)
        assert seen.offsets == [2]
        assert not agent.fail_once


async def test_grpc_view_survives_its_node() -> None:
    log = FakeLog("trip")
    async with (
        FakeAgent(log) as first,
        FakeAgent(log) as second,
        following([first.address, second.address]) as seen,
    ):
        log.append(op(1))
        await seen.until_offset(1)
        await first.kill()
        log.append(op(2))
        await seen.until_offset(2)
        await first.start()
        await second.kill()
        log.append(op(3))
        await seen.until_offset(3)
        assert seen.offsets == [1, 2, 3]


async def test_from_offset_yields_each_later_entry() -> None:
    log = FakeLog("trip")
    log.append(*[op(n) for n in range(1, 8)])
    async with FakeAgent(log, page=2) as agent:
        async with following([agent.address], from_offset=4) as seen:
            await seen.until_offset(7)
            (snapshot,) = seen.snapshots
            assert (snapshot.offset, snapshot.state.values) == (4, {"n": b"4"})
            assert seen.offsets == [5, 6, 7]
        log.compact()
        async with following([agent.address], from_offset=4) as seen:
            (snapshot,) = seen.snapshots
            assert (snapshot.offset, seen.offsets) == (7, [])


async def test_a_new_generation_replaces_everything(broker: Broker) -> None:
    log = FakeLog("trip")
    log.append(op(1), op(2), op(3))
    async with (
        FakeAgent(log, mqtt_url=broker.url) as agent,
        publishing(broker, log) as cloud,
        following([agent.address]) as seen,
    ):
        log.lose_everything()
        log.append(op(7))
        await cloud.entries(1)
        await seen.until(lambda s: len(s.snapshots) == 2)
        last = seen.snapshots[-1]
        assert (last.generation, last.offset, last.state.values) == (2, 1, {"n": b"7"})
        log.append(op(8))
        await cloud.entries(2)
        await seen.until_offset(2)
        assert [(i.generation, i.offset) for i in seen.items] == [(1, 3), (2, 1), (2, 2)]


async def test_leaving_the_loop_and_closing_the_client_end_it(broker: Broker) -> None:
    log = FakeLog("trip")
    async with FakeAgent(log, mqtt_url=broker.url) as agent:
        async with segue.Client(agent.address, device="laptop") as client:
            session = await client.session("trip")
            async for item in session.follow():
                assert isinstance(item, segue.Snapshot)
                break
            second = Seen(session.follow())
            task = asyncio.create_task(second.run())
            await second.until(lambda s: bool(s.items))
        async with asyncio.timeout(WAIT_S):
            await task


async def test_errors_of_the_node_reach_the_reader() -> None:
    log = FakeLog("trip")
    async with (
        FakeAgent(log) as agent,
        segue.Client(agent.address, device="laptop") as client,
    ):
        session = await client.session("trip")
        agent.fail_once["Read"] = errors.UnknownSession("It was deleted.")
        with pytest.raises(errors.UnknownSession):
            async for _ in session.follow():
                pass
        with pytest.raises(errors.InvalidArgument):
            session.follow(from_offset=-1)


async def test_a_reader_that_sleeps_is_helped_by_the_log(broker: Broker) -> None:
    """More live entries than the inbox holds: they are dropped, and read later."""
    few = ClientLimits(follower_entries=8)
    log = FakeLog("trip")
    async with (
        FakeAgent(log, mqtt_url=broker.url) as agent,
        publishing(broker, log) as cloud,
        segue.Client(agent.address, device="laptop", limits=few) as client,
    ):
        session = await client.session("trip")
        follower = session.follow()
        offsets = []
        async for item in follower:
            if isinstance(item, segue.Snapshot):
                log.append(*[op(n) for n in range(1, 101)], encode_op(op(101)))
                await cloud.entries(*range(1, 102))
            else:
                offsets.append(item.offset)
                if item.offset == 101:
                    break
        assert offsets == list(range(1, 102))
        assert agent.reads > 1


async def test_a_token_function_that_fails_ends_the_follower_with_what_it_raised() -> None:
    failing = False

    def token() -> str:
        if failing:
            raise KeyError("no back end")
        return "a.b.c"

    log = FakeLog("trip")
    async with (
        FakeAgent(log) as agent,
        segue.Client([agent.address], device="laptop", token=token) as client,
    ):
        seen = Seen((await client.session("trip")).follow())
        running = asyncio.ensure_future(seen.run())
        await seen.until(lambda one: bool(one.items))
        log.append(op(1))
        await seen.until_offset(1)
        failing = True
        await agent.kill()
        await agent.start()
        with pytest.raises(KeyError):
            await asyncio.wait_for(running, WAIT_S)
