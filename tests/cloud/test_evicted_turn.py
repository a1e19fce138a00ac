"""A store that evicts takes a turn's entries away and keeps what it knows of the turn's id."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import msgspec
import pytest

from segue_cloud.log.session_log import SessionLog
from segue_cloud.sessions.keys import SessionKeys
from segue_cloud.sessions.port import Status
from segue_cloud.sessions.store import RedisStore
from segue_contract.errors import UnknownTurn
from segue_contract.ids import SessionName
from segue_contract.servers import Valkey
from segue_contract.sync.ops import (
    Frame,
    Op,
    Sampling,
    TurnEnded,
    TurnStarted,
    Usage,
    UserMessage,
    encode_op,
    request_digest,
)
from segue_contract.transport.status import error_from_rpc
from segue_contract.v1 import agent_pb2 as pb
from tests.support.cloud_rpc import cloud_rpc
from tests.support.scripted_engine import ScriptedEngine

S = SessionName("default", "trip")
WAIT_S = 20.0


def opening(turn: str) -> list[Op]:
    return [
        UserMessage(id=f"{turn}.user", turn=turn, text="Hello"),
        TurnStarted(id=f"{turn}.started", turn=turn, epoch=1, max_tokens=9),
    ]


def frame(index: int) -> Frame:
    return Frame(id=f"t1.{index}", turn="t1", epoch=1, index=index, tokens=(7,), pieces=("a",))


END = TurnEnded(id="t1.ended", turn="t1", epoch=1, reason="stop", usage=Usage(completion_tokens=2))


@pytest.fixture
async def store(valkey: Valkey) -> AsyncIterator[RedisStore]:
    store = await RedisStore.connect(valkey.url)
    await store.open_session(S, device="phone")
    yield store
    await store.close()


async def evict(store: RedisStore, key: str) -> None:
    await store._wire.call(("DEL", getattr(SessionKeys.of(S), key)))


@pytest.mark.parametrize("ended", [False, True])
async def test_a_turn_whose_beginning_is_gone_begins_again(store: RedisStore, ended: bool) -> None:
    """Else its id would be known, and whoever asks for it be told nothing, for ever."""
    log = SessionLog(store)
    claim = await log.begin_turn(S, "t1", opening("t1"), 60.0, digest="d")
    await log.append_turn(S, claim.hold("t1"), 1, [frame(0), frame(1)])
    await evict(store, "log")
    if ended:
        await log.append_turn(S, claim.hold("t1"), 3, [END], ends=True)
    fresh = SessionLog(store)
    assert not (await fresh.state(S)).turns, "nothing says what was asked"
    again = await fresh.begin_turn(S, "t1", opening("t1"), 60.0, digest="d")
    assert (again.status, again.known) == (Status.OK, False)
    assert again.epoch == 2, "what its first owner may still send is refused"
    late = await fresh.append_turn(S, claim.hold("t1"), 3, [frame(2)])
    assert late.status is Status.STALE
    rest = [msgspec.structs.replace(op, epoch=2) for op in (frame(0), frame(1), END)]
    await fresh.append_turn(S, again.hold("t1"), 1, rest, ends=True)
    (turn,) = (await fresh.state(S)).turns
    assert (turn.prompt, turn.tokens, turn.reason) == ("Hello", [7, 7], "stop")


async def test_a_turn_whose_end_is_gone_goes_on(store: RedisStore) -> None:
    log = SessionLog(store)
    claim = await log.begin_turn(S, "t1", opening("t1"), 60.0)
    await log.append_turn(S, claim.hold("t1"), 1, [frame(0)])
    state, written = await log._reader.folded(S)
    await store.compact(S, state, state.cursor.offset + 1, written)
    await log.append_turn(S, claim.hold("t1"), 2, [frame(1), END], ends=True)
    await evict(store, "log")
    fresh = SessionLog(store)
    (turn,) = (await fresh.state(S)).turns
    assert (turn.tokens, turn.reason) == ([7], "")
    taken = await fresh.take_over(S, "t1", 60.0, quiet_s=60.0)  # as for an orphan
    assert taken.status is Status.OK
    result = await fresh.append_turn(S, taken.hold("t1"), 1, [frame(1), END], ends=True)
    assert result.status is Status.OK


async def test_an_end_that_came_without_its_tokens_is_none(store: RedisStore) -> None:
    log = SessionLog(store)
    claim = await log.begin_turn(S, "t1", opening("t1"), 60.0)
    state, written = await log._reader.folded(S)
    await store.compact(S, state, state.cursor.offset + 1, written)
    await log.append_turn(S, claim.hold("t1"), 1, [frame(0), frame(1)])
    await evict(store, "log")
    await log.append_turn(S, claim.hold("t1"), 3, [END], ends=True)
    (turn,) = (await SessionLog(store).state(S)).turns
    assert (turn.tokens, turn.reason) == ([], "")


async def test_a_turn_that_an_instance_remembers_is_not_forgotten(store: RedisStore) -> None:
    """It mends the log with what it has folded of it, which the store has no more."""
    log = SessionLog(store)
    claim = await log.begin_turn(S, "t1", opening("t1"), 60.0)
    await log.append_turn(S, claim.hold("t1"), 1, [frame(0)])
    assert (await log.state(S)).turns
    await store.append_turn(S, claim.hold("t1"), 2, [encode_op(frame(1))])
    await evict(store, "log")
    await store.append_turn(S, claim.hold("t1"), 3, [encode_op(END)], ends=True)
    (turn,) = (await log.state(S)).turns
    assert (turn.prompt, turn.tokens, turn.reason) == ("Hello", [7], "")
    assert (await log.begin_turn(S, "t1", opening("t1"), 60.0)).known
    assert (await log.take_over(S, "t1", 60.0, quiet_s=60.0)).status is Status.OK


async def test_what_is_known_of_turns_is_made_again_of_the_log(store: RedisStore) -> None:
    """Else a turn that is asked for again is in the log twice, and a running one never ends."""
    log = SessionLog(store)
    claim = await log.begin_turn(S, "t1", opening("t1"), 60.0)
    await log.append_turn(S, claim.hold("t1"), 1, [frame(0), frame(1), END], ends=True)
    running = await log.begin_turn(S, "t2", opening("t2"), 60.0)
    await evict(store, "meta")
    await store.open_session(S, device="laptop")
    early = await store.begin_turn(S, "t1", [], 60.0)
    assert early.status is Status.BUSY, "nobody has looked what the log has"
    fresh = SessionLog(store)
    assert [turn.turn for turn in (await fresh.state(S)).turns] == ["t1", "t2"]
    again = await fresh.begin_turn(S, "t1", opening("t1"), 60.0)
    assert (again.status, again.known, again.ended) == (Status.OK, True, True)
    digest = request_digest("Hello", 9, Sampling(), ())
    other = await fresh.begin_turn(S, "t2", opening("t2"), 60.0, digest=digest[::-1])
    assert other.status is Status.CONFLICT
    late = await fresh.append_turn(S, running.hold("t2"), 1, [frame(0)])
    assert late.status is Status.STALE
    taken = await fresh.take_over(S, "t2", 60.0, quiet_s=60.0)  # as for an orphan
    assert (taken.status, taken.epoch) == (Status.OK, 2)
    (listed,), _ = await store.keeper.list_sessions("default", 9)
    assert listed.title == "Hello"


async def test_a_turn_that_holds_its_session_is_not_abandoned(store: RedisStore) -> None:
    """However the log looks that an instance has read."""
    log = SessionLog(store)
    claim = await log.begin_turn(S, "t1", opening("t1"), 60.0)
    await log.end_abandoned(S, "t1")
    result = await log.append_turn(S, claim.hold("t1"), 1, [frame(0)])
    assert result.status is Status.OK
    (turn,) = (await log.state(S)).turns
    assert not turn.ended


async def test_a_turn_of_which_nothing_is_left_is_told_so(valkey: Valkey, model_dir: Path) -> None:
    """Where the store forgot when it began, too, so that it cannot know that it is gone."""
    request = pb.RunTurnRequest(
        session="trip", device="phone", turn="t1", prompt="Hello", max_tokens=3
    )
    async with cloud_rpc(valkey.url, model_dir, ScriptedEngine(range(100, 110))) as cloud:
        await cloud.agent.OpenSession(pb.OpenSessionRequest(session="trip", device="phone"))
        async with asyncio.timeout(WAIT_S):
            assert [event async for event in cloud.agent.RunTurn(request)]
        store = await RedisStore.connect(valkey.url)
        for key in ("log", "turns"):
            await evict(store, key)
        await store.close()
    async with cloud_rpc(valkey.url, model_dir, ScriptedEngine(range(100, 110))) as cloud:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            async with asyncio.timeout(WAIT_S):
                assert not [event async for event in cloud.agent.RunTurn(request)]
    assert isinstance(error_from_rpc(raised.value), UnknownTurn)
