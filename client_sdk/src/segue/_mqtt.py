"""One MQTT connection, shared by all followed sessions of a client, or of one session where the
broker wants a login for each.

It reconnects by itself and subscribes again; the sinks are told when messages flow and when they
stop. Messages are handed over as they come: the bound on what waits is the sink's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Sequence
from random import Random
from typing import Protocol

import aiomqtt

from segue._broker_login import Admit, BrokerLogin
from segue_contract.errors import InvalidArgument, PermissionDenied, SegueError
from segue_contract.limits import (
    BROKER_KEEPALIVE_S,
    BROKER_RETRY_MAX_S,
    BROKER_RETRY_S,
    CONNECT_TIMEOUT_S,
    LOGIN_PAUSE_S,
    SUBSCRIBE_TIMEOUT_S,
)
from segue_contract.transport import mqtt_client
from segue_contract.transport.mqtt import MqttLogin, connect_options, parse_mqtt_url
from segue_contract.transport.tls import TlsFiles
from segue_contract.transport.together import end

log = logging.getLogger("segue.mqtt")
log.addHandler(logging.NullHandler())  # an app's terminal is its own

# Reason codes of MQTT 5: bad user name or password, not authorized, banned, ended by an
# administrator (who deleted the login).
_REFUSALS = (0x86, 0x87, 0x8A, 0x98)


class Sink(Protocol):
    """Who listens to some topics. Neither method may wait."""

    def on_message(self, topic: str, payload: bytes) -> None: ...

    def on_link(self, up: bool) -> None:
        """True: the broker confirmed the subscription. False: nothing will come for now."""
        ...


class Broker:
    """Connects when the first sink comes; `close` ends it.

    Args:
        url: "mqtt://host:port" or "mqtts://...", with a user and a password where it needs them.
        tls: whom mqtts:// believes, and our certificate.
        admit: gives this device a login, where the broker wants one of each device and session.

    Attributes:
        refusal: why the broker let us not in, or not read; None: it did, or was not reached.

    Raises:
        InvalidArgument: the url is not a broker's.
    """

    def __init__(
        self, url: str, tls: TlsFiles | None = None, *, admit: Admit | None = None
    ) -> None:
        self._server = parse_mqtt_url(url)
        self._tls = tls or TlsFiles()
        self._own = BrokerLogin(admit, self._tls) if admit is not None else None
        self.refusal: SegueError | None = None
        self._sinks: dict[str, list[Sink]] = {}
        self._mqtt: mqtt_client.MqttClient | None = None
        self._down = False  # the last attempt failed
        self._told: bool | None = None  # what the sinks know of the link
        self._pause_s = BROKER_RETRY_S
        self._random = Random(os.urandom(8))
        self._task: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()  # of that task
        self._ending: asyncio.Task[None] | None = None  # the one before it

    async def add(self, topics: Sequence[str], sink: Sink) -> None:
        """Listen to `topics` (QoS 1). Returns at once; `on_link` tells what became of it."""
        for topic in topics:
            self._sinks.setdefault(topic, []).append(sink)
        if self._task is None:
            self._stopping = asyncio.Event()
            run = self._run(self._stopping, self._ending)
            self._task = asyncio.create_task(run, name=f"mqtt {self._server.url}")
        elif self._mqtt is not None:
            sink.on_link(await self._subscribe(self._mqtt, topics))
        elif self._down:
            sink.on_link(False)

    async def remove(self, topics: Sequence[str], sink: Sink) -> None:
        """Stop listening; topics that nobody else listens to are unsubscribed."""
        unused = []
        for topic in topics:
            sinks = self._sinks.get(topic, [])
            with contextlib.suppress(ValueError):
                sinks.remove(sink)
            if not sinks and self._sinks.pop(topic, None) is not None:
                unused.append(topic)
        if unused and self._mqtt is not None:
            with contextlib.suppress(aiomqtt.MqttError):
                await self._mqtt.unsubscribe(unused, timeout=SUBSCRIBE_TIMEOUT_S)
        if self._own is not None and not self._sinks:
            await self.close()  # of one session, which nobody follows now

    async def close(self) -> None:
        task, self._task, self._mqtt = self._task, None, None
        if task is None:
            return
        self._ending = task
        self._stopping.set()
        await _ended(task)

    async def _run(self, stopping: asyncio.Event, before: asyncio.Task[None] | None) -> None:
        """Two connections at once would throw each other out: they have one name."""
        if before is not None:
            await _ended(before)
        self._down = False
        while not stopping.is_set():
            pause_s = self._pause_s
            try:
                login = await self._logged_in()
                if login is None:
                    pause_s = LOGIN_PAUSE_S
                else:
                    await self._connect(login, stopping)
            except aiomqtt.MqttCodeError as error:
                self._refused(error.rc)
            except (aiomqtt.MqttError, InvalidArgument):
                pass  # sessions are followed over gRPC meanwhile
            finally:
                self._mqtt, self._down = None, True
                if stopping.is_set():
                    self._told = None  # who listens by now is the next task's
                else:
                    self._tell(False)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s * self._random.uniform(0.5, 1.5)):
                    await stopping.wait()
            self._pause_s = min(2 * self._pause_s, BROKER_RETRY_MAX_S)

    async def _logged_in(self) -> MqttLogin | None:
        """None: the cloud gives us no login now."""
        if self._own is None:
            return MqttLogin(tls=self._tls)
        return self._own.login or await self._own.ask()

    async def _connect(self, login: MqttLogin, stopping: asyncio.Event) -> None:
        """Until the connection is lost, not wanted any more, or another login is to be used."""
        async with mqtt_client.MqttClient(
            *self._server.address,
            **connect_options(self._server, login),
            identifier=self._own.user if self._own is not None else None,
            clean_start=True,
            keepalive=BROKER_KEEPALIVE_S,
            timeout=CONNECT_TIMEOUT_S,
        ) as mqtt:
            try:
                await self._serve(mqtt, stopping)
            except aiomqtt.MqttError:
                self._refused(mqtt.ended_by)
                raise

    def _refused(self, code: object, *, known: bool = False) -> None:
        """A reason code of MQTT 5 (`known`: of somebody whom it let in): a login that was ended, or
        may not read this. Said once, and to whoever asks the follower, which goes on over gRPC."""
        value = code if isinstance(code, int) else getattr(code, "value", 0)
        if value not in _REFUSALS:
            return
        if self._own is not None and not known:
            self._own.forget()  # the next one is asked for
        if self.refusal is None:
            log.warning("%s does not take us: %s; sessions go on over gRPC", self._server.url, code)
        self.refusal = PermissionDenied(
            f"The broker {self._server.url} refused: {code}.",
            hint="The session is followed over gRPC. See the broker's access rules.",
        )

    async def _serve(self, mqtt: mqtt_client.MqttClient, stopping: asyncio.Event) -> None:
        """Until the connection is lost (MqttError), `close`, or a refused subscription."""
        if stopping.is_set():
            return
        self._mqtt = mqtt
        pump = asyncio.create_task(self._pump(mqtt), name="mqtt messages")
        ends = {pump, asyncio.create_task(stopping.wait(), name="mqtt stopping")}
        if self._own is not None:
            ends.add(asyncio.create_task(self._own.keep(), name="mqtt login"))
        try:
            topics = list(self._sinks)
            if (topics and not await self._subscribe(mqtt, topics)) or stopping.is_set():
                return
            self._down = False
            self.refusal = None
            self._pause_s = BROKER_RETRY_S
            self._tell(True)
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if pump.done():
                pump.result()
        finally:
            await end(*ends)

    async def _subscribe(self, mqtt: mqtt_client.MqttClient, topics: Sequence[str]) -> bool:
        try:
            codes = await mqtt.subscribe(
                [(topic, 1) for topic in topics], timeout=SUBSCRIBE_TIMEOUT_S
            )
        except aiomqtt.MqttError:
            return False
        # MQTT 5 reason codes from 128 on are refusals
        refused = [c for c in codes if (c if isinstance(c, int) else c.value) >= 128]
        for code in refused:
            self._refused(code, known=True)
        return not refused

    async def _pump(self, mqtt: mqtt_client.MqttClient) -> None:
        async for message in mqtt.messages:
            payload = message.payload
            if not isinstance(payload, bytes):
                continue
            topic = message.topic.value
            for sink in tuple(self._sinks.get(topic, ())):
                sink.on_message(topic, payload)

    def _tell(self, up: bool) -> None:
        """News of the link; that it is still away is none."""
        if up is self._told:
            return
        self._told = up
        for sink in {id(sink): sink for sinks in self._sinks.values() for sink in sinks}.values():
            sink.on_link(up)


async def _ended(task: asyncio.Task[None]) -> None:
    """Wait for it; a connection being made ends in a thread, and is better waited for than
    abandoned."""
    done, _ = await asyncio.wait({task}, timeout=SUBSCRIBE_TIMEOUT_S)
    if not done:
        await end(task)
