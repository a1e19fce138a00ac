"""Redis commands, repeated until their deadline on whichever server of the store is to serve them.

Only idempotent calls are made here. `node` has the connections, `routes` finds the servers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from redis.exceptions import (
    AskError,
    ClusterError,
    MovedError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)

from segue_cloud.sessions.cluster import Cluster
from segue_cloud.sessions.node import Connections, Make, Node, elsewhere
from segue_cloud.sessions.replicas import ReplicaWaits
from segue_cloud.sessions.routes import OneServer, Route, SentinelPrimary
from segue_cloud.sessions.scripts import Command, Script
from segue_contract.errors import Internal, StoreUnavailable
from segue_contract.limits import (
    CONNECT_TIMEOUT_S,
    STORE_CONNECTIONS,
    STORE_RETRY_MAX_S,
    STORE_RETRY_S,
    STORE_TIMEOUT_S,
)
from segue_contract.store_url import StoreKind, parse_store_url

Sleep = Callable[[float], Awaitable[None]]
CountReplicas = Callable[[Any], int | None]

# Answers that say "not now" rather than "not this".
_LATER = (OutOfMemoryError, ReadOnlyError, ClusterError, TryAgainError, NoScriptError)
_ASKING: Command = ("ASKING",)
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
        elif where.kind is StoreKind.CLUSTER:
            self._route = Cluster(where, connections, new_node)
        else:
            self._route = OneServer(connections, new_node)
        self.waits = ReplicaWaits(where.wait)
        self._timeout_s = timeout_s
        self._sleep = sleep
        self._closed = False

    async def call(self, *commands: Command, replicas: CountReplicas | None = None) -> list[Any]:
        """The replies of `commands`, sent in order, those to one server together.

        Everything is repeated when the store was away, so `commands` must be idempotent.
        `replicas`: the store's replicas are waited for, of which there are as many as this reads
        from the last reply (None: nothing was written). That they have it is promised only where
        the URL says `wait=strict`.

        Raises:
            StoreUnavailable: no answer within the deadline.
            Internal: the store refused a command for good.
        """

        async def attempt(patience_s: float) -> list[Any]:
            replies: list[Any] = []
            runs = self._route.split(commands)
            for run in runs:
                count = replicas if run is runs[-1] else None
                replies += whole(await self._send(run, patience_s, replicas=count))
            return replies

        return await self._repeat(attempt)

    async def call_each(self, *commands: Command) -> list[Any]:
        """As `call`, of commands that do not depend on each other: several servers are asked at
        once, and only what failed is repeated."""
        replies: list[Any] = [None] * len(commands)
        left = list(range(len(commands)))

        async def attempt(patience_s: float) -> list[Any]:
            nonlocal left
            places = [
                [left[number] for number in group]
                for group in await self._route.spread([commands[number] for number in left])
            ]
            sending = (self._send([commands[one] for one in group], patience_s) for group in places)
            answers = await asyncio.gather(*sending, return_exceptions=True)
            error: BaseException | None = None
            left = []
            for group, answer in zip(places, answers, strict=True):
                for place, reply in zip(
                    group,
                    [answer] * len(group) if isinstance(answer, BaseException) else answer,
                    strict=True,
                ):
                    if isinstance(reply, BaseException):
                        left.append(place)
                        error = error or reply
                    replies[place] = reply
            if error is not None:
                raise error
            return replies

        return await self._repeat(attempt)

    async def call_servers(self, command: Command) -> list[Any]:
        """The reply of each server that takes writes. Raises as `call`."""

        async def attempt(patience_s: float) -> list[Any]:
            replies: list[Any] = []
            for node in await self._route.nodes():
                replies += whole(await self._send([command], patience_s, node=node))
            return replies

        return await self._repeat(attempt)

    async def dedicated(self) -> Any:
        """A connection of the caller's own, for what is no call; the caller disconnects it.

        Raises:
            StoreUnavailable: none can be made within the deadline.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                node = await self._route.node(())
                try:
                    return await node.connect()
                except (RedisError, OSError) as error:
                    await self._route.failed(node, error)
                    raise
        except (RedisError, OSError) as error:  # TimeoutError is an OSError
            raise StoreUnavailable(
                f"The session store at {self._route.shown} cannot be reached.",
                hint=self._route.hint,
            ) from error

    async def close(self) -> None:
        """Close all connections; calls in progress end with StoreUnavailable."""
        self._closed = True
        await self._route.close()

    # -- inside -------------------------------------------------------------------------------

    async def _repeat(self, attempt: Callable[[float], Awaitable[list[Any]]]) -> list[Any]:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout_s
        pause = STORE_RETRY_S
        stopped = False
        reason = ""
        while not self._closed:
            try:
                async with asyncio.timeout_at(deadline):
                    # Half of the time left: a connection that fell silent must not use it up.
                    patience = max((deadline - loop.time()) / 2, 0.05)
                    return await attempt(min(patience, self._route.patience_s))
            except TimeoutError:
                reason = reason or "no answer in time"  # an answer that was no help says more
            except ResponseError as error:
                moved = isinstance(error, AskError)  # MovedError is one; redis-py cuts the word off
                reason = f"MOVED {error}" if moved else str(error)
                if not isinstance(error, _LATER) and not (
                    reason.startswith(_LATER_CODES) or elsewhere(error)
                ):
                    raise Internal(f"The session store refused a command: {reason}") from error
            except (RedisError, OSError) as error:  # the connection: lost, refused, unusable
                reason = str(error) or type(error).__name__
            late_s = loop.time() - deadline
            if late_s > self._timeout_s / 4 and not stopped:
                # This process did not run: what the store said meanwhile was not heard.
                stopped = True
                deadline = loop.time() + self._timeout_s
            elif late_s + pause >= 0:
                break
            await self._sleep(pause)
            pause = min(pause * 2, STORE_RETRY_MAX_S)
        if self._closed:
            reason = "it was closed"
        raise StoreUnavailable(
            f"The session store at {self._route.shown} did not answer within "
            f"{self._timeout_s:g} s ({reason}).",
            hint=self._hint(reason),
        )

    def _hint(self, reason: str) -> str:
        if reason.startswith("MOVED") and isinstance(self._route, OneServer):
            return "It is a node of a Cluster: write ?cluster=1 behind SEGUE_REDIS_URL."
        return self._route.hint

    async def _send(
        self,
        run: Sequence[Command],
        patience_s: float,
        *,
        node: Node | None = None,
        replicas: CountReplicas | None = None,
    ) -> list[Any]:
        """The replies, errors among them."""
        node = node or await self._route.node(run)
        wait = self._waiting(replicas)
        try:
            replies = await node.attempt(run, patience_s, wait)
        except (RedisError, OSError) as error:  # TimeoutError is an OSError
            await self._route.failed(node, error)
            raise
        replies, waited = replies[: len(run)], replies[len(run) :]
        for place, reply in enumerate(replies):
            if isinstance(reply, AskError) and not isinstance(reply, MovedError):
                there = await self._route.asked(reply)
                replies[place] = (await there.attempt([_ASKING, run[place]], patience_s))[1]
            if isinstance(replies[place], ResponseError):
                await self._route.failed(node, replies[place])
        if self._closed:
            await node.forget()
        if replicas is not None and _written(replies, replicas) is not None:
            self.waits.judge(*waited)
        return replies

    def _waiting(
        self, replicas: CountReplicas | None
    ) -> Callable[[list[Any]], Command | None] | None:
        if replicas is None:
            return None
        return lambda replies: self.waits.command(_written(replies, replicas) or 0)


def _written(replies: list[Any], replicas: CountReplicas) -> int | None:
    """How many replicas should have what was written; None where nothing was."""
    if any(isinstance(reply, ResponseError) for reply in replies):
        return None
    return replicas(replies[-1])


def whole(replies: list[Any]) -> list[Any]:
    """Raises the first error among them."""
    for reply in replies:
        if isinstance(reply, ResponseError):
            raise reply
    return replies
