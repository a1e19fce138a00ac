"""What a store loses: four settings of Valkey, a kill -9 and, with a replica, a fail-over.

Many sessions are appended to at once, as a cloud does; where replicas are waited for, with turns
that begin and end, for only a turn's lease and end wait (see segue_cloud.sessions.replicas). When
enough was acknowledged the store is killed under what is still in flight. Then it starts again, or
its replica takes its place at the same address, and each acknowledged offset is compared with what
the log has there now. A loss counts as told where the next append to its session answers with
another generation.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
# Behind a silent link little or nothing is acknowledged where replicas are waited for, and nothing
# once the primary has missed its replica for 10 s: it is killed before.
BEHIND_S = 4.0
RECOVERY_S = 30.0
LEASE_S = 60.0
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
    acknowledged: int
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


@dataclass(frozen=True)
class Setting:
    """`wait`: turns begin and end over a store of that policy; "": values are set, without WAIT."""

    name: str
    note: str
    make: Callable[[], AbstractAsyncContextManager[Store]]
    wait: str = ""
    behind: bool = False


ALWAYS = ("--appendfsync", "always")
SETTINGS = (
    Setting("store_default_kill", "no AOF; kill -9, restart", lambda: alone(False)),
    Setting("store_aof_everysec_kill", "kill -9, restart", lambda: alone(True)),
    Setting("store_aof_always_kill", "kill -9, restart", lambda: alone(True, ALWAYS)),
    Setting("store_replica_failover", "min-replicas 1; kill -9, fail-over", lambda: replicated()),
    Setting(
        "store_replica_behind_failover",
        "as before, replica's link silent",
        lambda: replicated(),
        behind=True,
    ),
    Setting(
        "store_replica_wait_failover",
        "turns' leases and ends, min-replicas 1, WAIT; kill -9, fail-over",
        lambda: replicated(),
        wait="on",
    ),
    Setting(
        "store_replica_wait_behind_failover",
        "as before, replica's link silent",
        lambda: replicated(),
        wait="on",
        behind=True,
    ),
    Setting(
        "store_replica_strict_behind_failover",
        "as before, wait=strict",
        lambda: replicated(),
        wait="strict",
        behind=True,
    ),
)


async def store_rows(report: Report, appends: int) -> None:
    """One group of rows for each setting."""
    for setting in SETTINGS:
        async with setting.make() as store:
            loss = await measure(store, appends, setting)
        name, note = setting.name, setting.note
        where = f"of {loss.acknowledged}; {note}; told in {loss.sessions} of {SESSIONS} sessions"
        report.row(f"{name}_lost_ops", loss.lost, "ops", note=where)
        report.row(f"{name}_untold_ops", loss.untold, "ops", note="lost, generation unchanged")
        report.row(f"{name}_appends_per_s", loss.appends_per_s, "1/s")


async def measure(server: Store, appends: int, setting: Setting) -> Loss:
    """Append until `appends` were acknowledged, kill, recover, compare."""
    query = f"?wait={setting.wait}" if setting.wait else ""
    waiting = await RedisStore.connect(f"{server.url}{query}")
    store = await RedisStore.connect(server.url)
    try:
        async with SessionLog(store, compact_after=NEVER, compact_bytes=NEVER) as log:
            sessions = [Acknowledged(SessionName("bench", f"s{i}")) for i in range(SESSIONS)]
            for one in sessions:
                one.epoch = (await log.open_session(one.name, producer="p")).epoch
            count = Count(server, appends, setting)
            if setting.wait:
                writing = [_turns(waiting, one, count) for one in sessions]
            else:
                writing = [_values(log, one, count) for one in sessions]
            await _fill(writing, count)
            await server.recover()
            return await _compare(log, store, sessions, count)
    finally:
        await waiting.close()
        await store.close()


class Count:
    """Counts what was acknowledged, and kills the store when it was enough."""

    def __init__(self, server: Store, appends: int, setting: Setting) -> None:
        self._server = server
        self._appends = appends
        self._cut_at = int(appends * (1 - BEHIND)) if setting.behind else NEVER
        self._waits = bool(setting.wait)
        self._began = time.monotonic()
        self.done = 0
        self.dead: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    def acknowledged(self, one: Acknowledged, generation: int, offset: int, data: bytes) -> None:
        if self.dead.done():
            return  # it may have been acknowledged after the kill, by nobody
        one.ops[generation, offset] = data
        self.done += 1
        if self.done == self._cut_at and self._server.cut_off is not None:
            self._server.cut_off()
            if self._waits:
                asyncio.get_running_loop().call_later(BEHIND_S, self._kill)
        if self.done == self._appends:
            self._kill()

    @property
    def per_s(self) -> float:
        return self.done / self.dead.result()

    def _kill(self) -> None:
        if not self.dead.done():
            self._server.kill()
            self.dead.set_result(time.monotonic() - self._began)


async def _values(log: SessionLog, one: Acknowledged, count: Count) -> None:
    """Set values as a device does, one after another, until the store is dead."""
    while not count.dead.done():
        one.seq += 1
        op = LogOp.of(ops.Set(id=f"{one.name.session}.{one.seq}", name="n", value=b"x" * 64))
        result = await log.append(one.name, Producer("p", one.epoch, one.seq), [op])
        assert result.status is Status.OK, result
        count.acknowledged(one, result.generation, result.first_offset, op.data)


async def _turns(store: RedisStore, one: Acknowledged, count: Count) -> None:
    """Begin and end turns, one after another, until the store is dead."""
    while not count.dead.done():
        one.seq += 1
        turn = f"{one.name.session}.{one.seq}"
        start = LogOp.of(ops.TurnStarted(id=f"{turn}.s", turn=turn, epoch=1)).data
        claim = await store.begin_turn(one.name, turn, [start], LEASE_S)
        assert claim.status is Status.OK, claim
        count.acknowledged(one, claim.cursor.generation, claim.cursor.offset, start)
        end = LogOp.of(ops.TurnEnded(id=f"{turn}.e", turn=turn, epoch=1, reason="stop")).data
        result = await store.append_turn(one.name, claim.hold(turn), 1, [end], ends=True)
        assert result.status in (Status.OK, Status.DUP), result
        count.acknowledged(one, result.generation, result.first_offset, end)


async def _fill(writing: list[Coroutine[Any, Any, None]], count: Count) -> None:
    """Until enough was acknowledged; the store is dead then."""
    writers = asyncio.gather(*writing)
    try:
        await asyncio.wait({writers, count.dead}, return_when=asyncio.FIRST_COMPLETED)
        if not count.dead.done():
            writers.result()  # a writer failed before the kill: the suite is wrong
    finally:
        writers.cancel()  # what is in flight was never acknowledged
        await asyncio.gather(writers, return_exceptions=True)


async def _compare(
    log: SessionLog, store: RedisStore, sessions: list[Acknowledged], count: Count
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
    return Loss(count.done, lost, untold, count.per_s, told)


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
