"""A device's view of a session ends where the log does, whatever the broker does or is told.

Real store, broker and gRPC; devices are the SDK's.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest

import segue
from segue.events import Entry, Snapshot
from segue.follow import Follower
from segue_cloud.sessions.keys import SECRET_KEY
from segue_cloud.sessions.store import RedisStore
from segue_contract.ids import SessionName
from segue_contract.servers import Broker, Valkey
from segue_contract.sync.ops import Op, Set, encode_op
from segue_contract.sync.state import Cursor
from segue_contract.topics import encode_head, encode_log_message, head_topic, log_topic, seal
from segue_contract.transport.mqtt import parse_mqtt_url
from segue_contract.transport.mqtt_client import MqttClient
from tests.support.brokers import NOBODY_PUBLISHES, mosquitto
from tests.support.cloud_rpc import cloud_rpc
from tests.support.scripted_engine import ScriptedEngine

DEADLINE_S = 30
_numbers = count()


class Watcher:
    """Another device, which folds what it is given as an app would."""

    def __init__(self, following: Follower) -> None:
        self.following = following
        self.values: dict[str, bytes] = {}
        self.offset = 0
        self.snapshots = 0
        self._changed = asyncio.Event()
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        async for item in self.following:
            if isinstance(item, Snapshot):
                self.snapshots += 1
                self.values = dict(item.state.values)
            elif isinstance(item, Entry):
                assert item.offset == self.offset + 1, "an entry twice, or one is missing"
                if isinstance(item.op, Set):
                    self.values[item.op.name] = item.op.value
            self.offset = item.offset
            self._changed.set()

    async def until(self, seen: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not seen():
                self._changed.clear()
                changed = asyncio.ensure_future(self._changed.wait())
                await asyncio.wait({self.task, changed}, return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
                if self.task.done():
                    self.task.result()


@dataclass
class View:
    session: segue.Session  # who writes
    watcher: Watcher  # who follows
    url: str
    name: SessionName

    @property
    def key(self) -> bytes:
        return self.session._live_key

    async def forge(self, offset: int, *ops: Op, key: bytes | None = None) -> None:
        """Publish entries that the log does not have, as whoever has the session's key can, and
        a store that lost entries seems to; without the key: as anybody who reaches the broker."""
        host, port = parse_mqtt_url(self.url).address
        generation = self.watcher.following.cursor.generation
        async with MqttClient(host, port) as client:
            body = encode_log_message(generation, offset, [encode_op(op) for op in ops])
            topic = log_topic(self.name)
            await client.publish(topic, seal(key or self.key, topic, body), qos=1)

    async def forge_head(self, cursor: Cursor) -> None:
        host, port = parse_mqtt_url(self.url).address
        async with MqttClient(host, port) as client:
            topic = head_topic(self.name)
            await client.publish(topic, seal(self.key, topic, encode_head(cursor)), qos=1)


@asynccontextmanager
async def view(valkey: Valkey, model_dir: Path, url: str) -> AsyncIterator[View]:
    name = SessionName("default", f"trip-{next(_numbers)}")
    engine = ScriptedEngine(range(100, 110))
    async with (
        asyncio.timeout(2 * DEADLINE_S),
        cloud_rpc(valkey.url, model_dir, engine, mqtt_url=url) as cloud,
        segue.Client(cloud.address, device="writer") as writing,
        segue.Client(cloud.address, device="watcher") as watching,
    ):
        session = await writing.session(name.session)
        watcher = Watcher((await watching.session(name.session)).follow())
        try:
            await watcher.until(lambda: watcher.snapshots > 0)
            yield View(session, watcher, url, name)
        finally:
            watcher.task.cancel()
            await asyncio.gather(watcher.task, return_exceptions=True)


@pytest.fixture
async def over_mqtt(valkey: Valkey, model_dir: Path, broker: Broker) -> AsyncIterator[View]:
    async with view(valkey, model_dir, broker.url) as found:
        await found.session.set("a", "true")
        await found.watcher.until(lambda: "a" in found.watcher.values)
        assert found.watcher.following.live == "mqtt"
        yield found


def forged(text: str) -> Set:
    return Set(id=f"forged-{text}", device="nobody", name=text, value=b"FORGED")


async def test_a_forged_entry_is_taken_back_though_nobody_writes(over_mqtt: View) -> None:
    watcher = over_mqtt.watcher
    await over_mqtt.forge(watcher.offset + 1, forged("a"), forged("b"))
    await watcher.until(lambda: watcher.values.get("a") == b"FORGED")
    await watcher.until(lambda: watcher.values == {"a": b"true"})


async def test_the_true_entry_of_a_forged_one_s_place_is_seen(over_mqtt: View) -> None:
    watcher = over_mqtt.watcher
    await over_mqtt.forge(watcher.offset + 1, forged("a"))
    await watcher.until(lambda: watcher.values.get("a") == b"FORGED")
    await over_mqtt.session.set("b", "true")
    await watcher.until(lambda: watcher.values == {"a": b"true", "b": b"true"})
    for number in range(20):
        await over_mqtt.session.set("n", str(number))
    await watcher.until(lambda: watcher.values.get("n") == b"19")
    assert watcher.values == {"a": b"true", "b": b"true", "n": b"19"}


async def test_entries_that_grew_upon_a_forged_one_are_right_in_the_end(over_mqtt: View) -> None:
    """The forged entry came as early as the true one was on its way: no place is told twice."""
    watcher, known = over_mqtt.watcher, over_mqtt.watcher.following._view
    true = await over_mqtt.session.set("b", "true")
    await watcher.until(lambda: "b" in watcher.values)
    # As if the forged op had been at that place when the true one came, and was never contradicted.
    known._digests.add(true.offset, encode_op(forged("b")))
    known.state.values["b"] = b"FORGED"
    watcher.values["b"] = b"FORGED"
    await over_mqtt.session.set("c", "true")
    await watcher.until(lambda: watcher.values.get("b") == b"true")
    assert watcher.values == {"a": b"true", "b": b"true", "c": b"true"}


async def test_what_is_forged_for_later_or_for_nowhere_changes_nothing(over_mqtt: View) -> None:
    watcher = over_mqtt.watcher
    await over_mqtt.forge(watcher.offset + 3, forged("later"))
    await over_mqtt.forge(1, forged("a"))
    await over_mqtt.forge_head(Cursor(watcher.following.cursor.generation + 5, 7))
    for number in range(4):
        await over_mqtt.session.set("n", str(number))
    await watcher.until(lambda: watcher.values == {"a": b"true", "n": b"3"})


async def test_what_nobody_sealed_is_counted_and_not_taken(over_mqtt: View) -> None:
    watcher = over_mqtt.watcher
    for number in range(20):
        await over_mqtt.forge(watcher.offset + 1 + number, forged("a"), key=b"?" * 32)
    await over_mqtt.session.set("b", "true")
    await watcher.until(lambda: "b" in watcher.values)
    await watcher.until(lambda: watcher.following.unauthentic == 20)
    assert watcher.values == {"a": b"true", "b": b"true"}
    assert watcher.following.live == "mqtt"


async def test_a_store_that_lost_its_secret_gets_it_back(over_mqtt: View, valkey: Valkey) -> None:
    """And where another one was there first, instances and devices go over to that."""
    store = await RedisStore.connect(valkey.url)
    watcher = over_mqtt.watcher

    async def secret() -> bytes | None:
        (found,) = await store._wire.call(("GET", SECRET_KEY))
        return found  # type: ignore[no-any-return]

    before = await secret()
    await store._wire.call(("DEL", SECRET_KEY))
    async with asyncio.timeout(DEADLINE_S):
        while await secret() != before:  # noqa: ASYNC110 - nobody tells of it
            await asyncio.sleep(0.02)
    await store._wire.call(("SET", SECRET_KEY, b"another" * 5))
    numbers = count()
    while watcher.following.unauthentic == 0 or watcher.following._seal.outdated(
        watcher.following.cursor.generation
    ):
        number = next(numbers)
        await over_mqtt.session.set("n", str(number))
        await watcher.until(lambda number=number: watcher.values.get("n") == b"%d" % number)
    seen = watcher.following.unauthentic
    await over_mqtt.session.set("n", "last")
    await watcher.until(lambda: watcher.values.get("n") == b"last")
    assert watcher.following.unauthentic == seen
    assert await secret() == b"another" * 5
    await store.close()


BROKERS = {
    "nobody may publish": ("", NOBODY_PUBLISHES),
    "nothing is retained": ("retain_available false", ""),
    "small packets": ("max_packet_size 4096", ""),
    "few messages wait": ("max_queued_messages 1\nmax_inflight_messages 1", ""),
}


@pytest.mark.parametrize("which", BROKERS)
async def test_what_a_broker_does_not_bring_is_seen_all_the_same(
    valkey: Valkey, model_dir: Path, which: str, capfd: pytest.CaptureFixture[str]
) -> None:
    more, acl = BROKERS[which]
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(mosquitto(more, acl=acl))
        found = await stack.enter_async_context(view(valkey, model_dir, url))
        expected: dict[str, bytes] = {}
        for number in range(12):
            value = b"x" * 20_000 if number % 3 == 0 else b"small"
            await found.session.set(f"v{number}", value)
            expected[f"v{number}"] = value
        await found.watcher.until(lambda: found.watcher.values == expected)
        assert found.watcher.snapshots == 1, "every entry was seen, not only what they come to"
    assert "Traceback" not in capfd.readouterr().err


async def test_a_broker_that_stands_still_holds_nothing_up(valkey: Valkey, model_dir: Path) -> None:
    async with Broker.start() as broker, view(valkey, model_dir, broker.url) as found:
        await found.session.set("a", "1")
        await found.watcher.until(lambda: "a" in found.watcher.values)
        os.kill(broker.process.pid, signal.SIGSTOP)
        try:
            await found.session.set("b", "2")
            await found.watcher.until(lambda: "b" in found.watcher.values)
            assert found.watcher.following.live == "grpc"
        finally:
            os.kill(broker.process.pid, signal.SIGCONT)
        await found.session.set("c", "3")
        await found.watcher.until(lambda: "c" in found.watcher.values)
