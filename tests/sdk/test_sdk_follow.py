"""Following a session over a real broker: duplicates, gaps, outages, switches."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiomqtt
import pytest

import segue
from segue import errors
from segue._inbox import Inbox, Link, Tail
from segue_contract.errors import UnknownDevice
from segue_contract.ids import DEFAULT_TENANT, SessionName
from segue_contract.limits import ClientLimits
from segue_contract.servers import Broker
from segue_contract.sync.ops import Set, encode_op
from segue_contract.sync.state import Cursor
from segue_contract.topics import encode_head, encode_log_message, head_topic, log_topic
from segue_contract.transport.mqtt import mqtt_socket_options, parse_mqtt_url
from tests.support.fake_agent import FakeAgent, FakeLog

WAIT_S = 20.0


def op(number: int) -> Set:
    return Set(id=f"o{number}", name="n", value=b"%d" % number)


class Publisher:
    """The cloud's side of the broker: publishes what a test wants published."""

    def __init__(self, mqtt: aiomqtt.Client, log: FakeLog) -> None:
        self._mqtt = mqtt
        self._log = log
        self._topics = (
            log_topic(SessionName(DEFAULT_TENANT, log.session)),
            head_topic(SessionName(DEFAULT_TENANT, log.session)),
        )

    async def entries(self, *offsets: int) -> None:
        for offset in offsets:
            data = self._log.ops[offset - self._log.first_offset]
            payload = encode_log_message(self._log.generation, offset, [data])
            await self._mqtt.publish(self._topics[0], payload, qos=1)

    async def raw(self, payload: bytes) -> None:
        await self._mqtt.publish(self._topics[0], payload, qos=1)

    async def head(self) -> None:
        payload = encode_head(Cursor(self._log.generation, self._log.tail))
        await self._mqtt.publish(self._topics[1], payload, qos=1, retain=True)


@asynccontextmanager
async def publishing(broker: Broker, log: FakeLog) -> AsyncIterator[Publisher]:
    host, port = parse_mqtt_url(broker.url)
    async with aiomqtt.Client(
        host,
        port,
        protocol=aiomqtt.ProtocolVersion.V5,
        socket_options=mqtt_socket_options(),
    ) as mqtt:
        yield Publisher(mqtt, log)


@dataclass
class Seen:
    """What one follower yielded; waits are for an event, never for a time."""

    follower: segue.Follower
    items: list[segue.Snapshot | segue.Entry] = field(default_factory=list)
    lives: list[str] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def offsets(self) -> list[int]:
        return [item.offset for item in self.items if isinstance(item, segue.Entry)]

    @property
    def snapshots(self) -> list[segue.Snapshot]:
        return [item for item in self.items if isinstance(item, segue.Snapshot)]

    async def run(self) -> None:
        async for item in self.follower:
            self.items.append(item)
            self.lives.append(self.follower.live)
            self.changed.set()

    async def until(self, condition: Callable[[Seen], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition(self):
                self.changed.clear()
                await self.changed.wait()

    async def until_offset(self, offset: int) -> None:
        await self.until(lambda seen: bool(seen.items) and seen.items[-1].offset >= offset)


@asynccontextmanager
async def following(
    addresses: Sequence[str],
    session: str = "trip",
    from_offset: int = 0,
    limits: ClientLimits = ClientLimits(),
) -> AsyncIterator[Seen]:
    async with segue.Client(addresses, device="laptop", limits=limits) as client:
        opened = await client.session(session)
        seen = Seen(opened.follow(from_offset))
        async with asyncio.TaskGroup() as group:
            task = group.create_task(seen.run())
            await seen.until(lambda s: bool(s.items))
            yield seen
            task.cancel()


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


async def test_broker_dies_and_comes_back(broker: Broker) -> None:
    log = FakeLog("trip")
    async with (
        FakeAgent(log, mqtt_url=broker.url) as agent,
        following([agent.address]) as seen,
    ):
        log.append(op(1))
        async with publishing(broker, log) as cloud:
            await cloud.entries(1)
            await seen.until_offset(1)
        broker.process.kill()
        await broker.process.wait()
        for number in range(2, 12):
            log.append(op(number))
            await seen.until_offset(number)
            assert seen.lives[-1] == "grpc"
        await broker.restart()
        async with publishing(broker, log) as cloud:
            number = 11
            while seen.lives[-1] != "mqtt":
                number += 1
                log.append(op(number))
                await cloud.entries(number)
                await seen.until_offset(number)
            log.append(op(number + 1))
            await cloud.entries(number + 1)
            await seen.until_offset(number + 1)
        assert seen.offsets == list(range(1, number + 2))
        assert agent.attaches == 1


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


async def test_an_unreachable_broker_is_no_reason_to_wait() -> None:
    log = FakeLog("trip")
    log.append(op(1))
    async with (
        FakeAgent(log, mqtt_url="mqtt://127.0.0.1:1") as agent,
        following([agent.address]) as seen,
    ):
        log.append(op(2))
        await seen.until_offset(2)
        assert seen.offsets == [2]
        assert seen.lives[-1] == "grpc"


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


async def test_what_the_broker_does_not_bring_comes_from_the_log_and_then_by_grpc(
    broker: Broker,
) -> None:
    """The cloud publishes into another broker, or into none: this one is silent and well."""
    log = FakeLog("trip")
    async with (
        FakeAgent(log, mqtt_url=broker.url) as agent,
        following([agent.address], limits=ClientLimits(beside_min_s=0.0)) as seen,
    ):
        assert seen.follower.live == "mqtt"
        log.append(op(1))
        await seen.until_offset(1)
        log.append(op(2))
        await seen.until_offset(2)
        assert seen.lives[-1] == "grpc"
        assert agent.attaches == 1
        async with publishing(broker, log) as cloud:
            number = 2
            while seen.lives[-1] != "mqtt":  # it brings everything again
                number += 1
                log.append(op(number))
                await cloud.entries(number)
                await seen.until_offset(number)
        assert seen.offsets == list(range(1, number + 1))


async def test_a_cloud_that_cannot_publish_says_so(broker: Broker) -> None:
    log = FakeLog("trip")
    async with FakeAgent(log, mqtt_url=broker.url) as agent:
        agent.publishing = False
        async with following([agent.address]) as seen:
            async with asyncio.timeout(WAIT_S):
                while not agent.attaches:  # noqa: ASYNC110 - the agent tells nobody
                    await asyncio.sleep(0.01)
            log.append(op(1))
            await seen.until_offset(1)
            assert seen.lives[-1] == "grpc"


async def test_a_broker_that_hangs_holds_up_nobody(broker: Broker) -> None:
    log = FakeLog("trip")
    async with (
        FakeAgent(log, mqtt_url=broker.url) as agent,
        following([agent.address]) as seen,
    ):
        os.kill(broker.process.pid, signal.SIGSTOP)
        try:
            for number in range(1, 4):
                log.append(op(number))
                await seen.until_offset(number)
            assert seen.lives[-1] == "grpc"
            assert agent.attaches == 1
        finally:
            os.kill(broker.process.pid, signal.SIGCONT)


async def test_a_reader_that_sleeps_finds_one_word_about_the_link_not_one_for_each_second() -> None:
    inbox = Inbox()
    for number in range(1000):
        inbox.put(Link(False))
        inbox.put(Tail(Cursor(1, number), True))
    assert await inbox.get(0.0) == Link(False)
    assert await inbox.get(0.0) == Tail(Cursor(1, 999), True)
    assert await inbox.get(0.0) is None


async def test_nothing_of_the_mqtt_library_reaches_a_terminal(broker: Broker) -> None:
    """Many sessions at once, an unsubscription whose answer is late, a broker that is killed."""
    program = """
import asyncio, os, signal, sys
from segue._mqtt import Broker

class Sink:
    def on_message(self, topic, payload): pass
    def on_link(self, up): self.up.set() if up else None
    def __init__(self): self.up = asyncio.Event()

async def main(url, pid):
    broker, sinks = Broker(url), [Sink() for _ in range(150)]
    await asyncio.gather(*(broker.add([f"t/{n}"], sink) for n, sink in enumerate(sinks)))
    await asyncio.gather(*(sink.up.wait() for sink in sinks))
    await asyncio.gather(*(broker.add([f"u/{n}"], sink) for n, sink in enumerate(sinks)))
    os.kill(pid, signal.SIGSTOP)
    await asyncio.gather(*(broker.remove([f"u/{n}"], sink) for n, sink in enumerate(sinks)))
    os.kill(pid, signal.SIGCONT)
    await asyncio.sleep(0.3)
    os.kill(pid, signal.SIGKILL)
    await asyncio.sleep(0.3)
    await broker.close()

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, broker.url, str(broker.process.pid),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    said, _ = await asyncio.wait_for(child.communicate(), 60)
    assert (child.returncode, said.decode()) == (0, "")
