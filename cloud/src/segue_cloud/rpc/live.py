"""What a device is told of the live view over MQTT as it opens a session."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from segue_cloud.log.session_log import SessionLog
from segue_cloud.mqtt.logins import BrokerLogins
from segue_cloud.rpc.revoking import caller_bearer
from segue_contract.errors import SegueError
from segue_contract.ids import SessionName, check_id
from segue_contract.transport.gate import caller, caller_is_late, caller_token
from segue_contract.v1 import agent_pb2 as pb


class LiveView:
    """`url`: of the broker as devices reach it, "" for none. `key`: see `LiveKeys.of`. `logins`:
    where devices have logins of their own; None: what `url` says is all they need."""

    def __init__(
        self,
        log: SessionLog,
        url: Callable[[], str],
        key: Callable[[SessionName, int], Awaitable[bytes]],
        logins: BrokerLogins | None = None,
    ) -> None:
        self._log = log
        self._url = url
        self._key = key
        self._logins = logins

    async def told(
        self, session: SessionName, generation: int, request: pb.OpenSessionRequest
    ) -> dict[str, Any]:
        """Fields of the reply to a device that opened the session.

        Raises:
            Revoked: its token was made void meanwhile.
        """
        url = self._url()
        if not url:
            return {}
        fields: dict[str, Any] = {"mqtt_url": url, "live_key": await self._key(session, generation)}
        if self._logins is not None and self._logins.ready:
            fields["needs_login"] = True
            if request.wants_login and not caller_is_late():
                fields |= await self._login(self._logins, session, request)
        return fields

    async def _login(
        self, logins: BrokerLogins, session: SessionName, request: pb.OpenSessionRequest
    ) -> dict[str, Any]:
        asked = check_id(request.mqtt_user, "user") if request.mqtt_user else ""
        login = await logins.admit(session, caller(), caller_token(), asked)
        if login is None:
            return {}
        try:  # a revocation that came before the login was kept ended none
            await self._log.check_device(session, request.device, caller_bearer())
        except SegueError:
            await logins.drop(caller(), login.user)
            raise
        return {
            "mqtt_user": login.user,
            "mqtt_password": login.password,
            "mqtt_valid_ms": login.valid_ms,
        }
