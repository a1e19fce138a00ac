"""aiomqtt's client with what it hides: reason codes of publishes, and what the broker allows.

It prints nothing: what aiomqtt logs (many calls under way, an answer of the connection before)
concerns nobody, and an application's terminal is not ours.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import aiomqtt

from segue_contract.transport.mqtt import mqtt_socket_options

T = TypeVar("T")

_REFUSED = 128  # MQTT 5: reason codes from here on are refusals

_QUIET = logging.getLogger("segue.mqtt.library")
_QUIET.propagate = False
_QUIET.addHandler(logging.NullHandler())


class PublishRefused(Exception):
    """The broker answered a publish with a refusal; the link itself is well."""


@dataclass(frozen=True)
class BrokerLimits:
    """What a broker said as it accepted us."""

    retains: bool = True
    max_packet_bytes: int = 0  # 0: it named none


class MqttClient(aiomqtt.Client):
    """MQTT 5, TCP_NODELAY; `options` as `aiomqtt.Client`.

    Attributes:
        limits: known once it is connected.
        ended_by: the reason code with which the broker ended the connection; 0: it did not.
    """

    def __init__(self, host: str, port: int, **options: Any) -> None:
        super().__init__(
            host,
            port,
            protocol=aiomqtt.ProtocolVersion.V5,
            socket_options=mqtt_socket_options(),
            logger=_QUIET,
            **options,
        )
        self.pending_calls_threshold = sys.maxsize
        self.limits = BrokerLimits()
        self.ended_by = 0
        self._refusals: dict[int, str] = {}

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        await super().__aexit__(exc_type, exc, tb)
        if self._disconnected.done() and not self._disconnected.cancelled():
            self._disconnected.exception()  # seen: else asyncio writes of it to the terminal

    def _on_connect(
        self, client: Any, userdata: Any, flags: Any, reason_code: Any, properties: Any = None
    ) -> None:
        self.limits = BrokerLimits(
            retains=bool(getattr(properties, "RetainAvailable", 1)),
            max_packet_bytes=int(getattr(properties, "MaximumPacketSize", 0)),
        )
        super()._on_connect(client, userdata, flags, reason_code, properties)

    def _on_disconnect(
        self, client: Any, userdata: Any, flags: Any, reason_code: Any, properties: Any = None
    ) -> None:
        self.ended_by = int(getattr(reason_code, "value", 0))
        super()._on_disconnect(client, userdata, flags, reason_code, properties)

    def _on_publish(
        self, client: Any, userdata: Any, mid: int, reason_code: Any, properties: Any
    ) -> None:
        if reason_code.value >= _REFUSED and mid in self._pending_publishes:
            self._refusals[mid] = str(reason_code)
        super()._on_publish(client, userdata, mid, reason_code, properties)

    @contextlib.contextmanager
    def _pending_call(self, mid: int, value: T, pending_dict: dict[int, T]) -> Iterator[None]:
        """Around the wait for an answer; raises PublishRefused where it is a refusal."""
        refused: str | None = None
        try:
            with super()._pending_call(mid, value, pending_dict):
                yield
        finally:
            refused = self._refusals.pop(mid, None)
        if refused is not None:
            raise PublishRefused(refused)
