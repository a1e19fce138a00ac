"""Which server of the store a command goes to: the one there is, or the Sentinels' primary."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

from redis.exceptions import AskError, RedisError, ResponseError
from redis.exceptions import ConnectionError as LinkError

from segue_cloud.sessions.node import (
    Connections,
    NewNode,
    Node,
    elsewhere,
    exchange,
    heard,
)
from segue_cloud.sessions.scripts import Command
from segue_contract.limits import SILENCE_S, STORE_LOOKUP_S
from segue_contract.store_url import Address, StoreUrl


class Route(Protocol):
    """Finds servers, and learns from what they answer.

    Attributes:
        shown: the store's address, fit for a message.
        hint: what to do where it does not answer.
        patience_s: how long one attempt waits before the next one looks elsewhere.
    """

    shown: str
    hint: str
    patience_s: float

    def split(self, commands: Sequence[Command]) -> list[Sequence[Command]]:
        """`commands` in runs, in order, that one server serves each."""
        ...

    async def spread(self, commands: Sequence[Command]) -> list[list[int]]:
        """The places of `commands` that one server serves each, in any order."""
        ...

    async def node(self, commands: Sequence[Command]) -> Node:
        """The server for a run. Raises LinkError where none is known now."""
        ...

    async def nodes(self) -> list[Node]:
        """All servers that take writes. Raises LinkError where none is known now."""
        ...

    async def asked(self, error: AskError) -> Node:
        """The server that a Cluster's node sends a single command to."""
        ...

    async def failed(self, node: Node, error: Exception) -> None:
        """An attempt at `node` ended with `error`."""
        ...

    async def close(self) -> None: ...


class _Single(ABC):
    """One server at a time serves everything."""

    def split(self, commands: Sequence[Command]) -> list[Sequence[Command]]:
        return [commands]

    async def spread(self, commands: Sequence[Command]) -> list[list[int]]:
        return [list(range(len(commands)))]

    @abstractmethod
    async def node(self, commands: Sequence[Command]) -> Node: ...

    async def nodes(self) -> list[Node]:
        return [await self.node(())]

    async def asked(self, error: AskError) -> Node:
        raise error  # a Cluster's node, and the URL does not say so


class OneServer(_Single):
    """The server that the URL names, whatever stands behind that address."""

    hint = "Check that Redis runs there (SEGUE_REDIS_URL), then try again."
    patience_s = float("inf")

    def __init__(self, connections: Connections, new_node: NewNode) -> None:
        self.shown = connections.address
        self._node = new_node(connections.to_url(), False)

    async def node(self, commands: Sequence[Command]) -> Node:
        return self._node

    async def failed(self, node: Node, error: Exception) -> None:
        if isinstance(error, (RedisError, OSError)) and not isinstance(
            error, (ResponseError, TimeoutError)
        ):
            await node.forget()  # one connection was lost: the others lead to the same end

    async def close(self) -> None:
        await self._node.forget()


class SentinelPrimary(_Single):
    """The primary as the Sentinels name it, asked for each new connection.

    The answer of the highest configuration epoch counts, among those of a majority or of all that
    answer in time: a Sentinel that was cut off may still name the primary of before. A primary
    that says it is a replica is none.
    """

    patience_s = SILENCE_S  # another server can go on: waiting for a silent one helps nobody

    def __init__(self, url: StoreUrl, connections: Connections, new_node: NewNode) -> None:
        self.shown = url.shown.partition("://")[2]
        self.hint = (
            f"Check that these Sentinels run and watch a primary named {url.service!r} "
            "(SEGUE_REDIS_URL), then try again."
        )
        self._url = url
        self._connections = connections
        self._new_node = new_node
        self._at: Address | None = None
        self._node: Node | None = None
        self._doubtful = False
        self._looking: asyncio.Task[Node] | None = None

    async def node(self, commands: Sequence[Command]) -> Node:
        if self._node is not None and self._node.has_free and not self._doubtful:
            return self._node
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look(), name="find the store's primary")
            self._looking.add_done_callback(heard)
        return await asyncio.shield(self._looking)

    async def failed(self, node: Node, error: Exception) -> None:
        if node is not self._node:
            return
        self._doubtful = True
        if isinstance(error, ResponseError):
            if elsewhere(error):
                await self._leave()
        elif not isinstance(error, TimeoutError):
            await node.forget()

    async def close(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
        if self._node is not None:
            await self._node.forget()

    async def _look(self) -> Node:
        address = await self._ask_all()
        if self._node is None or address != self._at:
            await self._leave()
            self._at = address
            self._node = self._new_node(self._connections.to(address), True)
        self._doubtful = False
        return self._node

    async def _leave(self) -> None:
        node, self._node = self._node, None
        if node is not None:
            await node.drop()

    async def _ask_all(self) -> Address:
        asking = {
            asyncio.create_task(self._ask(seed), name=f"ask Sentinel {seed[0]}:{seed[1]}")
            for seed in self._url.seeds
        }
        pending = asking
        found: list[tuple[int, Address]] = []
        errors: list[str] = []
        try:
            async with asyncio.timeout(STORE_LOOKUP_S):
                while pending and 2 * len(found) <= len(asking):
                    done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        if error := task.exception():
                            errors.append(str(error) or type(error).__name__)
                        else:
                            found.append(task.result())
        except TimeoutError:
            errors.append("no answer in time")
        finally:
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
        if not found:
            raise LinkError(f"no Sentinel names a primary {self._url.service!r}: {errors[0]}")
        return max(found)[1]

    async def _ask(self, seed: Address) -> tuple[int, Address]:
        """The configuration epoch and the primary's address, as one Sentinel knows them."""
        connection = self._connections.to(
            seed,
            db=0,
            username=self._url.sentinel_username or None,
            password=self._url.sentinel_password or None,
        )()
        name = self._url.service
        try:
            # The first one names the new primary earlier, in the middle of a fail-over.
            address, facts = await exchange(
                connection,
                [("SENTINEL", "GET-MASTER-ADDR-BY-NAME", name), ("SENTINEL", "MASTER", name)],
            )
        finally:
            await connection.disconnect(nowait=True)
        for reply in (address, facts):
            if isinstance(reply, ResponseError):
                raise reply
        if not address:
            raise LinkError("it watches none of that name")
        known = dict(zip(facts[::2], facts[1::2], strict=False))
        return int(known.get(b"config-epoch", 0)), (address[0].decode(), int(address[1]))
