"""Cancelled and broken store calls: no reply goes to another caller, nothing happens twice.

redis-py issue 2665: a command cancelled between its request and its reply left the reply in the
connection, and the next command read it as its own.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Coroutine
from dataclasses import replace
from random import Random
from typing import Any, TypeVar

import pytest

from segue_cloud.sessions.port import RawPage, Status, StoredEntry
from segue_cloud.sessions.store import RedisStore
from segue_contract.errors import StoreUnavailable
from segue_contract.ids import SessionName
from segue_contract.limits import StoreLimits
from segue_contract.servers import Valkey
from segue_contract.sync import ops
from segue_contract.sync.state import Cursor
from tests.support.producers import producer
from tests.support.servers import stopped
from tests.support.slow_proxy import SlowProxy

T = TypeVar("T")

S = SessionName("default", "s")
CANCELS = 4  # of one word's append; then it is waited for, however slow the machine is


def new_seed() -> int:
    seed = int(os.environ.get("SEGUE_SEED") or int.from_bytes(os.urandom(4), "big"))
    print("SEGUE_SEED =", seed)
    return seed


def unpack(page: RawPage) -> tuple[Cursor, list[StoredEntry]]:
    return page.tail, page.entries


def op(text: str) -> bytes:
    return ops.encode_op(ops.Set(id=text, name=text, value=text.encode()))


async def names(store: RedisStore, session: SessionName) -> list[str]:
    _, entries = unpack(await store.read(session, Cursor(1, 0), 10_000))
    found = [ops.decode_op(entry.op) for entry in entries]
    return [one.name for one in found if isinstance(one, ops.Set)]


async def test_random_cancels_never_cross_replies(valkey: Valkey) -> None:
    random = Random(new_seed())
    sessions = [SessionName("default", f"s{i}") for i in range(6)]
    async with SlowProxy(valkey.port, lambda: random.uniform(0.0, 0.004)) as proxy:
        store = await RedisStore.connect(proxy.redis_url, limits=StoreLimits(connections=3))
        for session in sessions:
            await store.open_session(session)
        cancelled = 0

        async def writer(session: SessionName) -> int:
            """Each word until it is acknowledged; some tries are cancelled on the way."""
            nonlocal cancelled
            for seq in range(1, 31):
                me = await producer(store, session, session.session, seq)
                word = op(f"{session.session}.{seq}")
                for _ in range(CANCELS):
                    call = asyncio.create_task(store.append(session, me, [word]))
                    done, _ = await asyncio.wait([call], timeout=random.uniform(0.0, 0.03))
                    if done:
                        result = call.result()
                        break
                    call.cancel()
                    await asyncio.wait([call])
                    cancelled += 1
                else:
                    result = await store.append(session, me, [word])
                assert result.status in (Status.OK, Status.DUP)
                assert result.first_offset == seq, "that is another call's reply"
                assert result.expected_seq == seq + 1
            return seq

        async def reader(session: SessionName) -> None:
            for _ in range(30):
                call = asyncio.create_task(names(store, session))
                done, _ = await asyncio.wait([call], timeout=random.uniform(0.0, 0.03))
                if done:
                    assert all(name.startswith(f"{session.session}.") for name in call.result())
                call.cancel()
                await asyncio.wait([call])

        async with asyncio.TaskGroup() as group:
            for session in sessions:
                group.create_task(writer(session))
                group.create_task(reader(session))
        assert cancelled > 0, "nothing was tested"
        for session in sessions:
            assert await names(store, session) == [f"{session.session}.{i}" for i in range(1, 31)]
        await store.close()


async def test_lost_replies_apply_nothing_twice(valkey: Valkey) -> None:
    """Connections are cut under each call; the store repeats it by itself."""
    random = Random(new_seed())
    async with SlowProxy(valkey.port, lambda: random.uniform(0.0, 0.003)) as proxy:
        store = await RedisStore.connect(proxy.redis_url)
        await store.open_session(S)
        me = await producer(store, S, "p", 1)

        async def cut_under(call: Coroutine[Any, Any, T]) -> T:
            running = asyncio.create_task(call)
            for _ in range(2):
                await asyncio.wait([running], timeout=random.uniform(0.0, 0.03))
                proxy.cut()
            return await running

        for seq in range(1, 21):
            words = [op(str(seq))]
            result = await cut_under(store.append(S, replace(me, first_seq=seq), words))
            assert result.first_offset == seq
        claim = await cut_under(store.begin_turn(S, "t", [op("turn")], 30.0))
        assert not claim.known, "its own repetition looked like another one's turn"
        taken = await cut_under(store.take_over(S, "t", 30.0))
        assert taken.epoch == 2, "one call raised the epoch twice"
        assert await names(store, S) == [*(str(i) for i in range(1, 21)), "turn"]
        assert proxy.accepted > 1, "nothing was cut"
        await store.close()


async def test_a_store_that_is_away_gives_a_typed_error_and_writes_nothing(valkey: Valkey) -> None:
    pauses: list[float] = []

    async def no_pause(seconds: float) -> None:
        pauses.append(seconds)
        await asyncio.sleep(0)

    async with SlowProxy(valkey.port) as proxy:
        patient = await RedisStore.connect(proxy.redis_url)
        store = await RedisStore.connect(
            proxy.redis_url, limits=StoreLimits(timeout_s=0.4), sleep=no_pause
        )
        me = await producer(patient, S, "p", 1)
        proxy.refuse = True
        proxy.cut()
        with pytest.raises(StoreUnavailable) as caught:
            await store.append(S, me, [op("lost")])
        assert caught.value.hint
        assert pauses[:3] == [0.05, 0.1, 0.2], "the pause between attempts grows"
        assert max(pauses) <= 0.5
        proxy.refuse = False
        assert await names(patient, S) == []
        assert (await patient.append(S, me, [op("kept")])).status is Status.OK
        await store.close()
        await patient.close()


async def test_writes_wait_for_a_store_that_comes_back(valkey: Valkey) -> None:
    store = await RedisStore.connect(valkey.url, limits=StoreLimits(timeout_s=20.0))
    me = await producer(store, S, "p", 1)
    valkey.process.pause()
    write = asyncio.create_task(store.append(S, me, [op("a")]))
    done, _ = await asyncio.wait([write], timeout=0.3)
    assert not done, "it answered for a store that is stopped"
    valkey.process.resume()
    assert (await write).first_offset == 1
    assert await names(store, S) == ["a"]
    await store.close()


async def test_a_store_that_restarts_empty_is_another_life(valkey: Valkey) -> None:
    store = await RedisStore.connect(valkey.url, limits=StoreLimits(timeout_s=20.0))
    before = (await store.open_session(S)).tail
    await store.append(S, await producer(store, S, "p", 1), [op("a")])
    valkey.process.kill()
    await valkey.restart()
    assert (
        await store.append(S, await producer(store, S, "p", 2), [op("b")])
    ).status is Status.MISSING
    again = await store.open_session(S)
    after, created = again.tail, again.created
    assert created
    assert after.generation > before.generation
    await store.close()


async def test_time_in_which_this_process_did_not_run_is_not_the_stores(valkey: Valkey) -> None:
    """A call under way when the process is stopped: nobody can hear an answer meanwhile."""
    store = await RedisStore.connect(valkey.url, limits=StoreLimits(timeout_s=0.4))
    with stopped(valkey):
        call = asyncio.create_task(store.open_session(S))
        await asyncio.sleep(0.02)  # sent
    time.sleep(1.0)  # noqa: ASYNC251 - as under SIGSTOP, or in a laptop's sleep
    assert (await call).tail.offset == 0
    await store.close()


async def test_a_stalled_link_times_out(valkey: Valkey) -> None:
    async with SlowProxy(valkey.port) as proxy:
        patient = await RedisStore.connect(proxy.redis_url)
        me = await producer(patient, S, "p", 1)
        store = await RedisStore.connect(proxy.redis_url, limits=StoreLimits(timeout_s=0.3))
        proxy.stall()
        with pytest.raises(StoreUnavailable, match="in time"):
            await store.append(S, me, [op("a")])
        proxy.flow()
        assert (await patient.append(S, me, [op("a")])).first_offset == 1
        assert await names(patient, S) == ["a"]
        await store.close()
        await patient.close()


async def test_nobody_listens_there() -> None:
    async with SlowProxy(1) as proxy:
        url = proxy.redis_url
    with pytest.raises(StoreUnavailable, match="SEGUE_REDIS_URL"):
        await RedisStore.connect(url, limits=StoreLimits(timeout_s=0.2))
