"""Mosquitto's dynamic-security plugin: who may log in and read what, changed while it runs.

Commands are JSON on `$CONTROL/dynamic-security/v1`; answers come on `.../response`, to all who
administer it, each with the `correlationData` of its command.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import aiomqtt
import msgspec
import structlog

from segue_contract.errors import UNREADABLE, InvalidArgument, Unreachable
from segue_contract.ids import new_id
from segue_contract.limits import (
    BROKER_ADMIN_RETRY_S,
    BROKER_ADMIN_TIMEOUT_S,
    BROKER_KEEPALIVE_S,
    BROKER_RETRY_S,
    CONNECT_TIMEOUT_S,
    SUBSCRIBE_TIMEOUT_S,
)
from segue_contract.transport import mqtt_client
from segue_contract.transport.mqtt import MqttLogin, connect_options, parse_mqtt_url
from segue_contract.transport.together import Together, end

log = structlog.get_logger("segue.mqtt")

_TOPIC = "$CONTROL/dynamic-security/v1"
_REFUSED = 128

Command = Mapping[str, Any]


class _Response(msgspec.Struct):
    command: str = ""
    correlationData: str = ""
    error: str = ""
    data: dict[str, Any] = {}


class _Responses(msgspec.Struct):
    responses: list[_Response] = []


class NotAdministered(Exception):
    """This broker, or this login of it, gives us nothing to administer."""


class DynamicSecurity:
    """`async with DynamicSecurity(url, login) as admin:` connects, and connects again, by itself.

    Attributes:
        ready: the broker takes commands of ours, and denies whatever they do not allow.
        why_not: what it lacks, where it is not.
    """

    def __init__(self, url: Callable[[], str], login: MqttLogin) -> None:
        """`url`: asked for each connection."""
        self._url = url
        self._login = login
        self.ready = False
        self.why_not = ""
        self.on_ready: Callable[[], None] = lambda: None
        self._client: mqtt_client.MqttClient | None = None
        self._known = asyncio.Event()
        self._numbers = itertools.count()
        self._name = new_id("a", os.urandom)
        self._answers: dict[str, asyncio.Future[_Response]] = {}
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> DynamicSecurity:
        self._task = asyncio.create_task(self._keep_connected(), name="mqtt admin")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._task is not None:
            await end(self._task)

    async def wait_known(self, timeout_s: float = CONNECT_TIMEOUT_S) -> bool:
        """Whether it is `ready`, once that is known; False where it takes longer."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._known.wait()
        except TimeoutError:
            pass
        return self.ready

    async def run(self, *commands: Command) -> list[_Response]:
        """In order; each answer has an `error`, or "".

        Raises:
            Unreachable: the broker did not answer in time. Commands may have been carried out.
        """
        client = self._client
        if client is None:
            raise Unreachable("The broker is away.")
        numbers = [f"{self._name}.{next(self._numbers)}" for _ in commands]
        sent = [
            {**command, "correlationData": number}
            for command, number in zip(commands, numbers, strict=True)
        ]
        loop = asyncio.get_running_loop()
        waiting = {number: loop.create_future() for number in numbers}
        self._answers.update(waiting)
        try:
            async with asyncio.timeout(BROKER_ADMIN_TIMEOUT_S):
                payload = msgspec.json.encode({"commands": sent})
                await client.publish(_TOPIC, payload, qos=1)
                return [await waiting[number] for number in numbers]
        except mqtt_client.PublishRefused as refusal:
            raise Unreachable(f"The broker takes no commands: {refusal}.") from refusal
        except (TimeoutError, aiomqtt.MqttError) as error:
            raise Unreachable("The broker did not answer a command in time.") from error
        finally:
            for number in numbers:
                self._answers.pop(number, None)

    # -- the link -----------------------------------------------------------------------------

    async def _keep_connected(self) -> None:
        said = ""
        while True:
            pause_s = BROKER_RETRY_S
            try:
                server = parse_mqtt_url(self._url())
                async with mqtt_client.MqttClient(
                    *server.address,
                    **connect_options(server, self._login),
                    keepalive=BROKER_KEEPALIVE_S,
                    timeout=CONNECT_TIMEOUT_S,
                ) as client:
                    await self._serve(client)
            except NotAdministered as reason:
                self.why_not, pause_s = str(reason), BROKER_ADMIN_RETRY_S
                if said != self.why_not:
                    log.info("broker_not_administered", reason=self.why_not)
                said = self.why_not
                self._known.set()
            except (aiomqtt.MqttError, OSError, ValueError, InvalidArgument) as error:
                self.why_not = str(error)  # the publisher tells of it
            finally:
                self.ready, self._client = False, None
            await asyncio.sleep(pause_s)

    async def _serve(self, client: mqtt_client.MqttClient) -> None:
        try:
            (code,) = await client.subscribe(
                [(f"{_TOPIC}/response", 1)], timeout=SUBSCRIBE_TIMEOUT_S
            )
        except aiomqtt.MqttError as error:
            raise NotAdministered(f"the broker refuses {_TOPIC}: {error}") from error
        if (code if isinstance(code, int) else code.value) >= _REFUSED:
            raise NotAdministered(f"our login may not read {_TOPIC}")
        self._client = client
        async with Together() as tasks:
            pump = tasks.start(self._pump(client), name="mqtt admin answers")
            try:
                await self._check()
            except NotAdministered as reason:
                if pump.done():
                    raise aiomqtt.MqttError("The connection was lost.") from reason
                raise
            self.ready, self.why_not = True, ""
            log.info("broker_administered", broker=parse_mqtt_url(self._url()).url)
            self._known.set()
            self.on_ready()
            # and until the link is lost

    async def _check(self) -> None:
        """Raises NotAdministered where the plugin is not there, or lets everybody read."""
        try:
            access, anonymous = await self.run(
                {"command": "getDefaultACLAccess"}, {"command": "getAnonymousGroup"}
            )
        except Unreachable as error:
            raise NotAdministered(
                "it has no dynamic security, or our login does not administer it"
            ) from error
        allowed = {
            str(one.get("acltype"))
            for one in access.data.get("acls", ())
            if isinstance(one, dict) and one.get("allow")
        }
        open_to_all = sorted(allowed & {"subscribe", "publishClientSend"})
        if access.error or open_to_all:
            raise NotAdministered(f"it allows everybody to {', '.join(open_to_all) or '?'}")
        group = anonymous.data.get("group")
        if isinstance(group, dict) and group.get("groupname"):
            raise NotAdministered("it gives rights to who shows no login")

    async def _pump(self, client: mqtt_client.MqttClient) -> None:
        async for message in client.messages:
            try:
                answer = msgspec.json.decode(message.payload, type=_Responses)
            except UNREADABLE:
                continue
            for response in answer.responses:
                waiting = self._answers.get(response.correlationData)
                if waiting is not None and not waiting.done():
                    waiting.set_result(response)
