"""Following a session in one process: a snapshot, then everything, also from other instances."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from segue_cloud.hub.hub import Following
from segue_cloud.hub.state import HubState
from segue_cloud.log.session_log import SessionLog
from segue_cloud.sessions.keys import SessionKeys
from segue_cloud.sessions.port import LogOp, Producer, RawPage, Status, StoredEntry, TurnHold
from segue_cloud.sessions.store import RedisStore
from segue_contract import limits
from segue_contract.errors import CursorAhead, InvalidArgument, UnknownSession
from segue_contract.ids import SessionName
from segue_contract.servers import Valkey
from segue_contract.sync import ops
from segue_contract.sync.replica import Applied, Replica
from segue_contract.sync.state import Cursor, SessionState, encode_state
from tests.support.producers import producer

S, NOWHERE = SessionName("default", "trip"), SessionName("default", "nowhere")
DEADLINE_S = 20


def unpack(page: RawPage) -> tuple[Cursor, list[StoredEntry]]:
    return page.tail, page.entries


def op(text: str) -> LogOp:
    return LogOp.of(ops.Set(id=text, name="last", value=text.encode()))


@pytest.fixture
async def store(valkey: Valkey) -> AsyncIterator[RedisStore]:
    store = await RedisStore.connect(valkey.url)
    await store.open_session(S)
    yield store
    await store.close()


@pytest.fixture
async def log(store: RedisStore) -> AsyncIterator[SessionLog]:
    async with SessionLog(store) as log:
        yield log
        log.check_integrity()


async def collect(following: AsyncIterator[Following], until: int) -> tuple[Replica, list[int]]:
    """Follow until an offset is known; the replica, and the offsets that came one by one."""
    replica, offsets = Replica(), []
    async with asyncio.timeout(DEADLINE_S):
        async for step in following:
            if step.snapshot is not None:
                replica.load(step.snapshot)
            for entry in step.entries:
                applied = replica.apply_op(entry.cursor.generation, entry.cursor.offset, entry.op)
                assert applied is Applied.APPLIED, "twice, or out of order"
                offsets.append(entry.cursor.offset)
            if replica.cursor.offset >= until:
                break
    return replica, offsets


async def next_offsets(following: AsyncIterator[Following]) -> list[int]:
    return [entry.cursor.offset for entry in (await anext(following)).entries]


async def test_snapshot_then_live_without_a_race(store: RedisStore, log: SessionLog) -> None:
    """Followers join while three producers write: nobody misses or repeats anything."""

    async def produce(name: str) -> None:
        for seq in range(1, 41):
            await log.append(S, await producer(log, S, name, seq), [op(f"{name}{seq}")])

    async def follow(after_appends: int) -> Replica:
        while (await log.read(S, Cursor(), 1)).tail.offset < after_appends:
            pass
        async with log.follow(S) as following:
            return (await collect(following, 120))[0]

    async with asyncio.TaskGroup() as group:
        followers = [group.create_task(follow(n)) for n in (0, 0, 20, 60, 119)]
        for name in "abc":
            group.create_task(produce(name))
    states = {encode_state(task.result().state) for task in followers}
    assert states == {encode_state(await log.state(S))}


async def test_entries_of_another_instance_are_found(store: RedisStore, log: SessionLog) -> None:
    async with log.follow(S) as following:
        assert (await anext(following)).snapshot is not None
        await store.append(
            S, await producer(store, S, "elsewhere", 1), [op("a").data, op("b").data]
        )
        _, offsets = await collect(following, 2)
        assert offsets == [1, 2]


@pytest.mark.parametrize("reader", ["follows", "joins"])
async def test_what_one_follower_reads_wakes_the_others(
    store: RedisStore, log: SessionLog, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    """It may read an entry before the store's news of it comes: those wake nobody any more."""
    me = await producer(store, S, "elsewhere", 1)
    held: list[tuple[SessionName, Cursor]] = []
    came = asyncio.Event()
    told = log._hub.told

    def hold(session: SessionName, tail: Cursor) -> None:
        held.append((session, tail))
        came.set()

    async with log.follow(S) as one, log.follow(S) as other, asyncio.timeout(DEADLINE_S):
        for following in (one, other):
            assert (await anext(following)).snapshot is not None
        await store.append(S, me, [op("a").data])
        assert await next_offsets(one) == [1]
        waiting = asyncio.create_task(next_offsets(one))
        monkeypatch.setattr(log._hub, "told", hold)
        await store.append(S, Producer("elsewhere", me.epoch, 2), [op("b").data])
        await came.wait()
        if reader == "follows":
            assert await next_offsets(other) == [1, 2]
        else:
            async with log.follow(S) as third:
                assert (await anext(third)).snapshot is not None
        for news in held:
            told(*news)
        assert await waiting == [2]


async def test_a_follower_that_overflows_catches_up(store: RedisStore) -> None:
    async with SessionLog(store, hub_state=HubState(queue_entries=3)) as log:
        async with log.follow(S) as following:
            assert (await anext(following)).snapshot is not None
            for seq in range(1, 31):  # it does not look meanwhile
                await log.append(S, await producer(log, S, "p", seq), [op(str(seq))])
            _, offsets = await collect(following, 30)
            assert offsets == list(range(1, 31))
        log.check_integrity()


async def another_life(store: RedisStore, **fields: int) -> None:
    """As after a fail-over to a server that has less of the session."""
    meta = SessionKeys.of(S).meta
    changes = [part for field in fields.items() for part in field]
    await store._wire.call(("HSET", meta, "life", "another", *changes))


async def test_a_follower_that_lost_nothing_goes_on_in_another_generation(
    store: RedisStore, log: SessionLog
) -> None:
    async with log.follow(S) as following:
        assert (await anext(following)).snapshot is not None
        await log.append(S, await producer(log, S, "p", 1), [op("a")])
        first, _ = await collect(following, 1)
        await another_life(store)
        await log.append(S, await producer(log, S, "p", 2), [op("b")])
        async with asyncio.timeout(DEADLINE_S):
            step = await anext(following)
        assert step.snapshot is None
        (entry,) = step.entries
        assert entry.cursor.generation > first.cursor.generation
        assert entry.cursor.offset == 2


async def test_a_follower_is_told_what_was_lost(store: RedisStore, log: SessionLog) -> None:
    """Three entries; the next server has two of them, and takes others before anybody looks."""
    me = await producer(log, S, "p", 1)
    async with log.follow(S) as following:
        await log.append(S, me, [op("a"), op("b"), op("lost")])
        first, _ = await collect(following, 3)
        generation = first.cursor.generation
        await store._wire.call(("XDEL", SessionKeys.of(S).log, f"{generation}-3"))
        await another_life(store, tail=2)
        other = await producer(store, S, "other", 1)
        await store.append(S, other, [op("new").data, op("c").data])
        async with asyncio.timeout(DEADLINE_S):
            step = await anext(following)
        assert step.snapshot is not None
        assert step.lost_from == 3
        assert step.snapshot.cursor.generation > generation
        assert step.snapshot.cursor.offset == 4
        assert step.snapshot.values == {"last": b"c"}
        assert (await log.state(S)).values == {"last": b"c"}, "what was folded here, too"


async def test_a_cursor_is_judged_by_where_its_generation_ended(
    store: RedisStore, log: SessionLog
) -> None:
    await log.append(S, await producer(log, S, "p", 1), [op("a"), op("b")])
    old = (await log.read(S, Cursor(), 9)).tail
    await another_life(store)
    await log.append(S, await producer(log, S, "q", 1), [op("c"), op("d")])
    page = await log.read(S, Cursor(old.generation, 2), 9)
    assert (page.snapshot, [one.cursor.offset for one in page.entries]) == (None, [3, 4])
    page = await log.read(S, Cursor(old.generation, 3), 9)
    assert (page.snapshot is not None, page.lost_from) == (True, 3)
    page = await log.read(S, Cursor(old.generation + 7, 3), 9)
    assert (page.snapshot is not None, page.lost_from) == (True, 1)
    generation = page.tail.generation
    for offset in (5, 99_999):
        with pytest.raises(CursorAhead):
            await log.read(S, Cursor(generation, offset), 9)
    assert (await log.read(S, Cursor(), 9)).tail == Cursor(generation, 4), "a reader changed it"


@pytest.mark.parametrize("gone", ["log", "snapshot", "meta"])
async def test_an_evicted_key_is_a_loss_that_is_told_once(
    store: RedisStore, log: SessionLog, gone: str
) -> None:
    await log.append(S, await producer(log, S, "p", 1), [op("a"), op("b")])
    state, written = await log._reader.folded(S)
    await store.compact(S, state, 3, written)
    await log.append(S, await producer(log, S, "p", 3), [op("c")])
    before = (await log.read(S, Cursor(), 9)).tail
    await store._wire.call(("DEL", getattr(SessionKeys.of(S), gone)))
    async with SessionLog(store) as fresh, asyncio.timeout(DEADLINE_S):
        opened = await fresh.open_session(S, producer="again")
        assert opened.tail.offset == 3
        after = await fresh.append(S, Producer("again", opened.epoch), [op("d")])
        assert (after.status, after.first_offset) == (Status.OK, 4)
        found = await fresh.state(S)
        assert found.values == {"last": b"d"}
        assert found.cursor.generation > before.generation
        again = await fresh.state(S)
        assert again.cursor == found.cursor
        async with fresh.follow(S) as following:
            assert (await anext(following)).snapshot is not None


async def test_an_entry_that_comes_while_a_hole_is_mended_is_kept(
    store: RedisStore, log: SessionLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    await log.append(S, await producer(log, S, "p", 1), [op("a"), op("b")])
    await store._wire.call(("DEL", SessionKeys.of(S).log))
    late, mend = [op("c").data], store.mend

    async def mend_late(session: SessionName, state: SessionState) -> None:
        if late:
            await store.append(S, await producer(store, S, "q", 1), [late.pop()])
        await mend(session, state)

    monkeypatch.setattr(store, "mend", mend_late)
    for _ in range(2):
        async with SessionLog(store) as fresh, asyncio.timeout(DEADLINE_S):
            found = await fresh.state(S)
            assert found.values == {"last": b"c"}
            assert found.cursor.offset == 3


async def test_an_unknown_session_is_an_error(log: SessionLog) -> None:
    async with log.follow(NOWHERE) as following:
        with pytest.raises(UnknownSession):
            await anext(following)


async def test_read_pages_and_snapshots(store: RedisStore, log: SessionLog) -> None:
    await log.append(S, await producer(log, S, "p", 1), [op(str(i)) for i in range(10)])
    page = await log.read(S, Cursor(), 4)
    assert page.snapshot is None
    assert [entry.cursor.offset for entry in page.entries] == [1, 2, 3, 4]
    assert page.tail.offset == 10
    page = await log.read(S, page.tail, 4)
    assert (page.snapshot, page.entries) == (None, [])


async def test_compaction_is_not_noticed_by_readers(store: RedisStore) -> None:
    log = SessionLog(store, compact_after=50, compact_keep=10)
    for seq in range(1, 121):
        await log.append(S, await producer(log, S, "p", seq), [op(str(seq))])
    await asyncio.gather(*log._tasks)
    _, entries = unpack(await store.read(S, Cursor(1, 0), 1000))
    assert entries[0].cursor.offset > 50, "nothing was folded"
    page = await log.read(S, Cursor(), 1000)
    assert page.snapshot is not None
    assert page.snapshot.values == {"last": b"120"}
    async with SessionLog(store) as fresh, fresh.follow(S) as following:
        state = (await anext(following)).snapshot
        assert state is not None
        assert state.cursor.offset == 120
        assert state.values == {"last": b"120"}


async def test_every_session_is_folded_by_its_own_length(store: RedisStore) -> None:
    """More sessions than any process remembers, and each append in a process of its own."""
    names = [SessionName("default", f"s{number}") for number in range(limits.SESSION_CACHE + 20)]
    seen = []
    for part in range(3):
        async with SessionLog(store, compact_after=5, compact_keep=2) as log:
            for name in names[:: 1 if part == 0 else 50]:
                me = await producer(store, name, "p", 1 + 2 * part)
                await log.append(name, me, [op(f"a{part}"), op(f"b{part}")])
            await asyncio.gather(*log._tasks)
    for name in names[::50]:
        seen.append((await store.read(name, Cursor(), 100)).entries[0].cursor.offset)
    assert set(seen) == {5}, "some are not trimmed"


async def test_pages_are_bounded_by_bytes(store: RedisStore) -> None:
    """Large ops after small ones: no page is more than its bytes and one op."""
    me = await producer(store, S, "p", 1)
    small = ops.encode_op(ops.Set(id="s", name="s", value=b"x" * 100))
    large = ops.encode_op(ops.Set(id="l", name="l", value=b"x" * 100_000))
    await store.append(S, me, [small] * 200)
    await store.append(S, Producer("p", me.epoch, 201), [large] * 20)
    at, offsets, bound = Cursor(), [], 250_000
    while (page := await store.read(S, at, 1000, bound)).entries:
        assert sum(len(entry.op) for entry in page.entries) <= bound
        offsets += [entry.cursor.offset for entry in page.entries]
        at = page.entries[-1].cursor
    assert offsets == list(range(1, 221))
    assert len((await store.read(S, Cursor(1, 210), 9, 10)).entries) == 1, "one op always comes"


async def test_a_session_has_so_many_bytes_and_not_more(store: RedisStore) -> None:
    me = await producer(store, S, "p", 1)
    await store._wire.call(("HSET", SessionKeys.of(S).meta, "sb", limits.MAX_SESSION_BYTES - 50))
    full = await store.append(S, me, [op("too much to take").data])
    assert (full.status, full.appended) == (Status.NO_ROOM, 0)
    assert (await store.begin_turn(S, "t", [b"x" * 99], 1.0)).status is Status.NO_ROOM
    assert (await store.read(S, Cursor(), 9)).tail.offset == 0, "something was written"
    await store._wire.call(("HSET", SessionKeys.of(S).meta, "sb", 0))
    assert (await store.append(S, me, [op("a").data])).status is Status.OK


async def test_states_are_the_callers_own(store: RedisStore, log: SessionLog) -> None:
    t1 = await _begin(log, "t1", 30.0)
    state = await log.state(S)
    frame = ops.Frame(id="f", turn="t1", epoch=1, index=0, tokens=(5,), pieces=("five",))
    await log.append_turn(S, t1, 1, [frame])
    assert state.turns[0].text == ""
    assert (await log.state(S)).turns[0].text == "five"


async def test_a_turn_whose_owner_is_gone_is_ended_by_the_next(log: SessionLog) -> None:
    t1 = await _begin(log, "t1", 0.0)
    await _begin(log, "t2", 30.0)
    state: SessionState = await log.state(S)
    first, second = state.turns
    assert (first.reason, first.error_code) == ("error", "turn_failed")
    assert not second.ended
    stale = await log.append_turn(S, t1, 1, [op("zombie").op])
    assert stale.status is Status.STALE


def test_bytes_that_are_no_op_never_become_one() -> None:
    with pytest.raises(InvalidArgument):
        LogOp.read(b"\xc1")


async def _begin(log: SessionLog, turn: str, lease_s: float) -> TurnHold:
    opening: list[ops.Op] = [
        ops.UserMessage(id=f"u{turn}", turn=turn, text="ask"),
        ops.TurnStarted(id=f"s{turn}", turn=turn, epoch=1),
    ]
    claim = await log.begin_turn(S, turn, opening, lease_s)
    assert claim.status is Status.OK
    return claim.hold(turn)
