"""Redis commands over pooled connections, one call at a time on each.

redis-py's clients retry and pool behind the caller's back; both have bitten others (a plain XADD
applied twice, a cancelled command whose reply went to the next caller). So this uses only its
`Connection` (protocol, TLS, authentication, hiredis) and does the rest in the open:

- a connection carries one call; whatever is not read to its end, also by cancellation, closes it;
- a call is repeated until its deadline. Only idempotent calls are made here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from hashlib import sha1
from typing import Any

from redis.asyncio.connection import Connection, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AskError,
    BusyLoadingError,
    ClusterError,
    MasterDownError,
    MovedError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)

from segue_contract.errors import Internal, InvalidArgument, StoreUnavailable
from segue_contract.limits import (
    CONNECT_TIMEOUT_S,
    STORE_CONNECTIONS,
    STORE_RETRY_MAX_S,
    STORE_RETRY_S,
    STORE_TIMEOUT_S,
)
from segue_contract.urls import without_password

Command = tuple[str | bytes | int | float, ...]
Sleep = Callable[[float], Awaitable[None]]

# Answers that say "not now" rather than "not this".
_LATER = (OutOfMemoryError, ReadOnlyError, ClusterError, TryAgainError, NoScriptError)
_LATER_CODES = ("BUSY", "NOREPLICAS", "MISCONF", "UNBLOCKED")


def _elsewhere(error: ResponseError) -> bool:
    """The server is not, or not yet, the one to ask. A script says it behind its own error."""
    if isinstance(error, (ReadOnlyError, MovedError, AskError, BusyLoadingError, MasterDownError)):
        return True
    text = str(error)
    return any(code in text for code in ("READONLY", "MOVED", "LOADING", "MASTERDOWN")) or (
        "read only replica" in text or "read only slave" in text
    )


class Script:
    """A Lua script, called by its digest."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.digest = sha1(source.encode(), usedforsecurity=False).hexdigest()

    def call(self, keys: Sequence[str], *args: str | bytes | int | float) -> Command:
        return ("EVALSHA", self.digest, len(keys), *keys, *args)


class Wire:
    """Sends commands and reads their replies; connects on demand, keeps connections for reuse."""

    def __init__(
        self,
        url: str,
        *,
        scripts: Sequence[Script] = (),
        timeout_s: float = STORE_TIMEOUT_S,
        max_connections: int = STORE_CONNECTIONS,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        """`url` as redis-py takes it: redis://, rediss:// or unix://.

        Raises:
            InvalidArgument: it is no such URL.
        """
        try:
            options = dict(parse_url(url))
        except ValueError as error:
            shown = without_password(url)
            # What the parser says may quote a part of the password, in a traceback, too.
            reason = f": {error}" if shown == url else ""
            raise InvalidArgument(
                f"{shown!r} is no Redis address{reason}.", hint="Write redis://host:port."
            ) from None
        self._make: Callable[..., Any] = options.pop("connection_class", Connection)  # type: ignore[assignment]
        self._options: dict[str, Any] = {
            **options,
            "retry": Retry(NoBackoff(), 0),
            "socket_connect_timeout": min(CONNECT_TIMEOUT_S, timeout_s),
            # The deadline of each call is set around it, below.
            "socket_timeout": None,
            "health_check_interval": 0,
            "protocol": 2,
        }
        self._address = f"{options.get('host', options.get('path', 'localhost'))}"
        self._address += f":{options['port']}" if "port" in options else ""
        self._scripts = {script.digest: script for script in scripts}
        self._timeout_s = timeout_s
        self._sleep = sleep
        self._free: list[Any] = []
        self._slots = asyncio.Semaphore(max_connections)
        self._closed = False

    async def call(self, *commands: Command) -> list[Any]:
        """The replies of `commands`, sent together and in order on one connection.

        Everything is repeated when the store was away, so `commands` must be idempotent.

        Raises:
            StoreUnavailable: no answer within the deadline.
            Internal: the store refused a command for good.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout_s
        pause = STORE_RETRY_S
        reason = "no answer"
        while not self._closed:
            try:
                async with asyncio.timeout_at(deadline):
                    # Half of the time left: a connection that fell silent must not use it up.
                    patience = max((deadline - loop.time()) / 2, 0.05)
                    return await self._attempt(commands, patience)
            except TimeoutError:
                reason = "no answer in time"
            except ResponseError as error:
                reason = str(error)
                if not isinstance(error, _LATER) and not (
                    reason.startswith(_LATER_CODES) or _elsewhere(error)
                ):
                    raise Internal(f"The session store refused a command: {reason}") from error
            except (RedisError, OSError) as error:  # the connection: lost, refused, unusable
                reason = str(error) or type(error).__name__
            if loop.time() + pause >= deadline:
                break
            await self._sleep(pause)
            pause = min(pause * 2, STORE_RETRY_MAX_S)
        if self._closed:
            reason = "it was closed"
        raise StoreUnavailable(
            f"The session store at {self._address} did not answer within "
            f"{self._timeout_s:g} s ({reason}).",
            hint="Check that Redis runs there (SEGUE_REDIS_URL), then try again.",
        )

    async def dedicated(self) -> Any:
        """A connection of the caller's own, for what is no call; the caller disconnects it.

        Raises:
            StoreUnavailable: none can be made within the deadline.
        """
        connection = self._make(**self._options)
        try:
            async with asyncio.timeout(self._timeout_s):
                await connection.connect()
        except (RedisError, OSError) as error:  # TimeoutError is an OSError
            await connection.disconnect(nowait=True)
            raise StoreUnavailable(
                f"The session store at {self._address} cannot be reached.",
                hint="Check that Redis runs there (SEGUE_REDIS_URL), then try again.",
            ) from error
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        return connection

    async def close(self) -> None:
        """Close all connections; calls in progress end with StoreUnavailable."""
        self._closed = True
        while self._free:
            await self._free.pop().disconnect(nowait=True)

    # -- one attempt --------------------------------------------------------------------------

    async def _attempt(self, commands: Sequence[Command], patience_s: float) -> list[Any]:
        async with self._slots, asyncio.timeout(patience_s):
            connection = await self._take()
            clean = False
            try:
                replies = await self._exchange(connection, commands)
                if any(isinstance(reply, NoScriptError) for reply in replies):
                    await self._load(connection)
                    replies = await self._exchange(connection, commands)
                # A connection to a replica, a node that is loading or the wrong one of a Cluster
                # leads there again: the next attempt connects anew.
                clean = not any(
                    isinstance(reply, ResponseError) and _elsewhere(reply) for reply in replies
                )
            finally:
                if clean and not self._closed:
                    self._free.append(connection)
                else:
                    # Its stream may hold a reply that belongs to nobody: never use it again.
                    await connection.disconnect(nowait=True)
        for reply in replies:
            if isinstance(reply, ResponseError):
                raise reply
        return replies

    async def _take(self) -> Any:
        """A connection; one that was closed, or has bytes nobody asked for, is not used again."""
        while self._free:
            connection = self._free.pop()
            if connection.is_connected and not await connection.can_read():
                return connection
            await connection.disconnect(nowait=True)
        return self._make(**self._options)

    async def _exchange(self, connection: Any, commands: Sequence[Command]) -> list[Any]:
        packed = connection.pack_commands(commands)
        await connection.connect()  # at once where it is connected
        await connection.send_packed_command(packed, check_health=False)
        replies: list[Any] = []
        for _ in commands:
            try:
                replies.append(await connection.read_response())
            except ResponseError as error:
                replies.append(error)
        return replies

    async def _load(self, connection: Any) -> None:
        loads: list[Command] = [("SCRIPT", "LOAD", one.source) for one in self._scripts.values()]
        for reply in await self._exchange(connection, loads):
            if isinstance(reply, ResponseError):
                raise reply
