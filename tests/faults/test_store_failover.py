"""A store that fails over: two real Valkeys, one a replica of the other, behind a proxy."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from segue.local.probes import probe_store
from segue_cloud.log.session_log import SessionLog
from segue_cloud.sessions.keys import SessionKeys
from segue_cloud.sessions.port import LogOp, Producer, Status
from segue_cloud.sessions.store import RedisStore
from segue_contract.errors import StoreUnavailable, Unreachable
from segue_contract.ids import SessionName
from segue_contract.limits import StoreLimits
from segue_contract.servers import Valkey
from segue_contract.sync import ops
from segue_contract.sync.state import Cursor
from tests.support.producers import producer
from tests.support.servers import require_valkey
from tests.support.slow_proxy import SlowProxy
from tests.support.store_pair import command, in_step, pair

S = SessionName("default", "trip")
WAIT_S = 20.0


def op(text: str) -> LogOp:
    return LogOp.of(ops.Set(id=text, name=text, value=b"1"))


async def test_a_fail_over_that_loses_a_tail_is_told_and_never_renumbered() -> None:
    """Four new ops arrive before anybody looks: they have the offsets of those that were lost."""
    async with pair() as (primary, replica), SlowProxy(primary.port) as proxy:
        store = await RedisStore.connect(proxy.redis_url)
        async with SessionLog(store) as log, log.follow(S) as following:
            await log.open_session(S)
            async with asyncio.timeout(WAIT_S):
                await anext(following)
                me = await producer(log, S, "me", 1)
                await log.append(S, me, [op(f"kept{i}") for i in range(5)])
                await in_step(primary)
                async with command(replica) as wire:
                    await wire.call(("REPLICAOF", "NO", "ONE"))
                lost = await log.append(S, Producer("me", me.epoch, 6), [op("x"), op("y"), op("z")])
                assert (lost.status, lost.tail) == (Status.OK, 8)
                seen = 0
                while seen < 8:
                    seen = (await anext(following)).entries[-1].cursor.offset
                proxy.retarget(replica.port)
                proxy.cut()
                opened = await store.open_session(S, producer="new")
                new = Producer("new", opened.epoch)
                first = await store.append(S, new, [op(f"new{i}").data for i in range(4)])
                assert (first.first_offset, first.tail) == (6, 9)
                assert first.generation > lost.generation
                step = await anext(following)
                assert step.lost_from == 6
                assert step.snapshot is not None
                assert step.snapshot.cursor == Cursor(first.generation, 9)
                state = await log.state(S)
                assert set(state.values) == {*(f"kept{i}" for i in range(5)),
                                             *(f"new{i}" for i in range(4))}  # fmt: skip
                page = await log.read(S, Cursor(lost.generation, 8), 10)
                assert page.lost_from == 6
                page = await log.read(S, Cursor(lost.generation, 5), 10)
                assert [entry.cursor.offset for entry in page.entries] == [6, 7, 8, 9]
                gap = await log.append(S, Producer("me", me.epoch, 9), [op("after")])
                assert (gap.status, gap.expected_seq) == (Status.GAP, 6)
        await store.close()


async def test_connections_to_a_demoted_primary_are_not_used_again() -> None:
    async with pair() as (primary, replica), SlowProxy(primary.port) as proxy:
        store = await RedisStore.connect(proxy.redis_url)
        await asyncio.gather(*(store.open_session(S) for _ in range(8)))
        await in_step(primary)
        async with command(replica) as wire:
            await wire.call(("REPLICAOF", "NO", "ONE"))
        async with command(primary) as wire:
            await wire.call(("REPLICAOF", "127.0.0.1", replica.port))
        proxy.retarget(replica.port)  # the connections to the old one stand
        opened = await store.open_session(S, producer="p")
        result = await store.append(S, Producer("p", opened.epoch), [op("a").data])
        assert (result.status, result.first_offset) == (Status.OK, 1)
        await store.close()


async def test_a_restart_is_another_life_also_where_nothing_was_lost(tmp_path: Path) -> None:
    async with Valkey.start(directory=tmp_path) as valkey:
        store = await RedisStore.connect(valkey.url, limits=StoreLimits(timeout_s=WAIT_S))
        me = await producer(store, S, "p", 1)
        before = await store.append(S, me, [op("a").data])
        valkey.process.kill()
        await valkey.restart()
        again = await store.append(S, me, [op("a").data])
        assert (again.status, again.first_offset) == (Status.DUP, 1)
        assert again.generation > before.generation
        page = await store.read(S, Cursor(before.generation, 1), 10, judged=True)
        assert (page.status.value, page.entries) == ("ok", [])
        await store.close()


async def test_two_lives_that_begin_alike_give_different_generations(tmp_path: Path) -> None:
    """A second fail-over, to a server that never heard of what the first one's gave."""
    given: list[int] = []
    async with Valkey.start(directory=tmp_path) as valkey, command(valkey) as wire:
        store = await RedisStore.connect(valkey.url, limits=StoreLimits(timeout_s=WAIT_S))
        before = await store.append(S, await producer(store, S, "p", 1), [op("a").data])
        keys = SessionKeys.of(S).all
        copies = await wire.call(*(("DUMP", key) for key in keys))
        for _ in range(2):
            await wire.call(("DEL", *keys))
            for key, copy in zip(keys, copies, strict=True):
                if copy is not None:
                    await wire.call(("RESTORE", key, 0, copy, "REPLACE"))
            await valkey.restart()
            given.append((await store.open_session(S)).tail.generation)
        await store.close()
    assert before.generation not in given
    assert given[0] != given[1]


async def test_a_store_that_evicts_is_refused_at_the_start() -> None:
    require_valkey()
    options = ("--maxmemory", "16mb", "--maxmemory-policy", "allkeys-lru")
    async with Valkey.start(options=options) as valkey:
        with pytest.raises(StoreUnavailable, match="noeviction"):
            await RedisStore.connect(valkey.url)
        with pytest.raises(Unreachable, match="allkeys-lru"):
            await probe_store(valkey.url)
    async with Valkey.start() as valkey:
        assert (await probe_store(valkey.url)).seconds


async def test_a_node_of_a_cluster_that_moved_the_slot_is_a_typed_error() -> None:
    """It owns no slot at all: every command on a key is MOVED or CLUSTERDOWN."""
    require_valkey()
    async with Valkey.start(options=("--cluster-enabled", "yes")) as valkey:
        store = await RedisStore.connect(valkey.url, limits=StoreLimits(timeout_s=0.5))
        with pytest.raises(StoreUnavailable):
            await store.open_session(S)
        await store.close()
