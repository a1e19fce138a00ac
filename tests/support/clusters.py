"""A Cluster of three nodes without replicas: real processes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import redis.asyncio as redis

from segue_contract.servers import Valkey
from segue_contract.servers.ports import free_port
from segue_contract.servers.process import LOOPBACK

SLOTS = 16384
WAIT_S = 40.0
_POLL_S = 0.05


@dataclass
class ThreeNodes:
    nodes: list[Valkey]

    @property
    def url(self) -> str:
        return f"redis://{','.join(f'{LOOPBACK}:{one.port}' for one in self.nodes)}?cluster=1"

    async def ask(self, node: Valkey, *command: Any) -> Any:
        async with redis.Redis(host=LOOPBACK, port=node.port, protocol=2) as client:
            client.response_callbacks.clear()
            return await client.execute_command(*command)

    async def owner(self, slot: int) -> Valkey:
        for first, last, (_, port, *_), *_ in await self.ask(self.nodes[0], "CLUSTER", "SLOTS"):
            if first <= slot <= last:
                return next(one for one in self.nodes if one.port == port)
        raise AssertionError(f"nobody serves slot {slot}")

    async def begin_move(self, slot: int, source: Valkey, target: Valkey) -> None:
        """From here on `source` answers ASK for keys that it no longer has."""
        names = {one: (await self.ask(one, "CLUSTER", "MYID")).decode() for one in self.nodes}
        await self.ask(target, "CLUSTER", "SETSLOT", slot, "IMPORTING", names[source])
        await self.ask(source, "CLUSTER", "SETSLOT", slot, "MIGRATING", names[target])

    async def move_keys(self, slot: int, source: Valkey, target: Valkey) -> int:
        """How many went over; new ones may come meanwhile."""
        keys = await self.ask(source, "CLUSTER", "GETKEYSINSLOT", slot, 1000)
        if keys:
            await self.ask(source, "MIGRATE", LOOPBACK, target.port, "", 0, 5000, "KEYS", *keys)
        return len(keys)

    async def end_move(self, slot: int, source: Valkey, target: Valkey) -> None:
        name = (await self.ask(target, "CLUSTER", "MYID")).decode()
        for node in (target, source, *(n for n in self.nodes if n not in (source, target))):
            await self.ask(node, "CLUSTER", "SETSLOT", slot, "NODE", name)


@asynccontextmanager
async def three_nodes() -> AsyncIterator[ThreeNodes]:
    """All slots served, and each node knows it."""
    async with AsyncExitStack() as stack:
        nodes = [
            await stack.enter_async_context(
                Valkey.start(
                    options=(
                        "--cluster-enabled", "yes", "--cluster-node-timeout", "2000",
                        "--cluster-port", str(free_port()),
                    )
                )
            )
            for _ in range(3)
        ]  # fmt: skip
        cluster = ThreeNodes(nodes)
        bounds = [SLOTS * number // 3 for number in range(4)]
        for number, node in enumerate(nodes):
            await cluster.ask(
                node, "CLUSTER", "ADDSLOTSRANGE", bounds[number], bounds[number + 1] - 1
            )
            if number:
                bus = (await cluster.ask(nodes[0], "CONFIG", "GET", "cluster-port"))[1].decode()
                await cluster.ask(node, "CLUSTER", "MEET", LOOPBACK, nodes[0].port, bus)
        async with asyncio.timeout(WAIT_S):
            for node in nodes:
                while True:
                    info = await cluster.ask(node, "CLUSTER", "INFO")
                    if b"cluster_state:ok" in info and b"cluster_known_nodes:3" in info:
                        break
                    await asyncio.sleep(_POLL_S)
        yield cluster
