"""Devices of the load suite that follow many sessions each: a process of its own.

    python -m tests.bench.suites._followers ADDRESS SESSIONS PER_DEVICE ENTRIES

Opens and follows s0, s1, ... with the SDK, over MQTT and `Tails` as any device does. Prints "ready"
once every follower has its first snapshot. After `ENTRIES` named values in all it prints one line
of JSON: how far behind its append each was, ms. A value is the CLOCK_MONOTONIC nanosecond at which
its append was asked for.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from contextlib import AsyncExitStack

import segue
from segue.events import Entry
from segue_contract.sync.ops import Set

AT_ONCE = 8
READY_TIMEOUT_S = 600.0
SEEN_TIMEOUT_S = 600.0


class Watch:
    """What the followers of this process have seen."""

    def __init__(self, entries: int) -> None:
        self.ready = 0
        self.over_mqtt = 0
        self.lags_ms: list[float] = []
        self.all_seen = asyncio.Event()
        self._entries = entries

    async def follow(self, session: segue.Session, begun: asyncio.Event) -> None:
        following = session.follow()
        async for item in following:
            if not begun.is_set():
                begun.set()
                self.ready += 1
                self.over_mqtt += following.live == "mqtt"
            if isinstance(item, Entry) and isinstance(item.op, Set):
                asked_ns = int(item.op.value)
                self.lags_ms.append((time.monotonic_ns() - asked_ns) / 1e6)
                if len(self.lags_ms) >= self._entries:
                    self.all_seen.set()


async def main(address: str, sessions: int, per_device: int, entries: int) -> None:
    watch = Watch(entries)
    room = asyncio.Semaphore(AT_ONCE)
    tasks: list[asyncio.Task[None]] = []

    async def begin(client: segue.Client, number: int) -> None:
        async with room:
            begun = asyncio.Event()
            session = await client.session(f"s{number}")
            tasks.append(asyncio.create_task(watch.follow(session, begun)))
            await begun.wait()

    async with AsyncExitStack() as stack:
        async with asyncio.timeout(READY_TIMEOUT_S):
            for start in range(0, sessions, per_device):
                client = segue.Client(address, device=f"device-{start // per_device}")
                await stack.enter_async_context(client)
                async with asyncio.TaskGroup() as opening:
                    for number in range(start, min(start + per_device, sessions)):
                        opening.create_task(begin(client, number))
        gc.collect()
        gc.freeze()
        print("ready", flush=True)
        async with asyncio.timeout(SEEN_TIMEOUT_S):
            await watch.all_seen.wait()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    found = {"lags_ms": watch.lags_ms, "over_mqtt": watch.over_mqtt}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], *map(int, sys.argv[2:5])))
