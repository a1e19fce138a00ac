"""A store that is a Cluster, with real processes: sessions on every node, and a slot that moves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest
import pytest_asyncio
from redis.exceptions import AskError

from segue.local.probes import probe_store
from segue_cloud.sessions.keys import SessionKeys, key_slot
from segue_cloud.sessions.news import TailTold, Watched
from segue_cloud.sessions.store import RedisStore
from segue_contract.errors import StoreUnavailable
from segue_contract.ids import SessionName
from segue_contract.limits import StoreLimits
from segue_contract.sync import ops
from tests.support.clusters import ThreeNodes, three_nodes
from tests.support.producers import producer
from tests.support.servers import require_valkey
from tests.support.store_writers import Writer, check_log

pytestmark = pytest.mark.asyncio(loop_scope="module")

WAIT_S = 60.0
SESSIONS = 9


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster() -> AsyncIterator[ThreeNodes]:
    require_valkey()
    async with three_nodes() as nodes:
        yield nodes


@pytest_asyncio.fixture(loop_scope="module")
async def store(cluster: ThreeNodes) -> AsyncIterator[RedisStore]:
    store = await RedisStore.connect(cluster.url)
    yield store
    await store.close()


async def spread(cluster: ThreeNodes, names: Sequence[SessionName]) -> set[int]:
    """The ports of the nodes that they lie on."""
    return {(await cluster.owner(key_slot(SessionKeys.of(one).meta))).port for one in names}


async def test_sessions_on_every_node(cluster: ThreeNodes, store: RedisStore) -> None:
    names = [SessionName("default", f"every{i}") for i in range(SESSIONS)]
    assert await spread(cluster, names) == {one.port for one in cluster.nodes}
    for name in names:
        me = await producer(store, name, "p", 1)
        op = ops.encode_op(ops.Set(id="a", name="a", value=b"1"))
        assert (await store.append(name, me, [op])).first_offset == 1
    listed, _ = await store.keeper.list_sessions("default", 100)
    assert {one.session for one in listed} >= {one.session for one in names}
    assert [tail and tail.cursor.offset for tail in await store.tails(names)] == [1] * SESSIONS
    assert set(await store.take_dirty(1000, 0.0)) >= set(names)
    running = store.running_turns("tiny")
    await running.name(names, 0.0)
    assert await running.due(100) == []  # no turn runs in any of them
    assert (await probe_store(cluster.url)).seconds


async def test_changes_are_told_of_sessions_on_any_node(store: RedisStore) -> None:
    names = [SessionName("default", f"told{i}") for i in range(SESSIONS)]
    writers = [await producer(store, name, "p", 1) for name in names]
    op = ops.encode_op(ops.Set(id="a", name="a", value=b"1"))
    async with asyncio.timeout(WAIT_S), store.changes("me") as link:
        await link.watch(names)
        watched: set[SessionName] = set()
        while len(watched) < SESSIONS:
            if isinstance(news := await link.next(), Watched):
                watched.add(news.session)
        for name, me in zip(names, writers, strict=True):
            await store.append(name, me, [op])
        told: set[SessionName] = set()
        while len(told) < SESSIONS:
            if isinstance(news := await link.next(), TailTold):
                told.add(news.session)


async def test_a_slot_that_moves_in_the_middle_of_appends(
    cluster: ThreeNodes, store: RedisStore
) -> None:
    """Its sessions wait for the end of the move; all others go on. Nothing is lost or doubled."""
    writers = [Writer(SessionName("default", f"moved{i}")) for i in range(SESSIONS)]
    enough = asyncio.Event()
    mine = writers[0]
    slot = key_slot(SessionKeys.of(mine.name).meta)
    source = await cluster.owner(slot)
    target = next(one for one in cluster.nodes if one is not source)
    async with asyncio.timeout(WAIT_S), asyncio.TaskGroup() as group:
        for one in writers:
            group.create_task(one.write(store, enough))
        await asyncio.gather(*(one.half_way.wait() for one in writers))
        await cluster.begin_move(slot, source, target)
        while await cluster.move_keys(slot, source, target):
            pass
        with pytest.raises(AskError):
            await cluster.ask(source, "GET", SessionKeys.of(mine.name).meta)
        # One key alone is served where it went, in the middle of the move.
        (tail,) = await store.tails([mine.name])
        assert tail is not None
        assert tail.cursor.offset >= len(mine.ops)
        counts = [len(one.ops) for one in writers[1:]]
        others = set(range(len(counts)))
        while others:
            others -= {i for i in others if len(writers[1 + i].ops) > counts[i] + 5}
            await asyncio.sleep(0)
        await cluster.end_move(slot, source, target)
        await mine.goes_on.wait()  # a node that takes over a slot is another life of the store
        enough.set()
    assert await cluster.owner(slot) is target
    assert [await check_log(store, one) for one in writers] == [0] * SESSIONS


async def test_a_member_without_cluster_in_its_url_says_so(cluster: ThreeNodes) -> None:
    store = await RedisStore.connect(
        f"redis://127.0.0.1:{cluster.nodes[0].port}", limits=StoreLimits(timeout_s=1.0)
    )
    names = [SessionName("default", f"every{number}") for number in range(SESSIONS)]
    with pytest.raises(StoreUnavailable, match="MOVED") as caught:
        await asyncio.gather(*map(store.open_session, names))
    assert "cluster=1" in caught.value.hint
    await store.close()


async def test_a_server_that_is_no_member_says_so() -> None:
    require_valkey()
    with pytest.raises(StoreUnavailable, match="no node of the Cluster"):
        await RedisStore.connect("redis://127.0.0.1:1?cluster=1", limits=StoreLimits(timeout_s=0.3))
