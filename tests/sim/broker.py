"""An MQTT broker with its misbehaviours, and `aiomqtt.Client` as the product uses it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import aiomqtt

from segue_contract.transport.mqtt_client import BrokerLimits, PublishRefused
from tests.sim.network import End
from tests.sim.process import current
from tests.sim.world import World

ADDRESS = "broker:1883"
URL = f"mqtt://{ADDRESS}"


@dataclass
class _Session:
    end: End
    topics: set[str]
    will: tuple[str, bytes] | None = None


class Broker:
    """QoS 1 for everything.

    Attributes:
        drops, doubles: shares of the messages to subscribers that are lost or come twice.
        refuses: publishes are answered with a reason code that says no.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.drops = 0.0
        self.doubles = 0.0
        self.refuses = False
        self._rng = world.rng("broker")
        self._retained: dict[str, bytes] = {}
        self._sessions: list[_Session] = []
        self._start()

    def _start(self) -> None:
        self.process = self.world.process("broker")
        self.world.network.listen(self.process, ADDRESS, self._accept)

    def restart(self, down_s: float) -> None:
        """Killed, and back with nothing: no sessions, no retained messages."""
        self.world.say("broker", "restart", down_s)
        self.process.kill()
        self._retained.clear()
        self._sessions.clear()
        self.world.loop.call_later(down_s, self._start, context=self.world.network._outside.copy())

    def drop_sessions(self, *, silently: bool) -> None:
        """Forget every session: connections break, or stand and bring nothing any more."""
        self.world.say("broker", "drop sessions", silently)
        sessions, self._sessions = self._sessions, []
        for session in sessions:
            session.topics.clear()
            session.will = None
            if not silently:
                session.end.close()

    def _accept(self, end: End) -> None:
        session = _Session(end, set())
        self._sessions.append(session)
        end.on_message = lambda message: self._took(session, message)
        end.on_lost = lambda: self._left(session)

    def _left(self, session: _Session) -> None:
        if session in self._sessions:
            self._sessions.remove(session)
        if session.will is not None:
            self._publish(*session.will, retain=False)

    def _took(self, session: _Session, message: tuple[Any, ...]) -> None:
        kind, number = message[0], message[1]
        if kind == "connect":
            session.will = message[2]
            session.end.send(("ack", number, 0))
        elif kind == "publish":
            _, _, topic, payload, retain = message
            if self.refuses:
                session.end.send(("ack", number, 0x87))
                return
            self._publish(topic, payload, retain)
            session.end.send(("ack", number, 0))
        elif kind == "subscribe":
            session.topics.update(message[2])
            session.end.send(("ack", number, [1] * len(message[2])))
            for topic in message[2]:
                if topic in self._retained:
                    self._send(session, topic, self._retained[topic])
        elif kind == "unsubscribe":
            session.topics.difference_update(message[2])
            session.end.send(("ack", number, 0))
        elif kind == "ping":
            session.end.send(("pong", number))

    def _publish(self, topic: str, payload: bytes, retain: bool) -> None:
        if retain and payload:
            self._retained[topic] = payload
        elif retain:
            self._retained.pop(topic, None)
        for session in self._sessions:
            if topic not in session.topics or self._rng.random() < self.drops:
                continue
            self._send(session, topic, payload)
            if self._rng.random() < self.doubles:
                self._send(session, topic, payload)

    def _send(self, session: _Session, topic: str, payload: bytes) -> None:
        session.end.send(("message", 0, topic, payload))


class Client:
    """As `MqttClient`, as far as the product uses it."""

    limits = BrokerLimits()
    ended_by = 0

    def __init__(self, world: World, host: str, port: int = 1883, **options: Any) -> None:
        self._world = world
        self._address = f"{host}:{port}"
        self._timeout_s = float(options.get("timeout") or 10.0)
        self._keepalive_s = float(options.get("keepalive") or 60)
        self._end: End | None = None
        self._numbers = 0
        self._acks: dict[int, asyncio.Future[Any]] = {}
        self._inbox: asyncio.Queue[Any] = asyncio.Queue()
        self._lost = world.loop.create_future()
        self._alive_s = 0.0
        self._pinging: asyncio.Task[None] | None = None
        self.limits = BrokerLimits()

    async def __aenter__(self) -> Client:
        process = current()
        assert process is not None
        try:
            async with asyncio.timeout(self._timeout_s):
                self._end = await self._world.network.connect(process, self._address)
                self._end.on_message = self._took
                self._end.on_lost = self._broke
                await self._ask("connect", None)
        except (OSError, TimeoutError) as error:
            if self._end is not None:
                self._end.close()
            raise aiomqtt.MqttError(f"Could not connect: {error}") from error
        self._alive_s = self._world.loop.time()
        self._pinging = asyncio.create_task(self._ping(), name="mqtt ping")
        return self

    async def __aexit__(self, *_: Any) -> None:
        if self._pinging is not None:
            self._pinging.cancel()
        if self._end is not None:
            self._end.close()
        self._broke()

    async def publish(
        self, topic: str, payload: bytes = b"", qos: int = 0, retain: bool = False, **_: Any
    ) -> None:
        code = await self._ask("publish", topic, payload, retain)
        if code >= 0x80:
            raise PublishRefused(code)

    async def subscribe(self, topics: Any, timeout: float | None = None, **_: Any) -> list[Any]:
        names = [topic for topic, _ in topics]
        codes: list[Any] = await self._ask("subscribe", names, timeout=timeout)
        return codes

    async def unsubscribe(self, topics: Any, timeout: float | None = None, **_: Any) -> None:
        await self._ask("unsubscribe", list(topics), timeout=timeout)

    @property
    def messages(self) -> AsyncIterator[Any]:
        return self._messages()

    async def _messages(self) -> AsyncIterator[Any]:
        while True:
            item = await self._inbox.get()
            if item is None:
                raise aiomqtt.MqttError("Disconnected during message iteration")
            yield item

    async def _ask(self, kind: str, *parts: Any, timeout: float | None = None) -> Any:
        if self._end is None or not self._end.open:
            raise aiomqtt.MqttError("Not connected.")
        self._numbers += 1
        number = self._numbers
        self._acks[number] = answer = self._world.loop.create_future()
        self._end.send((kind, number, *parts))
        late = self._world.loop.call_later(timeout or self._timeout_s, _expire, answer)
        try:
            return await answer
        finally:
            late.cancel()
            self._acks.pop(number, None)

    async def _ping(self) -> None:
        while True:
            await asyncio.sleep(self._keepalive_s)
            if self._world.loop.time() - self._alive_s > 1.5 * self._keepalive_s:
                assert self._end is not None
                self._end.close()
                self._broke()
                return
            assert self._end is not None
            self._end.send(("ping", 0))

    def _took(self, message: tuple[Any, ...]) -> None:
        self._alive_s = self._world.loop.time()
        kind, number = message[0], message[1]
        if kind == "ack":
            answer = self._acks.get(number)
            if answer is not None and not answer.done():
                answer.set_result(message[2])
        elif kind == "message":
            topic = SimpleNamespace(value=message[2])
            self._inbox.put_nowait(
                SimpleNamespace(topic=topic, payload=message[3], retain=False, qos=1)
            )

    def _broke(self) -> None:
        for answer in self._acks.values():
            if not answer.done():
                answer.set_exception(aiomqtt.MqttError("Disconnected"))
        self._inbox.put_nowait(None)


def _expire(answer: asyncio.Future[Any]) -> None:
    if not answer.done():
        answer.set_exception(aiomqtt.MqttError("Operation timed out"))
