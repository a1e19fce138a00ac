"""The log's script on a real Valkey: order, fencing, duplicates, gaps, turns, leases."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from random import Random

import pytest

from segue_cloud.sessions.port import (
    Producer,
    Status,
)
from segue_cloud.sessions.store import RedisStore
from segue_cloud.sessions.whole import Deleted
from segue_contract import limits
from segue_contract.errors import InvalidArgument, SessionBusy, UnknownDevice, UnknownSession
from segue_contract.servers import Valkey
from segue_contract.sync.state import Cursor, SessionState
from tests.support.producers import producer
from tests.support.store_ops import NOWHERE, S, begin, op, opening, texts, unpack


@pytest.fixture
async def store(valkey: Valkey) -> AsyncIterator[RedisStore]:
    store = await RedisStore.connect(valkey.url)
    await store.open_session(S)
    yield store
    await store.close()


async def test_open_read_and_unknown_sessions(store: RedisStore) -> None:
    opened = await store.open_session(S, device="phone")
    tail, created = opened.tail, opened.created
    assert not created
    assert tail.offset == 0
    with pytest.raises(UnknownSession):
        await store.open_session(NOWHERE, must_exist=True)
    with pytest.raises(UnknownSession):
        await store.read(NOWHERE, Cursor(), 10)
    assert (await store.append(NOWHERE, Producer("p", 0, 1), [op("a")])).status is Status.MISSING
    assert (await store.begin_turn(NOWHERE, "t", [], 5.0)).status is Status.MISSING
    await store.check_device(S, "phone")
    with pytest.raises(UnknownDevice):
        await store.check_device(S, "laptop")
    with pytest.raises(UnknownSession):
        await store.check_device(NOWHERE, "phone")


async def test_offsets_from_one_and_entry_ids(store: RedisStore) -> None:
    first = await store.append(S, await producer(store, S, "phone", 1), [op("a"), op("b")])
    assert (first.status, first.first_offset, first.tail) == (Status.OK, 1, 2)
    tail, entries = unpack(await store.read(S, Cursor(1, 1), 10))
    assert tail == Cursor(first.generation, 2)
    assert [entry.cursor for entry in entries] == [tail]
    assert entries[0].op == op("b")


async def test_duplicates_gaps_and_stale_epochs(store: RedisStore) -> None:
    await store.append(S, await producer(store, S, "phone", 1), [op("a"), op("b")])
    await store.append(S, await producer(store, S, "laptop", 1), [op("x")])
    await store.append(S, await producer(store, S, "phone", 3), [op("c")])

    again = await store.append(S, await producer(store, S, "phone", 1), [op("a"), op("b")])
    assert (again.status, again.first_offset, again.tail) == (Status.DUP, 1, 4)
    later = await store.append(S, await producer(store, S, "phone", 3), [op("c")])
    assert (later.status, later.first_offset) == (Status.DUP, 4)
    gap = await store.append(S, await producer(store, S, "phone", 6), [op("f")])
    assert (gap.status, gap.expected_seq) == (Status.GAP, 4)

    # Half known, half new: only the new half is written.
    partly = await store.append(
        S, await producer(store, S, "phone", 3), [op("c"), op("d"), op("e")]
    )
    assert (partly.status, partly.first_offset) == (Status.OK, 4)
    assert (partly.tail, partly.appended) == (6, 2)
    assert await texts(store) == ["a", "b", "x", "c", "d", "e"]

    old = await producer(store, S, "phone", 6)
    opened = await store.open_session(S, producer="phone")
    assert opened.epoch > old.epoch
    stale = await store.append(S, old, [op("z")])
    assert (stale.status, stale.current_epoch) == (Status.STALE, opened.epoch)
    new_epoch = await store.append(S, Producer("phone", opened.epoch, 1), [op("g")])
    assert new_epoch.status is Status.OK
    for epoch in (0, opened.epoch + 1, limits.MAX_COUNT):
        nobody = await store.append(S, Producer("phone", epoch, 2), [op("z")])
        assert nobody.status is Status.STALE, "an epoch that nobody was given"
    assert (await store.append(S, Producer("new", 0, 1), [op("z")])).status is Status.STALE
    assert await texts(store) == ["a", "b", "x", "c", "d", "e", "g"]


async def test_each_duplicate_gets_the_offset_it_got_then(store: RedisStore) -> None:
    """Two producers in turn, so that no two ops of one are neighbours."""
    got: dict[tuple[str, int], int] = {}
    for seq in range(1, limits.PRODUCER_RUNS + 11):
        for name in ("a", "b"):
            result = await store.append(
                S, await producer(store, S, name, seq), [op(f"{name}{seq}")]
            )
            got[name, seq] = result.first_offset
    for (name, seq), offset in got.items():
        again = await store.append(S, await producer(store, S, name, seq), [op(f"{name}{seq}")])
        forgotten = seq <= 10
        assert again.status is (Status.UNKNOWN if forgotten else Status.DUP)
        assert again.first_offset == (0 if forgotten else offset)


async def test_refuses_what_is_out_of_range(store: RedisStore) -> None:
    for epoch, seq, batch in [
        (-1, 1, [op("a")]),
        (0, 0, [op("a")]),
        (0, 1, []),
        (0, 1, [op("a")] * (limits.MAX_APPEND_OPS + 1)),
        (0, 1, [b"x" * (limits.MAX_OP_BYTES + 1)]),
    ]:
        with pytest.raises(InvalidArgument):
            await store.append(S, Producer("phone", epoch, seq), batch)
    assert await texts(store) == []


async def test_other_ops_under_used_numbers_are_no_success(store: RedisStore) -> None:
    me = await producer(store, S, "phone", 1)
    await store.append(S, me, [op("a"), op("b")])
    assert (await store.append(S, me, [op("a"), op("x")])).status is Status.TAKEN
    assert (await store.append(S, me, [op("y")])).status is Status.TAKEN
    assert (await store.append(S, me, [op("a")])).status is Status.DUP
    tail = (await store.read(S, Cursor(), 10)).tail
    await store.compact(S, SessionState(cursor=tail), 3, 0)
    assert (await store.append(S, me, [op("a")])).status is Status.UNKNOWN
    assert await texts(store) == []


async def test_many_producers_at_once_lose_and_double_nothing(store: RedisStore) -> None:
    seed = 20240611
    print("seed", seed)
    random = Random(seed)

    async def produce(name: str) -> list[str]:
        words = [f"{name}.{i}" for i in range(40)]
        sent = 0
        while sent < len(words):
            batch = words[sent : sent + random.randrange(1, 5)]
            for _ in range(random.choice((1, 1, 2))):  # sometimes twice, as after a lost reply
                result = await store.append(
                    S, await producer(store, S, name, sent + 1), [op(w) for w in batch]
                )
                assert result.status in (Status.OK, Status.DUP)
            sent += len(batch)
        return words

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(produce(f"p{i}")) for i in range(12)]
    written = await texts(store)
    assert len(written) == 12 * 40
    for task in tasks:
        mine = task.result()
        assert [word for word in written if word in set(mine)] == mine


async def test_scripts_are_loaded_again_after_a_flush(store: RedisStore, valkey: Valkey) -> None:
    await store.append(S, await producer(store, S, "phone", 1), [op("a")])
    reader, writer = await asyncio.open_connection("127.0.0.1", valkey.port)
    writer.write(b"SCRIPT FLUSH\r\n")
    assert await reader.readline() == b"+OK\r\n"
    writer.close()
    assert (
        await store.append(S, await producer(store, S, "phone", 2), [op("b")])
    ).status is Status.OK
    assert await texts(store) == ["a", "b"]


# -- turns ------------------------------------------------------------------------------------


async def test_one_turn_at_a_time_and_repeated_begins(store: RedisStore) -> None:
    claim = await store.begin_turn(S, "t1", opening("t1"), 30.0)
    assert (claim.status, claim.epoch, claim.known) == (Status.OK, 1, False)
    assert (claim.cursor.offset, claim.appended) == (2, 2)
    again = await store.begin_turn(S, "t1", opening("t1"), 30.0)
    assert (again.status, again.known, again.ended) == (Status.OK, True, False)
    assert again.cursor == claim.cursor
    busy = await store.begin_turn(S, "t2", opening("t2"), 30.0)
    assert (busy.status, busy.holder) == (Status.BUSY, "t1")

    t1 = claim.hold("t1")
    end = await store.append_turn(S, t1, 1, [op("end")], ends=True)
    assert end.status is Status.OK
    repeated = await store.append_turn(S, t1, 1, [op("end")], ends=True)
    assert (repeated.status, repeated.first_offset) == (Status.DUP, 3)
    after = await store.append_turn(S, t1, 2, [op("late")])
    assert after.status is Status.STALE
    known = await store.begin_turn(S, "t1", opening("t1"), 30.0)
    assert (known.known, known.ended) == (True, True)
    assert (await store.begin_turn(S, "t2", opening("t2"), 30.0)).status is Status.OK
    tail, _ = unpack(await store.read(S, Cursor(1, 0), 100))
    assert tail.offset == 5


async def test_an_expired_lease_gives_way_and_the_old_owner_is_fenced(store: RedisStore) -> None:
    t1 = await begin(store, "t1", 0.0)
    claim = await store.begin_turn(S, "t2", opening("t2"), 30.0)
    assert (claim.status, claim.holder) == (Status.OK, "t1")
    stale = await store.append_turn(S, t1, 1, [op("zombie")])
    assert (stale.status, stale.current_epoch) == (Status.STALE, 2)
    assert (await store.renew_turn(S, t1, 30.0)).status is Status.STALE
    # Somebody ends it in its owner's name, while the other one runs.
    fence = await store.fence_turn(S, "t1")
    assert fence.status is Status.OK
    ended = await store.append_turn(S, fence.hold("t1"), 1, [op("e")], ends=True)
    assert ended.status is Status.OK
    assert (await store.append_turn(S, claim.hold("t2"), 1, [op("f")])).status is Status.OK
    assert (await store.fence_turn(S, "t1")).status is Status.MISSING


async def test_take_over_raises_the_epoch(store: RedisStore) -> None:
    t1 = await begin(store, "t1", 30.0)
    await store.append_turn(S, t1, 1, [op("a")])
    held = await store.take_over(S, "t1", 30.0, quiet_s=30.0)
    assert (held.status, held.holder) == (Status.BUSY, "t1")
    taken = await store.take_over(S, "t1", 0.0)
    assert (taken.status, taken.epoch) == (Status.OK, 2)
    assert (await store.append_turn(S, t1, 2, [op("b")])).status is Status.STALE
    assert (await store.append_turn(S, taken.hold("t1"), 1, [op("c")])).status is Status.OK
    assert (await store.take_over(S, "nobody", 1.0)).status is Status.MISSING
    assert await texts(store) == ["a", "c"]


async def test_one_epoch_has_one_owner(store: RedisStore) -> None:
    """Whoever names the turn and its epoch, but not the claim that made it, is refused."""
    t1 = await begin(store, "t1", 30.0)
    assert (await store.append_turn(S, t1, 1, [op("a")])).status is Status.OK
    other = replace(t1, nonce="another")
    for first in (1, 2):
        assert (await store.append_turn(S, other, first, [op("z")])).status is Status.STALE
    assert (await store.append_turn(S, other, 1, [op("a")])).status is Status.STALE, "no duplicate"
    assert (await store.renew_turn(S, other, 30.0)).status is Status.STALE
    await store.release_turn(S, other)
    held = await store.take_over(S, "t1", 30.0, quiet_s=30.0)
    assert held.status is Status.BUSY, "another one gave the lease back"
    assert await texts(store) == ["a"]


async def test_whoever_takes_an_older_turn_over_fences_the_later_one(store: RedisStore) -> None:
    """Both lost their owners; that of the second one was paused and is alive."""
    await begin(store, "t1", 0.0)
    t2 = await begin(store, "t2", 0.0)
    taken = await store.take_over(S, "t1", 30.0)
    assert (taken.status, taken.epoch) == (Status.OK, 3), "the second one had fenced it"
    stale = await store.append_turn(S, t2, 1, [op("z")])
    assert (stale.status, stale.current_epoch) == (Status.STALE, 2)
    assert (await store.append_turn(S, taken.hold("t1"), 1, [op("a")])).status is Status.OK
    assert await texts(store) == ["a"]


async def test_an_expired_lease_may_be_taken_over(store: RedisStore) -> None:
    await begin(store, "t1", 0.0)
    taken = await store.take_over(S, "t1", 30.0, quiet_s=30.0)
    assert (taken.status, taken.epoch) == (Status.OK, 2)
    again = await store.take_over(S, "t1", 30.0, quiet_s=30.0)
    assert again.status is Status.BUSY


async def test_a_lease_that_nobody_renewed_for_a_while_may_be_taken_over(
    store: RedisStore,
) -> None:
    t1 = await begin(store, "t1", 30.0)
    assert (await store.take_over(S, "t1", 30.0, quiet_s=20.0)).status is Status.BUSY
    assert (await store.renew_turn(S, t1, 15.0)).status is Status.OK  # as if 15 s ago
    assert (await store.take_over(S, "t1", 30.0, quiet_s=20.0)).status is Status.BUSY
    taken = await store.take_over(S, "t1", 30.0, quiet_s=10.0)
    assert (taken.status, taken.epoch) == (Status.OK, 2)
    assert (await store.take_over(S, "t1", 30.0, quiet_s=10.0)).status is Status.BUSY


async def test_a_turn_that_is_taken_over_fences_the_one_that_held_its_session(
    store: RedisStore,
) -> None:
    """An instance died between a turn's begin and the end of the one before."""
    await begin(store, "t1", 0.0)
    t2 = await begin(store, "t2", 0.0)
    assert (await store.append_turn(S, t2, 1, [op("a")])).status is Status.OK
    assert (await store.take_over(S, "t1", 30.0, quiet_s=30.0)).status is Status.BUSY
    assert (await store.renew_turn(S, t2, 0.0)).status is Status.OK  # it is paused, and alive
    taken = await store.take_over(S, "t1", 30.0)
    assert (taken.status, taken.epoch) == (Status.OK, 3)
    stale = await store.append_turn(S, t2, 2, [op("zombie")])
    assert (stale.status, stale.current_epoch) == (Status.STALE, 2)
    assert (await store.append_turn(S, taken.hold("t1"), 1, [op("b")])).status is Status.OK
    assert await texts(store) == ["a", "b"]


async def test_a_lease_that_a_clock_gave_which_was_set_back_since_is_none(
    store: RedisStore,
) -> None:
    await begin(store, "t1", 3600.0)  # as it looks to a clock that is an hour behind
    taken = await store.take_over(S, "t1", 30.0, quiet_s=30.0)
    assert (taken.status, taken.epoch) == (Status.OK, 2)
    assert (await store.begin_turn(S, "t2", opening("t2"), 30.0)).status is Status.BUSY


async def test_a_lease_that_holds_no_turn_keeps_no_session_from_being_deleted(
    store: RedisStore,
) -> None:
    await begin(store, "t1", 300.0)  # as before: no owner asks for so much
    assert (await store.keeper.delete(S)) is Deleted.YES
    await store.open_session(S)
    await begin(store, "t1", 30.0)
    with pytest.raises(SessionBusy):
        await store.keeper.delete(S)


async def test_a_stop_reaches_the_owner_with_its_next_call(store: RedisStore) -> None:
    assert await store.request_stop(S) == ""
    t1 = await begin(store, "t1", 30.0)
    assert await store.request_stop(S, "t0") == ""
    assert not (await store.append_turn(S, t1, 1, [op("a")])).stop_requested
    assert await store.request_stop(S) == "t1"
    assert (await store.append_turn(S, t1, 2, [op("b")])).stop_requested
    assert (await store.renew_turn(S, t1, 5.0)).stop_requested
    await store.append_turn(S, t1, 3, [op("c")], ends=True)
    t2 = await begin(store, "t2", 30.0)
    assert not (await store.renew_turn(S, t2, 5.0)).stop_requested


async def test_only_so_many_turn_ids_are_remembered(store: RedisStore) -> None:
    for number in range(limits.TURN_ID_MEMORY + 2):
        turn = f"t{number}"
        held = await begin(store, turn, 30.0)
        await store.append_turn(S, held, 1, [op("e")], ends=True)
    last = f"t{limits.TURN_ID_MEMORY + 1}"
    assert (await store.begin_turn(S, last, opening(last), 1.0)).known
    assert not (await store.begin_turn(S, "t0", opening("t0"), 1.0)).known
