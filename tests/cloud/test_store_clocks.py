"""The store's clock, and what is not published: what a skewed or restored store must not do."""

from __future__ import annotations

import time

from segue_cloud.sessions.keys import SessionKeys, active_key, active_shard
from segue_cloud.sessions.port import Producer, Status
from segue_cloud.sessions.store import RedisStore
from segue_contract.ids import SessionName
from segue_contract.limits import PRODUCER_MEMORY
from segue_contract.sync.ops import Set, encode_op
from segue_contract.sync.state import Cursor

S = SessionName("default", "trip")
KEYS = SessionKeys.of(S)
HOUR_MS = 3_600_000


def op(text: str) -> bytes:
    return encode_op(Set(id=text, device="phone", name="n", value=text.encode()))


async def _writer(store: RedisStore, name: str = "p") -> Producer:
    return Producer(name, (await store.open_session(S, device="phone", producer=name)).epoch)


async def test_what_a_lost_tail_had_published_counts_for_nothing(store: RedisStore) -> None:
    me = await _writer(store)
    done = await store.append(S, me, [op("a"), op("b"), op("c")])
    await store.mark_published(S, Cursor(done.generation, 3))
    # A replica that has only the first entry, and a mark of what the primary published.
    await store._wire.call(
        ("XTRIM", KEYS.log, "MAXLEN", 0),
        ("XADD", KEYS.log, f"{done.generation}-{4}", "o", b""),
        ("XDEL", KEYS.log, f"{done.generation}-{4}"),
        ("DEL", KEYS.log),
        ("XADD", KEYS.log, f"{done.generation}-1", "o", op("a")),
        ("HSET", KEYS.meta, "tail", 1, "life", "of another store", "pub", 3, "da", 0),
    )
    me = await _writer(store)
    assert await store.append(S, me, [op("d")])
    (tail,) = await store.tails([S])
    assert tail is not None
    assert tail.cursor.generation > done.generation
    assert tail.cursor.offset == 2
    assert await store.take_dirty(10, 0.0) == [S], "nobody published the new entry"


async def test_a_lease_of_a_clock_that_was_set_back_holds_nobody_up(store: RedisStore) -> None:
    await store.open_session(S)
    old = await store.begin_turn(S, "t1", [op("a")], 30.0)
    ahead = int(time.time() * 1000) + HOUR_MS
    await store._wire.call(("HSET", KEYS.meta, "lease", ahead))
    claim = await store.begin_turn(S, "t2", [op("b")], 30.0)
    assert (claim.status, claim.holder) == (Status.OK, "t1")
    late = await store.append_turn(S, old.hold("t1"), 1, [op("c")])
    assert late.status is Status.STALE


async def test_a_wiped_stores_next_life_is_later_than_what_is_known(store: RedisStore) -> None:
    """Also where its clock went back."""
    known = int(time.time() * 1000) + HOUR_MS
    opened = await store.open_session(S, device="phone", after_generation=known)
    assert opened.created
    assert opened.tail.generation > known


async def test_a_dirty_session_does_not_leave_the_lists(store: RedisStore) -> None:
    """However many others the sweep looks at before."""
    done = await store.append(S, await _writer(store), [op("a")])
    active = active_key(active_shard(S))
    await store._wire.call(("ZADD", active, 1000, str(S)))  # nobody named it for years
    assert await store.take_idle(10, 60.0) == []
    assert await store.take_dirty(10, 0.0) == [S]
    assert await store.take_idle(10, 0.0) == []
    await store.mark_published(S, Cursor(done.generation, 1))
    assert await store.take_idle(10, 60.0) == [], "it was named just now"
    assert await store.take_idle(10, 0.0) == [S]
    assert await store.take_idle(10, 0.0) == []


async def test_a_writer_is_known_while_its_call_may_be_repeated(store: RedisStore) -> None:
    """However many others write meanwhile; then those that wrote last are."""
    me = await _writer(store, "mine")
    first = await store.append(S, me, [op("mine")])
    for number in range(PRODUCER_MEMORY + 9):
        other = await _writer(store, f"p{number}")
        assert (await store.append(S, other, [op("other")])).status is Status.OK
    again = await store.append(S, me, [op("mine")])
    assert (again.status, again.first_offset) == (Status.DUP, first.first_offset)
    # Long after: only so many are.
    (names,) = await store._wire.call(("ZRANGE", KEYS.producers, 0, -1))
    stale = [part for name in names for part in (1000, name)]
    await store._wire.call(("ZADD", KEYS.producers, *stale))
    await _writer(store, "new")
    assert await store._wire.call(("ZCARD", KEYS.producers)) == [PRODUCER_MEMORY]
