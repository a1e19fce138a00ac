"""Appended entries and heads on a real broker, also when it goes away and comes back."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import aiomqtt
import pytest

from segue_cloud.log.session_log import SessionLog
from segue_cloud.mqtt.publisher import Publisher
from segue_cloud.sessions.port import LogOp
from segue_cloud.sessions.store import RedisStore
from segue_contract.errors import InvalidArgument
from segue_contract.ids import SessionName
from segue_contract.servers import Broker, Valkey
from segue_contract.sync import ops
from segue_contract.sync.replica import Applied, Replica
from segue_contract.sync.state import Cursor
from segue_contract.topics import (
    TAG_BYTES,
    decode_head,
    decode_log_message,
    head_topic,
    log_topic,
)
from segue_contract.transport.mqtt import mqtt_socket_options, parse_mqtt_url
from tests.support.brokers import NOBODY_PUBLISHES, mosquitto
from tests.support.producers import producer
from tests.support.servers import require_broker

S = SessionName("default", "trip")
DEADLINE_S = 30


def op(text: str) -> LogOp:
    return LogOp.of(ops.Set(id=text, name="last", value=text.encode()))


@pytest.fixture
async def store(valkey: Valkey) -> AsyncIterator[RedisStore]:
    store = await RedisStore.connect(valkey.url)
    await store.open_session(S)
    yield store
    await store.close()


@asynccontextmanager
async def cloud(url: str, store: RedisStore, **options: float) -> AsyncIterator[SessionLog]:
    """One instance's fan-out, connected."""
    async with (
        Publisher(url, store, **options) as publisher,  # type: ignore[arg-type]
        SessionLog(store, publisher) as log,
    ):
        assert await publisher.wait_connected(DEADLINE_S)
        yield log
        publisher.check_integrity()


@asynccontextmanager
async def device(url: str, *topics: str) -> AsyncIterator[aiomqtt.Client]:
    host, port = parse_mqtt_url(url).address
    async with aiomqtt.Client(
        host,
        port,
        protocol=aiomqtt.ProtocolVersion.V5,
        socket_options=mqtt_socket_options(),
    ) as client:
        await client.subscribe([(topic, 1) for topic in topics])
        yield client


async def messages_until(
    client: aiomqtt.Client, enough: Callable[[aiomqtt.Message], bool]
) -> list[aiomqtt.Message]:
    found = []
    async with asyncio.timeout(DEADLINE_S):
        async for message in client.messages:
            found.append(message)
            if enough(message):
                break
    return found


def head_of(message: aiomqtt.Message) -> Cursor | None:
    if not message.topic.matches(head_topic(S)) or not message.payload:
        return None
    assert isinstance(message.payload, bytes)
    return decode_head(message.payload[TAG_BYTES:])


@pytest.mark.parametrize("kind", ["mosquitto", "iotcore"])
async def test_devices_get_every_entry_in_order_and_late_ones_the_head(
    store: RedisStore, kind: str
) -> None:
    require_broker(kind)
    async with Broker.start(kind=kind) as broker, cloud(broker.url, store) as log:
        async with device(broker.url, log_topic(S)) as client:
            for seq in range(1, 51):
                await log.append(S, await producer(log, S, "p", seq), [op(str(seq))])
            replica = Replica()
            async with asyncio.timeout(DEADLINE_S):
                async for message in client.messages:
                    assert isinstance(message.payload, bytes)
                    batch = decode_log_message(message.payload[TAG_BYTES:])
                    for offset, data in enumerate(batch.ops, batch.first_offset):
                        assert replica.apply_op(batch.generation, offset, data) is Applied.APPLIED
                    if replica.cursor.offset == 50:
                        break
            assert replica.state.values == {"last": b"50"}
        async with device(broker.url, head_topic(S)) as late:
            found = await messages_until(late, lambda m: head_of(m) == replica.cursor)
            assert len(found) <= 2, "there is a head for every append"


async def test_published_sessions_are_clean(store: RedisStore, broker: Broker) -> None:
    async with cloud(broker.url, store) as log:
        await log.append(S, await producer(log, S, "p", 1), [op("a")])
        assert await store.take_dirty(10, 0.0) == [S]
    # Leaving flushed it: the head was confirmed and marked.
    assert await store.take_dirty(10, 0.0) == []


async def test_the_sweep_finds_what_a_crash_left_between_append_and_publish(
    store: RedisStore, broker: Broker
) -> None:
    result = await store.append(
        S, await producer(store, S, "p", 1), [op("a").data]
    )  # and its process dies here
    tail = Cursor(result.generation, result.tail)
    async with (
        device(broker.url, head_topic(S)) as client,
        cloud(broker.url, store, sweep_s=0.02, dirty_after_s=0.0),
    ):
        await messages_until(client, lambda message: head_of(message) == tail)
    assert await store.take_dirty(10, 0.0) == []


async def test_nothing_waits_for_a_broker_that_is_away(store: RedisStore, broker: Broker) -> None:
    async with cloud(broker.url, store, retry_s=0.05) as log:
        await log.append(S, await producer(log, S, "p", 1), [op("1")])
        broker.process.kill()
        await broker.process.wait()
        for seq in range(2, 30):
            result = await log.append(S, await producer(log, S, "p", seq), [op(str(seq))])
        tail = Cursor(result.generation, result.tail)
        assert (await log.state(S)).cursor == tail
        await broker.restart()
        # The new broker knows nothing; a device that joins now still learns the tail.
        async with device(broker.url, head_topic(S), log_topic(S)) as client:
            await messages_until(client, lambda message: head_of(message) == tail)
            await log.append(S, await producer(log, S, "p", 30), [op("30")])
            found = await messages_until(client, lambda m: m.topic.matches(log_topic(S)))
            payload = found[-1].payload
            assert isinstance(payload, bytes)
            assert decode_log_message(payload[TAG_BYTES:]).first_offset == 30


async def test_a_session_goes_idle_and_its_head_with_it(store: RedisStore, broker: Broker) -> None:
    async with (
        device(broker.url, head_topic(S)) as client,
        cloud(broker.url, store, sweep_s=0.02, head_idle_s=0.3) as log,
    ):
        await log.append(S, await producer(log, S, "p", 1), [op("a")])
        await messages_until(client, lambda message: head_of(message) is not None)
        await messages_until(client, lambda message: not message.payload)
        async with device(broker.url, head_topic(S), "probe") as late:
            await late.publish("probe", b"x", qos=1)
            first = (await messages_until(late, lambda message: True))[0]
            assert str(first.topic) == "probe", "a head is still there"


async def test_starting_without_a_broker_is_no_error(store: RedisStore) -> None:
    async with (
        Publisher("mqtt://127.0.0.1:1", store) as publisher,
        SessionLog(store, publisher) as log,
    ):
        assert not await publisher.wait_connected(0.05)
        await log.append(S, await producer(log, S, "p", 1), [op("a")])
        assert publisher.dropped == 1
        publisher.check_integrity()
    assert await store.take_dirty(10, 0.0) == [S], "nobody was told, so it stays dirty"


async def test_bad_broker_addresses_are_refused(store: RedisStore) -> None:
    for url in ("http://x", "mqtt://", "127.0.0.1:1883"):
        with pytest.raises(InvalidArgument):
            Publisher(url, store)


async def test_our_sockets_send_without_delay(broker: Broker) -> None:
    async with device(broker.url, "x") as client:
        link = client._client.socket()
        assert isinstance(link, socket.socket)
        assert link.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def append(log: SessionLog, seq: int) -> None:
    await log.append(S, await producer(log, S, "p", seq), [op(str(seq))])


def first_offset(message: aiomqtt.Message) -> int:
    assert isinstance(message.payload, bytes)
    if not message.topic.matches(log_topic(S)):
        return 0
    return decode_log_message(message.payload[TAG_BYTES:]).first_offset


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - it belongs to a task that tells nobody
            await asyncio.sleep(0.01)


async def test_a_publish_that_is_refused_was_not_published(store: RedisStore) -> None:
    async with (
        mosquitto(acl=NOBODY_PUBLISHES) as url,
        Publisher(url, store) as publisher,
        SessionLog(store, publisher) as log,
    ):
        assert await publisher.wait_connected(DEADLINE_S)
        assert publisher.publishing
        await append(log, 1)
        await until(lambda: not publisher.publishing)
        assert (publisher.published, publisher.dropped) == (0, 1)
        publisher.check_integrity()
    assert await store.take_dirty(10, 0.0) == [S], "no device was told"


async def test_a_broker_that_retains_nothing_is_used_without_it(store: RedisStore) -> None:
    async with (
        mosquitto("retain_available false") as url,
        device(url, log_topic(S)) as client,
        cloud(url, store, retry_s=0.05) as log,
    ):
        for seq in range(1, 4):
            await append(log, seq)
        await messages_until(client, lambda m: first_offset(m) == 3)
    assert await store.take_dirty(10, 0.0) == [], "its heads were taken, only not kept"


async def test_entries_beyond_the_broker_s_packets_are_left_to_the_log(store: RedisStore) -> None:
    large = ops.Set(id="large", name="v", value=b"x" * 100_000)
    async with (
        mosquitto("max_packet_size 65536") as url,
        device(url, log_topic(S), head_topic(S)) as client,
        Publisher(url, store) as publisher,
        SessionLog(store, publisher) as log,
    ):
        assert await publisher.wait_connected(DEADLINE_S)
        await append(log, 1)
        await log.append(S, await producer(log, S, "p", 2), [LogOp.of(large)])
        await append(log, 3)
        found = await messages_until(client, lambda m: (head_of(m) or Cursor()).offset == 3)
        offsets = [first_offset(m) for m in found if m.topic.matches(log_topic(S))]
        assert offsets == [1, 3]
        assert publisher.publishing


async def test_a_broker_that_hangs_is_known_to_be_silent(store: RedisStore, broker: Broker) -> None:
    async with Publisher(broker.url, store) as publisher, SessionLog(store, publisher) as log:
        assert await publisher.wait_connected(DEADLINE_S)
        os.kill(broker.process.pid, signal.SIGSTOP)
        try:
            await append(log, 1)
            await until(lambda: not publisher.publishing)
            assert publisher.connected or not publisher.silent
        finally:
            os.kill(broker.process.pid, signal.SIGCONT)
        await until(lambda: publisher.publishing)
