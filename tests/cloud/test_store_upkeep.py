"""What a log's upkeep asks of a real Valkey: lists, snapshots, what is yet to be published; and
the rules of a Cluster."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from segue_cloud.sessions.keys import SessionKeys, key_slot
from segue_cloud.sessions.port import (
    Status,
)
from segue_cloud.sessions.store import RedisStore
from segue_cloud.sessions.whole import Deleted, SessionImport
from segue_contract import limits
from segue_contract.ids import SessionName
from segue_contract.servers import Valkey
from segue_contract.servers.ports import free_port
from segue_contract.sync.state import Cursor, SessionState, TurnState
from tests.support.producers import producer
from tests.support.servers import require_valkey
from tests.support.store_ops import NOWHERE, S, another_life, begin, op, texts, unpack


@pytest.fixture
async def store(valkey: Valkey) -> AsyncIterator[RedisStore]:
    store = await RedisStore.connect(valkey.url)
    await store.open_session(S)
    yield store
    await store.close()


async def test_list_is_newest_first(store: RedisStore) -> None:
    await store.open_session(SessionName("default", "other"))
    await begin(store, "t1", 30.0)
    found = (await store.keeper.list_sessions("default", 10))[0]
    assert [one.updated_ms for one in found] == sorted((o.updated_ms for o in found), reverse=True)
    first, second = sorted(found, key=lambda one: one.session, reverse=True)
    assert (first.session, first.title, first.turns) == ("trip", "ask t1", 1)
    assert first.running_turn == "t1"
    assert first.cursor.offset == 2
    assert (second.session, second.running_turn) == ("other", "")
    assert len((await store.keeper.list_sessions("default", 1))[0]) == 1
    assert (await store.keeper.list_sessions("nobody", 10))[0] == []


async def test_compaction_keeps_a_snapshot_and_the_end(store: RedisStore) -> None:
    await store.append(S, await producer(store, S, "p", 1), [op(str(i)) for i in range(10)])
    tail, _ = unpack(await store.read(S, Cursor(1, 0), 1))
    assert await store.load_snapshot(S) is None
    state = SessionState(cursor=Cursor(tail.generation, 8), turns=[TurnState(turn="t")])
    await store.compact(S, state, 6, 0)
    after, entries = unpack(await store.read(S, Cursor(1, 0), 100))
    assert after == tail
    assert [entry.cursor.offset for entry in entries] == [6, 7, 8, 9, 10]
    found = await store.load_snapshot(S)
    assert found is not None
    assert (found.cursor.offset, found.turns[0].turn) == (8, "t")
    # An older one, of a slower process, changes nothing; nor does one from another time.
    await store.compact(S, SessionState(cursor=Cursor(tail.generation, 3)), 3, 0)
    await store.compact(S, SessionState(cursor=Cursor(tail.generation, 30)), 30, 0)
    assert (await store.load_snapshot(S)) == found
    assert (await store.append(S, await producer(store, S, "p", 11), [op("z")])).first_offset == 11


async def test_a_state_folded_before_a_loss_is_no_snapshot(store: RedisStore) -> None:
    await store.append(S, await producer(store, S, "p", 1), [op("a"), op("b")])
    tail, _ = unpack(await store.read(S, Cursor(1, 0), 10))
    await another_life(store)
    after, _ = unpack(await store.read(S, Cursor(), 10))
    assert after.generation > tail.generation
    assert after.offset == 2
    # It may hold what was lost, and its offset is one that the log has by now again.
    await store.compact(S, SessionState(cursor=tail), 3, 0)
    assert await store.load_snapshot(S) is None
    assert await texts(store) == ["a", "b"]
    await store.compact(S, SessionState(cursor=after), 3, 0)
    found = await store.load_snapshot(S)
    assert found is not None
    assert found.cursor == after


async def test_dirty_until_published(store: RedisStore) -> None:
    assert await store.take_dirty(10, 0.0) == []
    one = await store.append(S, await producer(store, S, "p", 1), [op("a")])
    assert await store.take_dirty(10, 0.0) == [S]
    assert await store.take_dirty(10, 60.0) == []
    await store.append(S, await producer(store, S, "p", 2), [op("b")])
    await store.mark_published(S, Cursor(one.generation, 1))
    assert await store.take_dirty(10, 0.0) == [S]
    await store.mark_published(S, Cursor(one.generation, 2))
    assert await store.take_dirty(10, 0.0) == []
    assert await store.take_idle(10, 60.0) == []
    assert await store.take_idle(10, 0.0) == [S]
    assert await store.take_idle(10, 0.0) == []


async def test_what_was_published_of_lost_entries_is_not_of_those_in_their_place(
    store: RedisStore,
) -> None:
    me = await producer(store, S, "p", 1)
    one = await store.append(S, me, [op("a"), op("b"), op("lost")])
    await store.mark_published(S, Cursor(one.generation, 3))
    assert await store.take_dirty(64, 0.0) == []
    keys = SessionKeys.of(S)  # the next server has two of them
    await store._wire.call(
        ("XDEL", keys.log, f"{one.generation}-3"),
        ("HSET", keys.meta, "tail", 2, "life", "another"),
    )
    two = await store.append(S, await producer(store, S, "other", 1), [op("new")])
    assert two.generation > one.generation
    assert two.tail == 3
    assert await store.take_dirty(64, 0.0) == [S]
    await store.mark_published(S, Cursor(one.generation, 3))
    assert await store.take_dirty(64, 0.0) == [S], "that was said of the earlier life"
    await store.mark_published(S, Cursor(two.generation, 2))
    assert await store.take_dirty(64, 0.0) == [S], "its last entry was told to nobody"
    await store.mark_published(S, Cursor(two.generation, 3))
    assert await store.take_dirty(64, 0.0) == []


async def test_the_sweep_reaches_every_session_in_turn(store: RedisStore) -> None:
    sessions = {SessionName("default", f"s{i}") for i in range(40)}
    for session in sessions:
        await store.open_session(session)
        await store.append(session, await producer(store, session, "p", 1), [op("a")])
    found: set[SessionName] = set()
    for _ in range(len(sessions)):  # one of each list at a time
        found |= set(await store.take_dirty(limits.ACTIVE_SHARDS, 0.0))
    assert found == sessions


async def test_tails_of_many(store: RedisStore) -> None:
    one = await store.append(S, await producer(store, S, "p", 1), [op("a")])
    found, nowhere = await store.tails([S, NOWHERE])
    assert found is not None
    assert (found.cursor, nowhere) == (Cursor(one.generation, 1), None)
    assert await store.tails([]) == []


async def test_every_verb_obeys_cluster_rules() -> None:
    """A script that leaves its slot, or touches a key it did not declare, fails there."""
    require_valkey()
    options = ("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
    async with Valkey.start(options=options) as valkey:
        await _own_all_slots(valkey)
        store = await RedisStore.connect(valkey.url)
        await store.open_session(S, device="phone")
        await store.check_device(S, "phone")
        t1 = await begin(store, "t1", 30.0)
        assert (await store.append_turn(S, t1, 1, [op("a")])).status is Status.OK
        taken = await store.take_over(S, "t1", 30.0)
        assert (await store.fence_turn(S, "t1")).status is Status.BUSY
        await store.renew_turn(S, taken.hold("t1"), 30.0)
        assert await store.request_stop(S) == "t1"
        await store.append_turn(S, taken.hold("t1"), 1, [op("b")], ends=True)
        done = await store.append(S, await producer(store, S, "phone", 1), [op("c")])
        assert done.tail == 5
        tail = Cursor(done.generation, done.tail)
        assert await store.take_dirty(10, 0.0) == [S]
        await store.mark_published(S, tail)
        await store.compact(S, SessionState(cursor=tail), 5, 0)
        assert await store.load_snapshot(S) is not None
        await another_life(store)
        await store.mend(S, SessionState(cursor=tail))  # nothing is missing
        there = (await store.open_session(S)).tail
        assert there.generation > tail.generation
        assert there.offset == 5
        (now,) = await store.tails([S])
        assert now is not None
        assert now.cursor == there
        assert await store.take_idle(10, 0.0) == [], "nobody was told of the new generation"
        await store.mark_published(S, there)
        assert await store.take_idle(10, 0.0) == [S]
        assert [one.session for one in (await store.keeper.list_sessions("default", 10))[0]] == [
            "trip"
        ]
        assert await store.keeper.delete(S) is Deleted.YES
        assert await store.deleted([S]) == {S}
        later = await store.keeper.latest_generation(S) + 1
        state = SessionState(values={"n": b"v"})
        made = SessionImport(
            generation=later, first=1, ops=[op("a")], folded=0, state=b"", session=state, title="t"
        )
        assert await store.keeper.make(S, made, "nonce") == Cursor(later, 1)
        assert await texts(store) == ["a"]
        await store.close()


async def _own_all_slots(valkey: Valkey) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", valkey.port)
    writer.write(b"CLUSTER ADDSLOTSRANGE 0 16383\r\n")
    assert await reader.readline() == b"+OK\r\n"
    state = b""
    while b"cluster_state:ok" not in state:
        writer.write(b"CLUSTER INFO\r\n")
        size = int((await reader.readline())[1:])
        state = await reader.readexactly(size + 2)
    writer.close()


def test_the_keys_of_a_session_share_a_slot() -> None:
    assert key_slot("123456789") == 12739  # the Cluster specification's own example
    assert key_slot("foo{hash_tag}bar") == key_slot("hash_tag")
    for session in ("a", "b-c.d", "x" * limits.MAX_ID_CHARS):
        keys = SessionKeys.of(SessionName("default", session)).all
        assert len(set(keys)) == len(keys)
        assert len({key_slot(key) for key in keys}) == 1
