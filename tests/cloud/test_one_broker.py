"""All clouds of a store publish through one broker, whichever of them comes, goes or comes back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from segue.cli.doctor import same_broker
from segue.local.inspect import State
from segue_cloud.mqtt.one_broker import OneBroker
from segue_cloud.sessions.broker import BrokerRecord
from segue_cloud.sessions.store import RedisStore
from segue_contract.errors import OtherBroker
from segue_contract.servers import Valkey
from segue_contract.topics import BROKER_KEY

DEADLINE_S = 20
LEASE_S = 0.6


@pytest.fixture
async def record(valkey: Valkey) -> AsyncIterator[BrokerRecord]:
    store = await RedisStore.connect(valkey.url)
    await store._wire.call(("DEL", BROKER_KEY))
    yield BrokerRecord(store._wire, LEASE_S)
    await store.close()


class House:
    """Instances on one store. A broker is a listener here: whether it answers is all that counts.

    Attributes: `brokers`, by URL, those that instances brought and that still listen.
    """

    def __init__(self, record: BrokerRecord) -> None:
        self.record = record
        self.brokers: dict[str, asyncio.Server] = {}

    async def start(self) -> str:
        server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
        url = f"mqtt://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self.brokers[url] = server
        return url

    async def end(self, url: str) -> None:
        self.brokers[url].close()
        await self.brokers.pop(url).wait_closed()

    def instance(self, name: str) -> OneBroker:
        return OneBroker(self.record, name, self.start)

    @asynccontextmanager
    async def running(self, name: str, given: str = "") -> AsyncIterator[str]:
        broker = self.instance(name)
        url = await broker.settle(given)
        async with broker:
            yield url


@pytest.fixture
async def house(record: BrokerRecord) -> AsyncIterator[House]:
    house = House(record)
    async with asyncio.timeout(DEADLINE_S):
        yield house
    for url in list(house.brokers):
        await house.end(url)


async def test_a_cloud_without_a_broker_of_its_own_uses_that_of_the_others(house: House) -> None:
    async with house.running("a") as first, house.running("b") as second:
        assert second == first
        await asyncio.sleep(2 * LEASE_S)  # longer than a lease: it is renewed
        async with house.running("c") as third:
            assert third == first
    assert len(house.brokers) == 1


async def test_a_cloud_with_another_broker_is_refused_while_the_first_runs(house: House) -> None:
    given = "mqtt://127.0.0.1:1"  # nobody listens: a broker may be away for a while
    async with house.running("a", given):
        with pytest.raises(OtherBroker) as raised:
            await house.instance("b").settle("mqtt://127.0.0.1:2")
        assert raised.value.fields["url"] == given
        assert given in raised.value.hint
        async with house.running("c", "mqtt://localhost:1") as same, house.running("d") as none:
            assert same == none == given
    async with house.running("b", "mqtt://127.0.0.1:2") as url:  # once the lease is over
        assert url == "mqtt://127.0.0.1:2"


async def test_a_cloud_that_died_with_its_broker_comes_back_with_another(house: House) -> None:
    """Within the lease: the record still names what is gone."""
    first = await house.instance("a").settle("")
    await house.end(first)
    async with house.running("a") as second:
        assert second != first
        known = await house.record.look()
        assert known is not None
        assert (known.url, known.owner) == (second, "a")
    assert await house.record.look() is None, "a planned end leaves nothing to wait for"


async def test_a_given_broker_replaces_that_of_a_cloud_that_died(house: House) -> None:
    await house.end(await house.instance("a").settle(""))
    async with house.running("b", "mqtt://127.0.0.1:1") as url:
        assert url == "mqtt://127.0.0.1:1"


async def test_those_that_used_the_broker_of_a_dead_cloud_follow_to_the_next(house: House) -> None:
    first = await house.instance("a").settle("")
    second = house.instance("b")
    moved: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    second.moved = moved.set_result
    assert await second.settle("") == first
    async with second:
        await house.end(first)
        async with house.running("a") as new:
            assert await moved == new


async def test_of_two_that_begin_at_once_one_broker_is_used(house: House) -> None:
    both = [house.instance(name) for name in "ab"]
    urls = await asyncio.gather(*(one.settle("") for one in both))
    assert urls[0] == urls[1]


async def test_a_login_is_neither_kept_nor_told(house: House, valkey: Valkey) -> None:
    async with house.running("a", "mqtt://cloud:hunter2@127.0.0.1:1") as url:
        assert url == "mqtt://127.0.0.1:1"
        known = await house.record.look()
        assert known is not None
        assert known.url == url
        with pytest.raises(OtherBroker) as caught:
            async with house.running("b", "mqtt://cloud:hunter2@127.0.0.1:2"):
                pass
        assert "hunter2" not in str(caught.value)


async def test_doctor_names_the_broker_of_the_clouds(house: House, valkey: Valkey) -> None:
    async with house.running("a", "mqtt://127.0.0.1:1"):
        same = await same_broker(valkey.url, "mqtt://localhost:1")
        other = await same_broker(valkey.url, "mqtt://127.0.0.1:2")
        login = await same_broker(valkey.url, "mqtts://cloud:hunter2@127.0.0.1:2")
    assert same.state is State.OK
    assert login.state is State.BAD
    assert "hunter2" not in login.value + login.advice
    assert other.state is State.BAD
    assert "mqtt://127.0.0.1:1" in other.value
    assert "mqtt://127.0.0.1:1" in other.advice
