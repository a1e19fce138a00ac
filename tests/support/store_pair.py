"""A primary and its replica, without anybody who would promote it: real Valkeys."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from segue_cloud.sessions.wire import Wire
from segue_contract.servers import Valkey
from tests.support.servers import require_valkey
from tests.support.slow_proxy import SlowProxy

WAIT_S = 20.0


@asynccontextmanager
async def command(server: Valkey) -> AsyncIterator[Wire]:
    wire = Wire(server.url)
    try:
        yield wire
    finally:
        await wire.close()


@asynccontextmanager
async def pair() -> AsyncIterator[tuple[Valkey, Valkey]]:
    """A primary and its replica, in step."""
    async with linked_pair() as (primary, replica, _):
        yield primary, replica


@asynccontextmanager
async def linked_pair(
    delay: Callable[[], float] = lambda: 0.0,
) -> AsyncIterator[tuple[Valkey, Valkey, SlowProxy]]:
    """As `pair`, and the link over which the replica hears from its primary."""
    require_valkey()
    at_once = ("--repl-diskless-sync-delay", "0")  # a replica is sent what there is
    async with (
        Valkey.start(options=at_once) as primary,
        SlowProxy(primary.port, delay) as link,
    ):
        of = ("--replicaof", "127.0.0.1", str(link.port))
        async with Valkey.start(options=(*at_once, *of)) as replica:
            await in_step(primary)
            yield primary, replica, link


async def in_step(primary: Valkey) -> None:
    """Until the replica has acknowledged a write that was made while it was connected.

    One acknowledgement is not enough: before the replica connects, writes do not count.
    """
    async with command(primary) as wire, asyncio.timeout(WAIT_S):
        acknowledged = 0
        while acknowledged < 2:
            _, replicas = await wire.call(("SET", "seen", "1"), ("WAIT", 1, 100))
            acknowledged = acknowledged + 1 if replicas else 0
