"""What the store tells of tails as they change: `log.lua` publishes each on a channel of its own.

A subscribed connection is told in the order in which the logs changed, and of nothing while it is
lost. Whether it is alive end to end shows a *beat*: published as any writer does, it has to come
back here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import structlog
from redis.exceptions import RedisError

from segue_cloud.sessions.keys import SessionKeys, beat_channel
from segue_cloud.sessions.news import Beat, LogTail, TailTold, Watched
from segue_cloud.sessions.node import send
from segue_cloud.sessions.wire import Wire
from segue_contract.errors import StoreUnavailable
from segue_contract.ids import SessionName
from segue_contract.sync.state import Cursor

log = structlog.get_logger("segue.sessions")


class ChangeLink:
    """`async with store.changes(name) as link:` is one link; see `port.Changes`."""

    def __init__(self, wire: Wire, name: str) -> None:
        """`name`: of this listener alone."""
        self._wire = wire
        self._beats = beat_channel(name)
        self._connection: Any = None

    async def __aenter__(self) -> ChangeLink:
        self._connection = await self._wire.dedicated()
        try:
            await self._send("SUBSCRIBE", self._beats)
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._connection.disconnect(nowait=True)

    async def watch(self, sessions: Sequence[SessionName]) -> None:
        await self._send("SUBSCRIBE", *(SessionKeys.of(one).tail_channel for one in sessions))

    async def forget(self, sessions: Sequence[SessionName]) -> None:
        await self._send("UNSUBSCRIBE", *(SessionKeys.of(one).tail_channel for one in sessions))

    async def beat(self, number: int) -> None:
        await self._wire.call(("PUBLISH", self._beats, number))

    async def next(self) -> TailTold | Watched | Beat:
        while True:
            try:
                kind, channel, said = await self._connection.read_response()
            except (RedisError, OSError) as error:
                raise _gone(error) from error
            if kind not in (b"message", b"subscribe"):
                continue
            try:
                return self._read(kind == b"message", channel.decode(), said)
            except ValueError:
                log.warning("change_unreadable", channel=channel, said=said)

    def _read(self, message: bool, channel: str, said: bytes) -> TailTold | Watched | Beat:
        """Raises ValueError where it is nothing that a store of ours says."""
        if channel == self._beats:
            return Beat(int(said) if message else 0)
        session = SessionKeys.session_of(channel)
        if not message:
            return Watched(session)
        generation, offset, *digest = said.split()
        tail = LogTail(Cursor(int(generation), int(offset)), digest[0] if digest else b"")
        return TailTold(session, tail)

    async def _send(self, *command: str) -> None:
        try:
            await send(self._connection, [command])
        except (RedisError, OSError) as error:
            raise _gone(error) from error


def _gone(error: Exception) -> StoreUnavailable:
    reason = str(error) or type(error).__name__
    return StoreUnavailable(f"The session store no longer tells of changes ({reason}).")
