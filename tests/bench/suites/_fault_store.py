"""What a store loses: four settings of Valkey, a kill -9 and, with a replica, a fail-over.

Many sessions are appended to at once, as a cloud does. When enough appends were acknowledged the
store is killed under those still in flight. Then it starts again, or its replica takes its place
at the same address, and each acknowledged offset is compared with what the log has there now. A
loss counts as told where the next append to its session answers with another generation.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import redis.asyncio as redis

from segue_cloud.log.session_log import SessionLog
from segue_cloud.sessions.port import LogOp, Producer, Status
from segue_cloud.sessions.store import RedisStore
from segue_contract.errors import SegueError
from segue_contract.ids import SessionName
from segue_contract.servers import Valkey
from segue_contract.servers.process import LOOPBACK
from segue_contract.sync import ops
from segue_contract.sync.state import Cursor
from tests.bench.harness import Report
from tests.support.slow_proxy import SlowProxy

SESSIONS = 64
BEHIND = 0.02  # share of the appends during which the replica's link is silent before a fail-over
PAGE = 4096
RECOVERY_S = 30.0
NEVER = 1 << 62  # entries: the log is compared one by one, so nothing is folded

Recover = Callable[[], Awaitable[None]]


@dataclass
class Acknowledged:
    """Of one session: the bytes that the store said it had put at each (generation, offset)."""

    name: SessionName
    seq: int = 0
    epoch: int = 0
    ops: dict[tuple[int, int], bytes] = field(default_factory=dict)


@dataclass
class Loss:
    lost: int
    untold: int
    appends_per_s: float
    sessions: int


@dataclass
class Store:
    """A store under test: `url` stays the same over `kill` and `recover`."""

    url: str
    kill: Callable[[], None]
    recover: Recover
    cut_off: Callable[[], None] | None = None  # the replica's link goes silent


Setting = tuple[str, str, Callable[[], AbstractAsyncContextManager[Store]]]


async def store_rows(report: Report, appends: int) -> None:
    """One group of rows for each setting; the store client waits for no replica (no WAIT)."""
    always = ("--appendfsync", "always")
    settings: list[Setting] = [
        ("store_default_kill", "no AOF; kill -9, restart", lambda: alone(False)),
        ("store_aof_everysec_kill", "kill -9, restart", lambda: alone(True)),
        ("store_aof_always_kill", "kill -9, restart", lambda: alone(True, always)),
        ("store_replica_failover", "min-replicas 1; kill -9, fail-over", replicated),
        ("store_replica_behind_failover", "as before, replica's link silent", replicated),
    ]
    for name, note, make in settings:
        async with make() as store:
            loss = await measure(store, appends, behind="behind" in name)
        where = f"of {appends}; {note}; told in {loss.sessions} of {SESSIONS} sessions"
        report.row(f"{name}_lost_ops", loss.lost, "ops", note=where)
        report.row(f"{name}_untold_ops", loss.untold, "ops", note="lost, generation unchanged")
        report.row(f"{name}_appends_per_s", loss.appends_per_s, "1/s")


async def measure(server: Store, appends: int, *, behind: bool) -> Loss:
    """Append until `appends` were acknowledged, kill, recover, compare."""
    store = await RedisStore.connect(server.url)
    try:
        async with SessionLog(store, compact_after=NEVER, compact_bytes=NEVER) as log:
            sessions = [Acknowledged(SessionName("bench", f"s{i}")) for i in range(SESSIONS)]
            for one in sessions:
                one.epoch = (await log.open_session(one.name, producer="p")).epoch
            cut_at = int(appends * (1 - BEHIND)) if behind else NEVER
            seconds = await _fill(log, server, sessions, appends, cut_at)
            await server.recover()
            return await _compare(log, store, sessions, appends / seconds)
    finally:
        await store.close()


async def _fill(
    log: SessionLog, server: Store, sessions: list[Acknowledged], appends: int, cut_at: int
) -> float:
    """Seconds until `appends` were acknowledged; the store is dead then."""
    done = 0
    began = time.monotonic()
    dead: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    async def write(one: Acknowledged) -> None:
        nonlocal done
        while True:
            one.seq += 1
            op = LogOp.of(ops.Set(id=f"{one.name.session}.{one.seq}", name="n", value=b"x" * 64))
            result = await log.append(one.name, Producer("p", one.epoch, one.seq), [op])
            assert result.status is Status.OK, result
            if dead.done():
                return
            one.ops[result.generation, result.first_offset] = op.data
            done += 1
            if done == cut_at and server.cut_off is not None:
                server.cut_off()
            if done == appends:
                server.kill()
                dead.set_result(time.monotonic() - began)

    writers = asyncio.gather(*(write(one) for one in sessions))
    try:
        await asyncio.wait({writers, dead}, return_when=asyncio.FIRST_COMPLETED)
        if writers.done():
            writers.result()  # a writer failed before the kill: the suite is wrong
        return dead.result()
    finally:
        writers.cancel()  # what is in flight was never acknowledged
        await asyncio.gather(writers, return_exceptions=True)


async def _compare(
    log: SessionLog, store: RedisStore, sessions: list[Acknowledged], per_s: float
) -> Loss:
    """Appends once more to each session first: that is what has to tell of a loss."""
    lost = untold = told = 0
    async with asyncio.timeout(RECOVERY_S):
        while True:
            try:
                await store.ping()
                break
            except SegueError:
                continue  # the call itself waits between its tries
    for one in sessions:
        op = LogOp.of(ops.Set(id=f"{one.name.session}.after", name="n", value=b"after"))
        opened = await log.open_session(one.name, producer="after")
        result = await log.append(one.name, Producer("after", opened.epoch), [op])
        assert result.status is Status.OK, result
        found = await _entries(store, one.name)
        gone = sum(found.get(offset) != data for (_, offset), data in one.ops.items())
        changed = all(generation != result.generation for generation, _ in one.ops)
        lost += gone
        told += bool(gone and changed)
        untold += 0 if changed else gone
    return Loss(lost, untold, per_s, told)


async def _entries(store: RedisStore, name: SessionName) -> dict[int, bytes]:
    """The log's bytes by offset."""
    found: dict[int, bytes] = {}
    after = Cursor(0, 0)
    while True:
        page = await store.read(name, after, PAGE)
        found |= {entry.cursor.offset: entry.op for entry in page.entries}
        if not page.entries or page.entries[-1].cursor.offset >= page.tail.offset:
            return found
        after = page.entries[-1].cursor


@asynccontextmanager
async def alone(keeps: bool, options: tuple[str, ...] = ()) -> AsyncIterator[Store]:
    """One Valkey; `keeps` its data in an append-only file (fsync every second by default)."""
    with tempfile.TemporaryDirectory(prefix="segue-store-") as folder:
        directory = Path(folder) if keeps else None
        async with Valkey.start(directory=directory, options=options) as valkey:
            yield Store(valkey.url, lambda: valkey.process.kill(), valkey.restart)


@asynccontextmanager
async def replicated() -> AsyncIterator[Store]:
    """A primary that wants one replica, and that replica; both links go through proxies."""
    wants = ("--min-replicas-to-write", "1", "--repl-diskless-sync-delay", "0")
    async with (
        Valkey.start(options=wants) as primary,
        SlowProxy(primary.port) as front,
        SlowProxy(primary.port) as link,
        Valkey.start(options=("--replicaof", f"{LOOPBACK} {link.port}")) as replica,
    ):
        await _in_sync(primary.url)

        async def fail_over() -> None:
            link.cut()
            async with redis.from_url(replica.url) as client:
                await client.execute_command("REPLICAOF", "NO", "ONE")
            front.aim(replica.port)
            front.cut()

        yield Store(front.redis_url, lambda: primary.process.kill(), fail_over, link.stall)


async def _in_sync(url: str) -> None:
    """Until the replica has acknowledged a write.

    That it is connected is not enough: until its first acknowledgement, up to a second later, the
    primary sends it nothing and counts it as a good replica all the same.
    """
    async with redis.from_url(url) as client, asyncio.timeout(RECOVERY_S):
        acknowledged = 0
        while not acknowledged:
            try:
                await client.set("in-sync", 1)
            except redis.ResponseError:  # NOREPLICAS: not connected yet
                await asyncio.sleep(0.05)
                continue
            acknowledged = int(await client.execute_command("WAIT", 1, 500))
