"""Following a session in one process: a snapshot, then everything, also from other instances."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from segue_cloud.hub.hub import Following
from segue_cloud.hub.state import HubState
from segue_cloud.log.session_log import SessionLog
from segue_cloud.sessions.port import LogOp, Producer, Status, TurnHold
from segue_cloud.sessions.store import RedisStore
from segue_contract.errors import InvalidArgument, UnknownSession
from segue_contract.ids import SessionName
from segue_contract.servers import Valkey
from segue_contract.sync import ops
from segue_contract.sync.replica import Applied, Replica
from segue_contract.sync.state import Cursor, SessionState, encode_state

S, NOWHERE = SessionName("default", "trip"), SessionName("default", "nowhere")
DEADLINE_S = 20


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


async def test_snapshot_then_live_without_a_race(store: RedisStore, log: SessionLog) -> None:
    """Followers join while three producers write: nobody misses or repeats anything."""

    async def produce(name: str) -> None:
        for seq in range(1, 41):
            await log.append(S, Producer(name, 0, seq), [op(f"{name}{seq}")])

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
        await store.append(S, Producer("elsewhere", 0, 1), [op("a").data, op("b").data])
        _, offsets = await collect(following, 2)
        assert offsets == [1, 2]


async def test_a_follower_that_overflows_catches_up(store: RedisStore) -> None:
    async with SessionLog(store, hub_state=HubState(queue_entries=3)) as log:
        async with log.follow(S) as following:
            assert (await anext(following)).snapshot is not None
            for seq in range(1, 31):  # it does not look meanwhile
                await log.append(S, Producer("p", 0, seq), [op(str(seq))])
            _, offsets = await collect(following, 30)
            assert offsets == list(range(1, 31))
        log.check_integrity()


async def test_a_follower_beyond_a_loss_gets_a_new_generation(store: RedisStore) -> None:
    """The store forgot entries that it had acknowledged, as after a fail-over."""
    known = HubState()
    async with SessionLog(store, hub_state=known) as log, log.follow(S) as following:
        await log.append(S, Producer("p", 0, 1), [op("a"), op("b")])
        first, _ = await collect(following, 2)
        generation = first.cursor.generation
        known.announce(S, Cursor(generation, 9))
        await store.append(S, Producer("p", 0, 3), [op("c").data])
        async with asyncio.timeout(DEADLINE_S):
            async for step in following:
                if step.snapshot is not None:
                    break
        assert step.snapshot is not None
        assert step.snapshot.cursor.generation == generation + 1
        assert step.snapshot.values == {"last": b"c"}


async def test_an_unknown_session_is_an_error(log: SessionLog) -> None:
    async with log.follow(NOWHERE) as following:
        with pytest.raises(UnknownSession):
            await anext(following)


async def test_read_pages_and_snapshots(store: RedisStore, log: SessionLog) -> None:
    await log.append(S, Producer("p", 0, 1), [op(str(i)) for i in range(10)])
    page = await log.read(S, Cursor(), 4)
    assert page.snapshot is None
    assert [entry.cursor.offset for entry in page.entries] == [1, 2, 3, 4]
    assert page.tail.offset == 10
    page = await log.read(S, page.tail, 4)
    assert (page.snapshot, page.entries) == (None, [])
    other_life = Cursor(page.tail.generation + 5, 3)
    page = await log.read(S, other_life, 4)
    assert page.snapshot is not None
    assert page.snapshot.cursor == page.tail
    ahead = Cursor(page.tail.generation, 99)
    page = await log.read(S, ahead, 4)
    assert page.snapshot is not None
    assert page.tail == Cursor(ahead.generation + 1, 10)


async def test_compaction_is_not_noticed_by_readers(store: RedisStore) -> None:
    log = SessionLog(store, compact_after=50, compact_keep=10)
    for seq in range(1, 121):
        await log.append(S, Producer("p", 0, seq), [op(str(seq))])
    await asyncio.gather(*log._tasks)
    _, entries = await store.read(S, 0, 1000)
    assert entries[0].cursor.offset > 50, "nothing was folded"
    page = await log.read(S, Cursor(), 1000)
    assert page.snapshot is not None
    assert page.snapshot.values == {"last": b"120"}
    async with SessionLog(store) as fresh, fresh.follow(S) as following:
        state = (await anext(following)).snapshot
        assert state is not None
        assert state.cursor.offset == 120
        assert state.values == {"last": b"120"}


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
