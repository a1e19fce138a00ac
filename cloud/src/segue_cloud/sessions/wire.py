"""Redis commands, repeated until their deadline on whichever server of the store is to serve them.

Only idempotent calls are made here. `node` has the connections, `routes` finds the servers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from redis.exceptions import (
    ClusterError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)

from segue_cloud.sessions.node import Command, Connections, Make, Node, Script, elsewhere
from segue_cloud.sessions.routes import OneServer, Route, SentinelPrimary
from segue_contract.errors import Internal, StoreUnavailable
from segue_contract.limits import (
    CONNECT_TIMEOUT_S,
    STORE_CONNECTIONS,
    STORE_RETRY_MAX_S,
    STORE_RETRY_S,
    STORE_TIMEOUT_S,
)
from segue_contract.store_url import StoreKind, parse_store_url

__all__ = ["Command", "Script", "Sleep", "Wire"]

Sleep = Callable[[float], Awaitable[None]]

# Answers that say "not now" rather than "not this".
_LATER = (OutOfMemoryError, ReadOnlyError, ClusterError, TryAgainError, NoScriptError)
_LATER_CODES = ("BUSY", "NOREPLICAS", "MISCONF", "UNBLOCKED")


class Wire:
    """Sends commands and reads their replies."""

    def __init__(
        self,
        url: str,
        *,
        scripts: Sequence[Script] = (),
        timeout_s: float = STORE_TIMEOUT_S,
        max_connections: int = STORE_CONNECTIONS,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        """`url` as `segue_contract.store_url` says; `max_connections` to each server.

        Raises:
            InvalidArgument: it is no such URL.
        """
        by_digest = {script.digest: script for script in scripts}

        def new_node(make: Make, primary_only: bool) -> Node:
            return Node(
                make,
                scripts=by_digest,
                max_connections=max_connections,
                primary_only=primary_only,
            )

        where = parse_store_url(url)
        connections = Connections(where, connect_timeout_s=min(CONNECT_TIMEOUT_S, timeout_s))
        self._route: Route
        if where.kind is StoreKind.SENTINEL:
            self._route = SentinelPrimary(where, connections, new_node)
        else:
            self._route = OneServer(connections, new_node)
        self._timeout_s = timeout_s
        self._sleep = sleep
        self._closed = False

    async def call(self, *commands: Command) -> list[Any]:
        """The replies of `commands`, sent in order, those to one server together.

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
                    return await self._attempt(commands, min(patience, self._route.patience_s))
            except TimeoutError:
                reason = "no answer in time"
            except ResponseError as error:
                reason = str(error)
                if not isinstance(error, _LATER) and not (
                    reason.startswith(_LATER_CODES) or elsewhere(error)
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
            f"The session store at {self._route.shown} did not answer within "
            f"{self._timeout_s:g} s ({reason}).",
            hint=self._route.hint,
        )

    async def dedicated(self) -> Any:
        """A connection of the caller's own, for what is no call; the caller disconnects it.

        Raises:
            StoreUnavailable: none can be made within the deadline.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                node = await self._route.node(())
                return await node.connect()
        except (RedisError, OSError) as error:  # TimeoutError is an OSError
            raise StoreUnavailable(
                f"The session store at {self._route.shown} cannot be reached.",
                hint=self._route.hint,
            ) from error

    async def close(self) -> None:
        """Close all connections; calls in progress end with StoreUnavailable."""
        self._closed = True
        await self._route.close()

    # -- one attempt --------------------------------------------------------------------------

    async def _attempt(self, commands: Sequence[Command], patience_s: float) -> list[Any]:
        replies: list[Any] = []
        for run in self._route.split(commands):
            replies += await self._send(run, patience_s)
        return replies

    async def _send(self, run: Sequence[Command], patience_s: float) -> list[Any]:
        node = await self._route.node(run)
        try:
            replies = await node.attempt(run, patience_s)
            for reply in replies:
                if isinstance(reply, ResponseError):
                    raise reply
        except (RedisError, OSError) as error:  # TimeoutError is an OSError
            await self._route.failed(node, error)
            raise
        if self._closed:
            await node.forget()
        return replies
