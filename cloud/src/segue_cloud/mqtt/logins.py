"""A login at the broker for each device and session that it follows: it may read that session's
topics and nothing else, publish nothing, and ends with the token that it was given for.

The store keeps which there are, and is written first: what the broker has beyond it is removed
(`_tidy`), so neither an instance nor a broker that goes away in between leaves a login behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import TracebackType

import structlog

from segue_cloud.mqtt.dynsec import Command, DynamicSecurity
from segue_cloud.mqtt.keys import LiveKeys
from segue_cloud.mqtt.login_pace import LoginPace
from segue_cloud.sessions.logins import LoginRecord
from segue_contract import base64url
from segue_contract.errors import SegueError, Unreachable
from segue_contract.identity.principal import Principal
from segue_contract.ids import SessionName, new_id
from segue_contract.limits import (
    BROKER_LOGINS,
    BROKER_LOGINS_LOOK_S,
    BROKER_TIDY_S,
    EXPIRY_GRACE_S,
    GATE_LOOK_S,
    MAX_WATERMARKS,
)
from segue_contract.topics import head_topic, log_topic
from segue_contract.transport.calls import Tokens
from segue_contract.transport.gate import Gate
from segue_contract.transport.together import end

log = structlog.get_logger("segue.mqtt")

PREFIX = "segue-d-"  # of user, client id and role: one name for all three
_AT_ONCE = 64  # logins ended by one message
_THERE = ("already exists", "not found")  # in answers to what was done before


@dataclass(frozen=True, slots=True)
class DeviceLogin:
    """`user` is the client id as well: nobody else can connect with it."""

    user: str
    password: str = field(repr=False)
    valid_ms: int


class BrokerLogins:
    """`async with BrokerLogins(...) as logins:` also ends those whose time is over.

    Args:
        gate: what it hears of revocations ends logins, too.
        tokens: a key that is revoked ends the logins of its tokens, whichever instance gave them.
        now_s: Unix seconds.
    """

    def __init__(
        self,
        record: LoginRecord,
        admin: DynamicSecurity,
        keys: LiveKeys,
        gate: Gate,
        tokens: Tokens | None = None,
        *,
        now_s: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._record = record
        self._admin = admin
        self._keys = keys
        self._gate = gate
        self._tokens = tokens
        self._now_s = now_s
        self._monotonic = monotonic
        self._pace = LoginPace()
        self._changes = -1  # of keys, as they were seen to; some were revoked while nobody looked
        self._heard = 0  # the place of the last revocation that was seen to
        self._untidy = asyncio.Event()
        self._full = False
        self._tasks: list[asyncio.Task[None]] = []
        admin.on_ready = self._untidy.set

    async def __aenter__(self) -> BrokerLogins:
        for name, run in (("logins' ends", self._watch), ("logins' order", self._keep_tidy)):
            self._tasks.append(asyncio.create_task(run(), name=name))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await end(*self._tasks)

    @property
    def ready(self) -> bool:
        return self._admin.ready

    async def admit(
        self, session: SessionName, caller: Principal, token: str, asked: str = ""
    ) -> DeviceLogin | None:
        """A login for the caller to follow that session, until some time after its token.

        `asked`: the user that it has; it goes on. None: it follows over gRPC, since the token is
        over, there are too many logins, or the broker does not answer. Ask afterwards whether the
        token was revoked meanwhile, and `drop` it then.
        """
        until_s = caller.expires_s + EXPIRY_GRACE_S
        if not self.ready or not self._now_s() < until_s < float("inf"):
            return None
        until_ms = int(until_s * 1000)
        paced = self._pace.allows((session.tenant, caller.name), self._monotonic())
        fresh = new_id(PREFIX, os.urandom) if paced else ""
        user = ""
        try:
            key = self._tokens.key_of(token) if self._tokens is not None else ""
            issued_ms = int(caller.issued_s * 1000)
            user, gone = await self._record.grant(
                session, caller.name, asked, fresh, until_ms, issued_ms, key
            )
            if user == fresh != "":
                self._pace.made((session.tenant, caller.name), self._monotonic())
            self._say_full(paced and not user)
            if not user:
                await self._end(gone)
                return None
            secret = await self._keys.secret()
            digest = hmac.digest(secret, b"login " + user.encode(), "sha256")
            password = base64url.encode(digest)
            await self._run(*_ended(gone), *_made(user, password, session))
            await self._record.cleared(gone)
            if self._is_void(key, issued_ms):
                await self.drop(caller, user)
                return None
            if not await self._record.holds(session.tenant, caller.name, user):
                await self._end([user])  # it was ended as it was made
                return None
        except SegueError as error:
            log.warning("login_not_made", session=session.session, error=str(error))
            with contextlib.suppress(SegueError):  # it runs out by itself
                await self._record.drop(session.tenant, caller.name, user)
            self._untidy.set()
            return None
        return DeviceLogin(user, password, until_ms - int(self._now_s() * 1000))

    async def drop(self, caller: Principal, user: str) -> None:
        """Raises StoreUnavailable."""
        await self._end(await self._record.drop(caller.tenant, caller.name, user))

    def _say_full(self, full: bool) -> None:
        if full and not self._full:
            log.warning("logins_full", most=BROKER_LOGINS, hint="More devices follow over gRPC.")
        self._full = full

    # -- ends ---------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Revocations are looked at often, which costs nothing; what ran out, each second."""
        looked_s = 0.0
        while True:
            await asyncio.sleep(BROKER_LOGINS_LOOK_S)
            try:
                await self._hear()
                if abs(self._now_s() - looked_s) < GATE_LOOK_S:
                    continue
                looked_s = self._now_s()
                await self._check_keys()
                while self.ready:
                    gone = await self._record.ended(int(looked_s * 1000), _AT_ONCE)
                    if not gone or not await self._end(gone):
                        break
            except Exception as error:  # nobody else would end them here
                known = isinstance(error, SegueError)
                log.warning("logins_not_ended", error=str(error), exc_info=not known)
                self._untidy.set()  # what the store lost meanwhile, the broker may still have

    async def _hear(self) -> None:
        """End the logins of whom the gate heard that it was revoked."""
        for mark in self._gate.watermarks.after(self._heard, MAX_WATERMARKS):
            gone = await self._record.void(
                mark.tenant, mark.device, mark.sessions, int(mark.before_s * 1000)
            )
            self._heard = mark.place
            await self._end(gone)

    async def _check_keys(self) -> None:
        if self._tokens is None or (changes := self._tokens.changes()) == self._changes:
            return
        for one in await self._record.kept():
            if self._is_void(one.key, one.issued_ms):
                await self._end(await self._record.drop(one.tenant, one.device, one.user))
        self._changes = changes

    def _is_void(self, key: str, issued_ms: int) -> bool:
        """A token of that key which is valid since then."""
        return self._tokens is not None and issued_ms < 1000 * self._tokens.void_before(key)

    async def _end(self, users: Iterable[str]) -> bool:
        """Whoever is connected so is cut off at once. What the broker does not hear now (False) it
        is told by whichever instance reaches it first. Raises StoreUnavailable."""
        users, told = list(users), True
        for at in range(0, len(users), _AT_ONCE):
            some = users[at : at + _AT_ONCE]
            try:
                await self._run(*_ended(some))
            except Unreachable as error:
                log.warning("broker_not_told", error=str(error))
                self._untidy.set()
                told = False
            else:
                await self._record.cleared(some)
        return told

    async def _run(self, *commands: Command) -> None:
        """Raises Unreachable; also where the broker refuses what was not done before."""
        if not commands:
            return
        for answer in await self._admin.run(*commands):
            if answer.error and not any(known in answer.error.lower() for known in _THERE):
                raise Unreachable(f"The broker refused {answer.command}: {answer.error}.")

    async def _keep_tidy(self) -> None:
        while True:
            try:
                async with asyncio.timeout(BROKER_TIDY_S):
                    await self._untidy.wait()
            except TimeoutError:
                pass
            self._untidy.clear()
            if not self.ready:
                continue
            try:
                await self._tidy()
            except Exception as error:
                known = isinstance(error, SegueError)
                log.warning("logins_not_tidied", error=str(error), exc_info=not known)
                await asyncio.sleep(GATE_LOOK_S)
                self._untidy.set()

    async def _tidy(self) -> None:
        """Remove what the broker has and the store has not: it was read later, and is written
        first, so nothing is removed that somebody makes now."""
        clients, roles = await self._admin.run(
            {"command": "listClients", "verbose": False, "count": -1, "offset": 0},
            {"command": "listRoles", "verbose": False, "count": -1, "offset": 0},
        )
        found = _names(clients.data.get("clients")) | _names(roles.data.get("roles"))
        gone = found - await self._record.known()
        if gone:
            log.info("logins_tidied", logins=len(gone))
            await self._end(gone)


def _made(user: str, password: str, session: SessionName) -> list[Command]:
    topics = (log_topic(session), head_topic(session))
    acls = [{"acltype": "subscribeLiteral", "topic": topic, "allow": True} for topic in topics]
    role = {"rolename": user}
    return [
        {"command": "createRole", **role, "acls": acls},
        {
            "command": "createClient",
            "username": user,
            "clientid": user,
            "password": password,
            "roles": [role],
        },
    ]


def _ended(users: Iterable[str]) -> list[Command]:
    commands: list[Command] = []
    for user in users:
        commands.append({"command": "deleteClient", "username": user})
        commands.append({"command": "deleteRole", "rolename": user})
    return commands


def _names(found: object) -> set[str]:
    """Of ours, in a list of the plugin's."""
    names = found if isinstance(found, list) else []
    return {name for name in names if isinstance(name, str) and name.startswith(PREFIX)}
