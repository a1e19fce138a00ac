"""Which logins devices have at the broker, as the store keeps it: all instances issue and end them,
and one that dies leaves none behind."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from segue_cloud.sessions import scripts
from segue_cloud.sessions.keys import LOGIN_ENDS_KEY, LOGIN_GONE_KEY, LOGIN_OWNERS_KEY
from segue_cloud.sessions.wire import Wire
from segue_contract.errors import UNREADABLE
from segue_contract.ids import SessionName
from segue_contract.limits import (
    BROKER_LOGINS,
    BROKER_LOGINS_OF_DEVICE,
    BROKER_LOGINS_OF_SESSION,
)

LOGINS = scripts.load("logins.lua")


@dataclass(frozen=True, slots=True)
class KeptLogin:
    """`key`, `issued_ms`: of its token, the id of its key and since when it is valid."""

    tenant: str
    device: str
    user: str
    key: str
    issued_ms: int


class LoginRecord:
    """A login is for one device and one session, until a time. All methods raise
    StoreUnavailable; those that return users return such whose logins are no longer kept. `ended`
    returns them again, to every instance, until somebody says that they are `cleared`."""

    def __init__(self, wire: Wire, most: int = BROKER_LOGINS) -> None:
        self._wire = wire
        self._most = most

    async def grant(
        self,
        session: SessionName,
        device: str,
        asked: str,
        fresh: str,
        until_ms: int,
        issued_ms: int,
        key: str,
    ) -> tuple[str, list[str]]:
        """The user to log in as: `asked` where the device has that login, else `fresh`; "" where
        there are too many. And those that the device lost by it, its oldest for the session.

        `until_ms`, `issued_ms`, `key`: of its token.
        """
        user, *gone = await self._call(
            "grant", _owner(session.tenant, device), session.session, asked, fresh, until_ms,
            issued_ms, key, self._most, BROKER_LOGINS_OF_DEVICE, BROKER_LOGINS_OF_SESSION,
        )  # fmt: skip
        return user, gone

    async def drop(self, tenant: str, device: str, user: str) -> list[str]:
        return await self._call("drop", _owner(tenant, device), user)

    async def void(self, tenant: str, device: str, sessions: str, before_ms: int) -> list[str]:
        """Those of tokens of before; `sessions`: a name, or the beginning of names and "*"."""
        return await self._call("void", _owner(tenant, device), sessions, before_ms)

    async def ended(self, now_ms: int, most: int) -> list[str]:
        """Whose time is over, and those that went before and are not cleared."""
        return await self._call("ended", now_ms, most)

    async def cleared(self, users: Iterable[str]) -> None:
        """The broker has none of these any more."""
        if users := list(users):
            await self._call("cleared", *users)

    async def kept(self) -> list[KeptLogin]:
        """All of them, but for those that another version wrote."""
        (row,) = await self._wire.call(("HGETALL", LOGIN_OWNERS_KEY))
        found = []
        for owner, text in zip(row[::2], row[1::2], strict=True):
            tenant, _, device = owner.decode().partition(":")
            try:
                some = msgspec.json.decode(text, type=list[tuple[str, str, str, str, str]])
                found += [KeptLogin(tenant, device, one[0], one[4], int(one[3])) for one in some]
            except UNREADABLE:
                continue
        return found

    async def holds(self, tenant: str, device: str, user: str) -> bool:
        member = f"{user} {_owner(tenant, device)}"
        (score,) = await self._wire.call(("ZSCORE", LOGIN_ENDS_KEY, member))
        return score is not None

    async def known(self) -> set[str]:
        """The users of all logins that are kept."""
        (members,) = await self._wire.call(("ZRANGE", LOGIN_ENDS_KEY, 0, -1))
        return {member.decode().partition(" ")[0] for member in members}

    async def _call(self, verb: str, *args: str | int) -> list[str]:
        keys = (LOGIN_OWNERS_KEY, LOGIN_ENDS_KEY, LOGIN_GONE_KEY)
        (row,) = await self._wire.call(LOGINS.call(keys, verb, *args))
        return [user.decode() for user in row]


def _owner(tenant: str, device: str) -> str:
    return f"{tenant}:{device}"
