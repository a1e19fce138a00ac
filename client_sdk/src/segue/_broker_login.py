"""A device's login at the broker for one session: asked of the cloud, and again in time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from segue_contract.limits import RENEW_LEAD_S, RENEW_PAUSE_S
from segue_contract.transport.mqtt import MqttLogin
from segue_contract.transport.tls import TlsFiles
from segue_contract.v1 import agent_pb2 as pb

Admit = Callable[[str], Awaitable[pb.OpenSessionReply]]


class BrokerLogin:
    """`admit`: asks for one; it is told the user that there is already, or ""."""

    def __init__(self, admit: Admit, tls: TlsFiles, now: Callable[[], float] | None = None) -> None:
        self._admit = admit
        self._tls = tls
        self._now = now or (lambda: asyncio.get_running_loop().time())
        self._password = ""
        self._until = 0.0
        self.user = ""

    @property
    def login(self) -> MqttLogin | None:
        """None: there is none, or its time is over."""
        if not self.user or self._now() >= self._until:
            return None
        return MqttLogin(self.user, self._password, self._tls)

    def forget(self) -> None:
        """The broker does not know it."""
        self.user = ""

    async def ask(self) -> MqttLogin | None:
        """None: the cloud gives none now, or cannot be asked; the log says why, where it has to."""
        try:
            reply = await self._admit(self.user)
        except Exception:  # the app's token function may raise anything
            return self.login
        if reply.mqtt_user:  # else what there is goes on for as long as it was given
            self.user, self._password = reply.mqtt_user, reply.mqtt_password
            self._until = self._now() + reply.mqtt_valid_ms / 1000
        return self.login

    async def keep(self) -> None:
        """Ask again before its time is over, until it is another one: connect with that then."""
        user = self.user
        while self.user == user:
            left_s = self._until - self._now()
            # the app has a new token RENEW_LEAD_S before the old one ends, and it goes before this
            await asyncio.sleep(max(RENEW_PAUSE_S, left_s - min(RENEW_LEAD_S, left_s / 2)))
            await self.ask()
