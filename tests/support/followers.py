"""Followers of a fake log over a real broker, and the cloud's side of that broker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiomqtt

import segue
from segue_contract.ids import DEFAULT_TENANT, SessionName
from segue_contract.limits import ClientLimits
from segue_contract.servers import Broker
from segue_contract.sync.ops import Set
from segue_contract.sync.state import Cursor
from segue_contract.topics import encode_head, encode_log_message, head_topic, log_topic, seal
from segue_contract.transport.mqtt import mqtt_socket_options, parse_mqtt_url
from tests.support.fake_agent import LIVE_KEY, FakeLog

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
            body = encode_log_message(self._log.generation, offset, [data])
            await self._sealed(0, body)

    async def raw(self, payload: bytes) -> None:
        await self._mqtt.publish(self._topics[0], payload, qos=1)

    async def head(self) -> None:
        await self._sealed(
            1, encode_head(Cursor(self._log.generation, self._log.tail)), retain=True
        )

    async def _sealed(self, at: int, body: bytes, *, retain: bool = False) -> None:
        topic = self._topics[at]
        await self._mqtt.publish(topic, seal(LIVE_KEY, topic, body), qos=1, retain=retain)


@asynccontextmanager
async def publishing(broker: Broker, log: FakeLog) -> AsyncIterator[Publisher]:
    host, port = parse_mqtt_url(broker.url).address
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
