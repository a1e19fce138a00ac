"""The fan-out: appended entries and heads to the broker, which nothing here ever waits for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any

import aiomqtt
import structlog

from segue_cloud.mqtt.keys import LiveKeys
from segue_cloud.mqtt.outbox import LogBatch, Outbox
from segue_cloud.sessions.port import Fanout, StoredEntry
from segue_contract.errors import InvalidArgument, SegueError, StoreUnavailable
from segue_contract.ids import SessionName
from segue_contract.limits import (
    BROKER_KEEPALIVE_S,
    BROKER_RETRY_S,
    CONNECT_TIMEOUT_S,
    DIRTY_AFTER_S,
    HEAD_IDLE_S,
    MAX_MQTT_PAYLOAD_BYTES,
    MAX_SWEEP_SESSIONS,
    MQTT_PACKET_ROOM,
    PUBLISH_FLUSH_S,
    PUBLISH_INFLIGHT,
    SILENCE_LOOKS,
    SILENCE_S,
    SWEEP_INTERVAL_S,
)
from segue_contract.sync.state import Cursor
from segue_contract.topics import encode_head, encode_log_message, head_topic, log_topic, seal
from segue_contract.transport import mqtt_client
from segue_contract.transport.mqtt import MqttLogin, connect_options, parse_mqtt_url
from segue_contract.transport.together import Together

log = structlog.get_logger("segue.mqtt")


class Publisher:
    """`async with Publisher(url, store) as publisher:` connects, and connects again, by itself.

    It also sweeps: sessions that some process appended to and never confirmed as published get
    their head published, and heads of sessions that went idle are cleared.
    """

    def __init__(
        self,
        url: str,
        store: Fanout,
        *,
        retry_s: float = BROKER_RETRY_S,
        sweep_s: float = SWEEP_INTERVAL_S,
        dirty_after_s: float = DIRTY_AFTER_S,
        head_idle_s: float = HEAD_IDLE_S,
        monotonic: Callable[[], float] = time.monotonic,
        outbox: Outbox | None = None,
        login: MqttLogin = MqttLogin(),
        keys: LiveKeys | None = None,
    ) -> None:
        """`url`: mqtt://host:port or mqtts://... Raises InvalidArgument where it is none."""
        self.keys = keys or LiveKeys(store)
        self._server = parse_mqtt_url(url)
        self._login = login
        self._moving = asyncio.Event()
        self._store = store
        self._retry_s = retry_s
        self._sweep_s = sweep_s
        self._dirty_after_s = dirty_after_s
        self._head_idle_s = head_idle_s
        self._monotonic = monotonic
        self._outbox = outbox or Outbox()
        self._confirmed: dict[SessionName, Cursor] = {}
        self._wake = asyncio.Event()
        self._marks = asyncio.Event()
        self._settled = asyncio.Event()
        self._online = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.published = 0
        self._under_way: dict[int, float] = {}  # since when, oldest first
        self._count = 0
        self._refusing = ""  # why the broker took nothing of late; "": it took the last one
        self._retains = True

    async def __aenter__(self) -> Publisher:
        for name, run in (
            ("mqtt link", self._keep_connected),
            ("mqtt marks", self._mark),
            ("mqtt sweep", self._sweep),
            ("mqtt silence", self._listen),
        ):
            self._tasks.append(asyncio.create_task(run(), name=name))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Send what waits, for a moment, then stop."""
        if self.connected:
            self._outbox.hurry(self._monotonic())
            self._wake.set()
            try:
                async with asyncio.timeout(PUBLISH_FLUSH_S):
                    while not (self._outbox.empty and not self._confirmed):
                        self._settled.clear()
                        await self._settled.wait()
            except TimeoutError:
                log.warning("fanout_unfinished")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        """Of the broker, without user and password."""
        return self._server.url

    @property
    def connected(self) -> bool:
        return self._online.is_set()

    @property
    def silent(self) -> bool:
        """A publish has waited for its answer for longer than a living broker takes."""
        return self._waited_s() > SILENCE_S

    @property
    def publishing(self) -> bool:
        """Devices may count on the broker: it is there, answers, and takes what it is given."""
        return self.connected and not self.silent and not self._refusing

    @property
    def dropped(self) -> int:
        """Entries that devices had to read instead, because no message carried them."""
        return self._outbox.dropped

    def move(self, url: str) -> None:
        """Go on through another broker. Raises InvalidArgument where `url` is no address."""
        self._server = parse_mqtt_url(url)
        self._moving.set()

    async def wait_connected(self, timeout_s: float = CONNECT_TIMEOUT_S) -> bool:
        """True once the broker is there; False if that takes longer than `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._online.wait()
        except TimeoutError:
            return False
        return True

    def publish(self, session: SessionName, entries: Sequence[StoredEntry]) -> None:
        """Hand over entries that the log holds; returns at once, whatever the broker does."""
        if entries:
            online = self.connected and not self.silent
            self._outbox.add(session, entries, self._monotonic(), online=online)
            self._wake.set()

    def clear_head(self, session: SessionName) -> None:
        """The session is gone or idle: take its head from the broker."""
        self._outbox.clear_head(session)
        self._wake.set()

    def check_integrity(self) -> None:
        self._outbox.check_integrity()

    # -- the link -----------------------------------------------------------------------------

    async def _keep_connected(self) -> None:
        said = False
        while True:
            try:
                self._moving.clear()
                await self.keys.agree()  # from here on it is known, and no publish waits for it
                async with mqtt_client.MqttClient(
                    *self._server.address,
                    **connect_options(self._server, self._login),
                    keepalive=BROKER_KEEPALIVE_S,
                    timeout=CONNECT_TIMEOUT_S,
                    max_inflight_messages=PUBLISH_INFLIGHT,
                ) as client:
                    self._respect(client.limits)
                    self._outbox.restart(self._monotonic())
                    self._online.set()
                    if said:
                        log.info("broker_back", broker=self.url)
                    said = False
                    async with Together() as tasks:
                        tasks.start(self._move(), name="mqtt move")
                        tasks.start(_watch(client), name="mqtt watch")
                        tasks.start(self._pump(client, tasks), name="mqtt pump")
            except StoreUnavailable as error:
                log.warning("live_secret_unknown", error=str(error))
            except (aiomqtt.MqttError, OSError, ValueError, InvalidArgument) as error:
                if not said:
                    log.warning("broker_away", broker=self.url,
                                error=str(error))  # fmt: skip
                said = True
            finally:
                self._online.clear()
            await asyncio.sleep(self._retry_s)

    async def _move(self) -> None:
        """Ends the link once another broker is meant."""
        await self._moving.wait()
        raise aiomqtt.MqttError("the clouds publish through another broker now")

    async def _pump(self, client: mqtt_client.MqttClient, tasks: Together) -> None:
        """Send what waits; many messages may be unacknowledged at a time, in order sent."""
        room = asyncio.Semaphore(PUBLISH_INFLIGHT)

        async def send(coroutine: Coroutine[Any, Any, None]) -> None:
            await room.acquire()
            tasks.start(coroutine).add_done_callback(lambda _: room.release())

        while True:
            self._wake.clear()
            while (batch := self._outbox.next_batch()) is not None:
                await send(self._send_batch(client, batch))
            for session, cursor in self._outbox.due_heads(self._monotonic()):
                await send(self._send_head(client, session, cursor))
            for session in self._outbox.take_clears():
                await send(self._clear_head(client, session))
            due = self._outbox.next_head_s()
            try:
                async with asyncio.timeout(
                    None if due is None else max(due - self._monotonic(), 0.0)
                ):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def _send_batch(self, client: mqtt_client.MqttClient, batch: LogBatch) -> None:
        generation, offset = batch.first.generation, batch.first.offset
        body = encode_log_message(generation, offset, batch.ops)
        topic = log_topic(batch.session)
        payload = seal(await self.keys.of(batch.session, generation), topic, body)
        if await self._publish(client, topic, payload):
            self.published += len(batch.ops)
        else:
            self._outbox.dropped += len(batch.ops)

    async def _send_head(
        self, client: mqtt_client.MqttClient, session: SessionName, cursor: Cursor
    ) -> None:
        topic = head_topic(session)
        payload = seal(await self.keys.of(session, cursor.generation), topic, encode_head(cursor))
        if await self._publish(client, topic, payload, retain=self._retains):
            self._outbox.head_confirmed(session, cursor)
            before = self._confirmed.get(session, cursor)
            same = before.generation == cursor.generation
            self._confirmed[session] = max(cursor, before) if same else cursor
            self._marks.set()
        self._settled.set()

    async def _clear_head(self, client: mqtt_client.MqttClient, session: SessionName) -> None:
        if self._retains:
            await self._publish(client, head_topic(session), b"", retain=True)

    async def _publish(
        self, client: mqtt_client.MqttClient, topic: str, payload: bytes, *, retain: bool = False
    ) -> bool:
        """False where the broker refuses it: devices get it over gRPC.

        Raises:
            MqttError: the link is lost, or no answer came for `CONNECT_TIMEOUT_S`.
        """
        self._count += 1
        number = self._count
        self._under_way[number] = self._monotonic()
        try:
            await client.publish(topic, payload, qos=1, retain=retain)
        except mqtt_client.PublishRefused as refusal:
            if self._refusing != str(refusal):
                self._refusing = str(refusal)
                log.warning("broker_refuses", reason=self._refusing, topic=topic,
                            hint="Devices follow over gRPC. See its access rules.")  # fmt: skip
            return False
        finally:
            self._under_way.pop(number, None)
        if self._refusing:
            log.info("broker_takes", topic=topic)
            self._refusing = ""
        return True

    def _respect(self, limits: mqtt_client.BrokerLimits) -> None:
        """What this broker allows; larger entries are left out and read over gRPC."""
        self._under_way.clear()
        largest = MAX_MQTT_PAYLOAD_BYTES
        if limits.max_packet_bytes:
            largest = min(largest, max(limits.max_packet_bytes - MQTT_PACKET_ROOM, 0))
        if self._retains and not limits.retains:
            log.warning("broker_does_not_retain", broker=self.url,
                        hint="A device that joins asks the log; nothing is lost.")  # fmt: skip
        if largest != self._outbox.max_payload_bytes:
            log.info("broker_packet_bound", max_payload_bytes=largest)
        self._retains = limits.retains
        self._outbox.max_payload_bytes = largest

    def _waited_s(self) -> float:
        """How long the oldest publish has waited for its answer."""
        if not self.connected or not self._under_way:
            return 0.0
        return self._monotonic() - next(iter(self._under_way.values()))

    async def _listen(self) -> None:
        """Say once that the broker is silent; its link ends with the oldest publish's deadline."""
        said = False
        while True:
            await asyncio.sleep(SILENCE_S / SILENCE_LOOKS)
            if self.silent and not said:
                log.warning("broker_silent", broker=self.url,
                            seconds=round(self._waited_s(), 1))  # fmt: skip
            said = self.silent

    async def _mark(self) -> None:
        """Tell the store what the broker has; the sweep repeats whatever is lost here."""
        while True:
            await self._marks.wait()
            self._marks.clear()
            for session, cursor in list(self._confirmed.items()):
                try:
                    await self._store.mark_published(session, cursor)
                except SegueError as error:
                    log.warning("mark_failed", session=session.session, error=str(error))
                if self._confirmed.get(session) == cursor:
                    del self._confirmed[session]
            self._settled.set()

    # -- the sweep ----------------------------------------------------------------------------

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self._sweep_s)
            if not self.connected:
                continue
            try:
                await self.keys.agree()
                # Idle sessions leave the list of active ones: never before they are clean.
                if not await self._publish_dirty():
                    await self._clear_idle()
            except SegueError as error:
                log.warning("sweep_failed", error=str(error))

    async def _publish_dirty(self) -> bool:
        """True where there were any."""
        dirty = await self._store.take_dirty(MAX_SWEEP_SESSIONS, self._dirty_after_s)
        if not dirty:
            return False
        now = self._monotonic()
        for session, tail in zip(dirty, await self._store.tails(dirty), strict=True):
            if tail is not None:
                self._outbox.add_head(session, tail.cursor, now)
        log.info("republished", sessions=len(dirty))
        self._wake.set()
        return True

    async def _clear_idle(self) -> None:
        for session in await self._store.take_idle(MAX_SWEEP_SESSIONS, self._head_idle_s):
            self.clear_head(session)


async def _watch(client: mqtt_client.MqttClient) -> None:
    """Ends with MqttError when the link is lost."""
    async for _ in client.messages:
        pass
