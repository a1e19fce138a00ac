"""What was revoked, on Redis or Valkey: a mark in each session's meta, which the log's script
compares; a mark for sessions to come; and a list from which all instances hear of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import msgspec
import structlog

from segue_cloud.sessions.keys import REVOKED_KEY, index_key, void_key
from segue_cloud.sessions.port import Bearer, Revocation
from segue_cloud.sessions.scripts import Command
from segue_cloud.sessions.wire import Wire
from segue_contract.errors import UNREADABLE, UnknownSession
from segue_contract.identity.principal import covers
from segue_contract.identity.rights import access_revoked
from segue_contract.ids import SessionName
from segue_contract.limits import CLOCK_SKEW_S, REVOKED_KEPT_S, REVOKED_PAGE
from segue_contract.transport.together import end

log = structlog.get_logger("segue.revoking")

_AHEAD_MS = int(CLOCK_SKEW_S * 1000)
_KEPT_MS = int(REVOKED_KEPT_S * 1000)
_LOG_VERB = "revoke"


class RevokedTokens:
    """`log`: a verb of the log's script for a session."""

    def __init__(self, wire: Wire, log: Callable[..., Command]) -> None:
        self._wire = wire
        self._log = log
        self._marking: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        await end(*self._marking)

    async def revoke(self, session: SessionName, device: str) -> Revocation:
        """As the port says. Of many sessions all instances hear first, and refuse the device; each
        is marked then, also where the caller has left. An instance that dies in between leaves some
        unmarked, and of a single one the device's streams as they are."""
        if session.session.endswith("*"):
            before_ms = await self._void_new(session, device)
            revocation = await self._tell(session, device, before_ms)
            marking = asyncio.create_task(self._mark_all(session, device, before_ms))
            self._marking.add(marking)
            marking.add_done_callback(self._marked)
            await asyncio.shield(marking)
            return revocation
        verb = self._log(session, _LOG_VERB, device, _AHEAD_MS, "")
        ((status, before_ms),) = await self._wire.call(verb)
        if status == b"missing":
            raise UnknownSession(
                f"There is no session {session.session!r}.",
                hint="Check its name.",
                session=session.session,
            )
        return await self._tell(session, device, before_ms)

    def _marked(self, marking: asyncio.Task[None]) -> None:
        self._marking.discard(marking)
        if not marking.cancelled() and (error := marking.exception()) is not None:
            log.warning("sessions_not_marked", error=str(error), hint="Revoke again.")

    async def _tell(self, session: SessionName, device: str, before_ms: int) -> Revocation:
        """Every instance."""
        member = msgspec.json.encode((session.tenant, session.session, device))
        await self._wire.call(
            ("ZADD", REVOKED_KEY, before_ms, member),
            ("ZREMRANGEBYSCORE", REVOKED_KEY, "-inf", before_ms - _KEPT_MS),
        )
        return Revocation(session, device, before_ms)

    async def _void_new(self, pattern: SessionName, device: str) -> int:
        """The mark for sessions to come is first: whoever makes one names it in the index and looks
        for the mark then, so either that is found, or the session by `_mark_all`."""
        (time,) = await self._wire.call(("TIME",))
        before_ms = _ms(time) + _AHEAD_MS
        key = void_key(pattern.tenant, device)
        await self._wire.call(
            ("HSET", key, pattern.session, before_ms), ("PEXPIRE", key, _KEPT_MS + _AHEAD_MS)
        )
        return before_ms

    async def _mark_all(self, pattern: SessionName, device: str, before_ms: int) -> None:
        place = "0"
        while True:  # what is there from begin to end comes at least once; names have no wildcards
            index = index_key(pattern.tenant)
            ((following, row),) = await self._wire.call(
                ("ZSCAN", index, place, "MATCH", pattern.session, "COUNT", REVOKED_PAGE)
            )
            sessions = [SessionName(pattern.tenant, name.decode()) for name in row[::2]]
            if sessions:
                marks = (self._log(one, _LOG_VERB, device, 0, before_ms) for one in sessions)
                await self._wire.call_each(*marks)
            place = following.decode()
            if place == "0":
                return

    async def before_ms(self, session: SessionName, bearer: Bearer) -> int:
        """Since when a token has to be valid for the device to make that session; 0: any may."""
        (row,) = await self._wire.call(("HGETALL", void_key(session.tenant, bearer.device)))
        marks = zip(row[::2], row[1::2], strict=True)
        return max(
            (int(at) for pattern, at in marks if covers(pattern.decode(), session.session)),
            default=0,
        )

    async def check_made(self, session: SessionName, bearer: Bearer) -> None:
        """After it was made: the revocation may have looked for it too early.

        Raises:
            Revoked: and the session is marked like those that were found.
        """
        before_ms = await self.before_ms(session, bearer)
        if bearer.issued_ms < before_ms:
            await self._wire.call(self._log(session, _LOG_VERB, bearer.device, 0, before_ms))
            raise access_revoked(session.session)

    async def since(self, since_ms: int) -> tuple[list[Revocation], int]:
        """As the port's `revocations`."""
        time, found = await self._wire.call(
            ("TIME",), ("ZRANGEBYSCORE", REVOKED_KEY, since_ms, "+inf", "WITHSCORES")
        )
        told = []
        for member, at_ms in zip(found[::2], found[1::2], strict=True):
            try:
                tenant, session, device = msgspec.json.decode(member, type=tuple[str, str, str])
            except UNREADABLE:
                continue  # not of this version; it keeps nobody from hearing of the others
            told.append(Revocation(SessionName(tenant, session), device, int(at_ms)))
        return told, _ms(time)


def _ms(time: Sequence[bytes]) -> int:
    """Of what TIME returned."""
    return int(time[0]) * 1000 + int(time[1]) // 1000
