"""One server of the store: pooled connections, one call at a time on each.

redis-py's clients retry and pool behind the caller's back; both have bitten others (a plain XADD
applied twice, a cancelled command whose reply went to the next caller). So this uses only its
`Connection` (protocol, TLS, authentication, hiredis) and does the rest in the open: whatever is not
read to its end, also by cancellation, closes its connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import hiredis
from redis.asyncio.connection import Connection, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AskError,
    BusyLoadingError,
    MasterDownError,
    MovedError,
    NoScriptError,
    ReadOnlyError,
    ResponseError,
)
from redis.exceptions import ConnectionError as LinkError

from segue_cloud.sessions.scripts import Command, Script
from segue_contract.errors import InvalidArgument
from segue_contract.store_url import Address, StoreUrl

Make = Callable[[], Any]


def elsewhere(error: ResponseError) -> bool:
    """The server is not, or not yet, the one to ask. A script says it behind its own error."""
    if isinstance(error, (ReadOnlyError, MovedError, AskError, BusyLoadingError, MasterDownError)):
        return True
    text = str(error)
    return any(code in text for code in ("READONLY", "MOVED", "LOADING", "MASTERDOWN")) or (
        "read only replica" in text or "read only slave" in text
    )


def heard(task: asyncio.Task[Any]) -> None:
    """Whoever waited for it may be gone: its error is no surprise then."""
    if not task.cancelled():
        task.exception()


class Connections:
    """Makes connections as a URL says: with its password, database and TLS, to any address."""

    def __init__(self, url: StoreUrl, *, connect_timeout_s: float) -> None:
        """Raises InvalidArgument where redis-py does not take the URL."""
        try:
            options = dict(parse_url(url.plain))
            self._kind: Callable[..., Any] = options.pop("connection_class", Connection)  # type: ignore[assignment]
            self._options: dict[str, Any] = {
                **options,
                "retry": Retry(NoBackoff(), 0),
                "socket_connect_timeout": connect_timeout_s,
                # The deadline of each call is set around it.
                "socket_timeout": None,
                "health_check_interval": 0,
                "protocol": 2,
            }
            self._kind(**self._options)
        except (ValueError, TypeError) as error:
            reason = "" if "@" in url.plain else f": {error}"
            raise InvalidArgument(
                f"{url.shown!r} is no Redis address{reason}.", hint="Write redis://host:port."
            ) from None
        self.address = f"{options.get('host', options.get('path', 'localhost'))}"
        self.address += f":{options['port']}" if "port" in options else ""

    def to_url(self) -> Make:
        """To the server that the URL itself names."""
        return lambda: self._kind(**self._options)

    def to(self, address: Address, **changed: Any) -> Make:
        options = {**self._options, "host": address[0], "port": address[1], **changed}
        return lambda: self._kind(**options)


class Node:
    """Sends commands to one server; connects on demand, keeps connections for reuse."""

    def __init__(
        self,
        make: Make,
        *,
        scripts: Mapping[str, Script],
        max_connections: int,
        primary_only: bool = False,
    ) -> None:
        """`primary_only`: a new connection is used only where the server says it is a primary."""
        self._make = make
        self._scripts = scripts
        self._primary_only = primary_only
        self._free: list[Any] = []
        self._slots = asyncio.Semaphore(max_connections)
        self._scopes: set[asyncio.Timeout] = set()
        self._dropped = False

    @property
    def has_free(self) -> bool:
        """A connection is at hand that no call uses."""
        return bool(self._free)

    async def attempt(
        self,
        commands: Sequence[Command],
        patience_s: float,
        then: Callable[[list[Any]], Command | None] | None = None,
    ) -> list[Any]:
        """Their replies, errors among them, sent together and in order on one connection.

        `then`: what to send behind them on it, as their replies say; its reply is the last one.

        Raises:
            TimeoutError: no answer within `patience_s`, or the node was dropped meanwhile.
            LinkError, OSError: the connection was refused or lost.
        """
        async with self._slots, asyncio.timeout(patience_s) as scope:
            if self._dropped:
                raise LinkError("another server took its place")
            self._scopes.add(scope)
            connection = None
            clean = False
            try:
                connection = await self._take()
                replies = await self._run(connection, commands)
                if then is not None and (command := then(replies)) is not None:
                    replies += await exchange(connection, [command])
                # A connection to a replica, a node that is loading or the wrong one of a Cluster
                # leads there again: the next attempt connects anew.
                clean = not any(
                    isinstance(reply, ResponseError) and elsewhere(reply) for reply in replies
                )
            finally:
                self._scopes.discard(scope)
                if connection is not None:
                    if clean and not self._dropped:
                        self._free.append(connection)
                    else:
                        # Its stream may hold a reply that belongs to nobody: never use it again.
                        await connection.disconnect(nowait=True)
        return replies

    async def connect(self) -> Any:
        """A new connection, connected and the caller's own."""
        connection = self._make()
        try:
            await connection.connect()
            if self._primary_only:
                (role,) = await exchange(connection, [("ROLE",)])
                if isinstance(role, ResponseError):
                    raise role
                if role[0] != b"master":
                    raise ReadOnlyError("the Sentinels' primary says that it is a replica")
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        return connection

    async def forget(self) -> None:
        """Close the connections that no call uses; new ones are made."""
        while self._free:
            await self._free.pop().disconnect(nowait=True)

    async def drop(self) -> None:
        """Use this server no more: what waits for it ends with TimeoutError at once."""
        self._dropped = True
        now = asyncio.get_running_loop().time()
        for scope in self._scopes:
            if not scope.expired():
                scope.reschedule(now)
        await self.forget()

    async def _take(self) -> Any:
        """A connection; one that was closed, or has bytes nobody asked for, is not used again."""
        while self._free:
            connection = self._free.pop()
            if connection.is_connected and not await connection.can_read():
                return connection
            await connection.disconnect(nowait=True)
        return await self.connect()

    async def _run(self, connection: Any, commands: Sequence[Command]) -> list[Any]:
        replies = await exchange(connection, commands)
        if not any(isinstance(reply, NoScriptError) for reply in replies):
            return replies
        loads: list[Command] = [("SCRIPT", "LOAD", one.source) for one in self._scripts.values()]
        for reply in await exchange(connection, loads):
            if isinstance(reply, ResponseError):
                raise reply
        return await exchange(connection, commands)


NewNode = Callable[[Make, bool], Node]


async def exchange(connection: Any, commands: Sequence[Command]) -> list[Any]:
    """The replies of `commands`, errors of the server among them."""
    if not connection.is_connected:
        await connection.connect()
    await send(connection, commands)
    replies: list[Any] = []
    for _ in commands:
        try:
            replies.append(await connection.read_response())
        except ResponseError as error:
            replies.append(error)
    return replies


async def send(connection: Any, commands: Sequence[Command]) -> None:
    """Send `commands`, packed in C: redis-py packs in Python, 45 us more for an append.

    Raises:
        LinkError, OSError: the connection is lost.
    """
    # Its stub means tuples of one item.
    packed = [hiredis.pack_command(command) for command in commands]  # type: ignore[arg-type]
    await connection.send_packed_command(packed, check_health=False)
