"""Offline turns on their way into the log of a real cloud (scripted engine, real store)."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segue_contract.errors import (
    Internal,
    InvalidArgument,
    ModelMismatch,
    Overloaded,
    QuotaExceeded,
    StaleEpoch,
)
from segue_contract.ids import SessionName, TurnName
from segue_contract.limits import OUTBOX_REFUSED_KEPT, OUTBOX_TURNS
from segue_contract.plan import PlanReport, encode_plan
from segue_contract.servers import Valkey
from segue_contract.sync.branches import Branch, branches
from segue_contract.turn.events import Reason
from segue_contract.v1 import agent_pb2 as pb
from segue_contract.v1 import decode_pb2 as dpb
from segue_edge.turns.asked import Asked
from segue_edge.turns.history import HistoryCache
from segue_edge.turns.offline.deliver import Delivery
from segue_edge.turns.offline.journal import Journal, StoredTurn
from segue_edge.turns.offline.outbox import Outbox
from segue_edge.turns.offline.turn import OfflineTurn
from segue_edge.uplink.clouds import CloudSet
from segue_edge.uplink.pacer import Pacer
from tests.support.cloud_rpc import CloudRpc, cloud_rpc
from tests.support.scripted_cloud import ScriptedCloud, scripted_cloud
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tiny_edge import MANIFEST, RECIPE

REQUEST = pb.RunTurnRequest(
    session="trip", device="phone", turn="t1", prompt="Hello", max_tokens=50
)
TRIP, BUSY = SessionName("default", "trip"), SessionName("default", "busy")
SHOWN = (200, 201, 202)
MADE = tuple(range(100, 110))  # what the cloud's engine makes


def offline(
    tokens: tuple[int, ...] = SHOWN, *, begun: bool = False, request: pb.RunTurnRequest = REQUEST
) -> OfflineTurn:
    plan = encode_plan(PlanReport(shape="edge"))
    pieces = tuple("x" for _ in tokens)
    asked = Asked.of(request, TRIP.tenant)
    return OfflineTurn(asked, (10, 11, 12), tokens, pieces, Reason.STOP, plan, begun)


@pytest.fixture
async def cloud(valkey: Valkey, model_dir: Path) -> AsyncIterator[CloudRpc]:
    async with cloud_rpc(valkey.url, model_dir, ScriptedEngine(MADE)) as running:
        await running.agent.OpenSession(pb.OpenSessionRequest(session="trip", device="phone"))
        yield running


@dataclass
class Delivering:
    """A delivery, and what it told of each turn."""

    delivery: Delivery
    histories: HistoryCache
    told: list[tuple[str, bool]] = field(default_factory=list)

    async def __call__(self, turn: OfflineTurn) -> None:
        await self.delivery.deliver(turn)


@pytest.fixture
async def deliver(cloud: CloudRpc) -> AsyncIterator[Delivering]:
    clouds, histories = CloudSet([cloud.address], Pacer()), HistoryCache()
    recipe = cloud.manifest.edge_recipe.digest

    def told(turn: OfflineTurn, same: bool) -> None:
        delivering.told.append((turn.asked.turn, same))

    delivering = Delivering(Delivery(clouds, histories, recipe, told), histories)
    yield delivering
    await clouds.close()


async def in_log(cloud: CloudRpc, session: str = "trip") -> tuple[tuple[int, ...], str]:
    state = await cloud.log.state(SessionName("default", session))
    (turn,) = state.turns
    return tuple(turn.tokens), turn.reason


async def begin(cloud: CloudRpc) -> None:
    await cloud.decode.Begin(dpb.BeginRequest(turn=REQUEST))


@pytest.mark.parametrize("begun", [False, True])
async def test_a_turn_that_the_log_does_not_know_is_appended(
    cloud: CloudRpc, deliver: Delivering, begun: bool
) -> None:
    await deliver(offline(begun=begun))
    assert await in_log(cloud) == (SHOWN, "stop")


@pytest.mark.parametrize("begun", [False, True])
async def test_a_turn_that_began_in_the_log_ends_there_as_it_was_shown(
    cloud: CloudRpc, deliver: Delivering, begun: bool
) -> None:
    await begin(cloud)
    await deliver(offline(begun=begun))
    assert await in_log(cloud) == (SHOWN, "stop")
    assert not cloud.engine.turns


async def test_the_log_keeps_the_end_that_it_has(cloud: CloudRpc, deliver: Delivering) -> None:
    async for _ in cloud.agent.RunTurn(REQUEST):
        pass
    await deliver(offline(begun=True))
    assert (await in_log(cloud))[0] == MADE


async def test_a_cloud_that_finishes_the_turn_is_left_to_it(
    cloud: CloudRpc, deliver: Delivering
) -> None:
    cloud.engine._free = False
    running = cloud.agent.RunTurn(REQUEST)
    await running.read()
    delivering = asyncio.create_task(deliver(offline(begun=True)))
    cloud.engine.allow(len(MADE))
    await asyncio.wait_for(delivering, 10)
    assert (await in_log(cloud))[0] == MADE
    running.cancel()


async def test_a_device_and_a_session_that_the_log_does_not_know_are_opened_there(
    cloud: CloudRpc, deliver: Delivering
) -> None:
    other = pb.RunTurnRequest(
        session="trip", device="laptop", turn="t2", prompt="Me too", max_tokens=50
    )
    lost = pb.RunTurnRequest(
        session="lost", device="laptop", turn="t3", prompt="And here", max_tokens=50
    )
    await deliver(offline(request=other))
    await deliver(offline(request=lost, begun=True))
    assert await in_log(cloud) == (SHOWN, "stop")
    assert await in_log(cloud, "lost") == (SHOWN, "stop")
    assert deliver.told == [("t2", True), ("t3", True)]


async def test_what_was_said_offline_beside_others_is_a_branch_and_the_model_sees_both(
    cloud: CloudRpc, deliver: Delivering
) -> None:
    async def ask(turn: str) -> None:
        asked = pb.RunTurnRequest()
        asked.CopyFrom(REQUEST)
        asked.turn, asked.prompt = turn, f"I am {turn}"
        async for _ in cloud.agent.RunTurn(asked):
            pass

    await ask("t0")
    await deliver(replace(said("t1"), follows="t0"))
    await ask("elsewhere")
    await deliver(replace(said("t2"), follows="t1"))
    await deliver(replace(said("t3"), follows="t2"))
    await ask("t4")
    state = await cloud.log.state(TRIP)
    assert [turn.turn for turn in state.turns] == ["t0", "t1", "elsewhere", "t2", "t3", "t4"]
    assert [turn.offline for turn in state.turns] == [False, True, False, True, True, False]
    assert branches(state.turns) == [Branch("t1", ("elsewhere",), ("t2", "t3"))]
    prompt = cloud.tokenizer.decode(cloud.engine.turns[-1].prompt)
    assert prompt.count("Hello") == 3
    assert "I am elsewhere" in prompt


async def test_a_turn_that_differs_in_the_log_is_told(cloud: CloudRpc, deliver: Delivering) -> None:
    async for _ in cloud.agent.RunTurn(REQUEST):
        pass
    await deliver(offline(begun=True))
    assert deliver.told == [("t1", False)]


# -- the outbox ---------------------------------------------------------------------------------


def said(turn: str, session: str = "trip") -> OfflineTurn:
    request = pb.RunTurnRequest(
        session=session, device="phone", turn=turn, prompt="Hello", max_tokens=50
    )
    return offline(request=request)


async def keep(outbox: Outbox, *turns: OfflineTurn) -> None:
    for turn in turns:
        await outbox.reserve().keep(turn)


async def test_a_fault_in_a_delivery_keeps_the_turn() -> None:
    faults = iter([ValueError("a fault of ours"), Overloaded("Full."), None])

    async def fail(_: OfflineTurn) -> None:
        error = next(faults)
        if error is not None:
            raise error

    outbox = Outbox(fail)
    await keep(outbox, offline())
    assert not await outbox.flush()
    assert not await outbox.flush()
    assert len(outbox) == 1
    assert await outbox.flush()
    assert len(outbox) == 0


async def test_only_what_is_said_of_the_turn_itself_refuses_it_for_good() -> None:
    passing = (Internal("A fault."), StaleEpoch("Not here."), ModelMismatch("Other weights."))
    errors = iter([*passing, QuotaExceeded("The session is full."), None])
    refused: list[str] = []

    async def fail(_: OfflineTurn) -> None:
        error = next(errors)
        if error is not None:
            raise error

    outbox = Outbox(fail, refused=lambda turn: refused.append(turn.asked.turn))
    await keep(outbox, said("t1"), replace(said("t2"), follows="t1"))
    for _ in passing:
        with pytest.raises(Overloaded):
            await outbox.settle(TRIP)
    waiting = asyncio.create_task(outbox.settled(TurnName(TRIP, "t1")))
    await asyncio.sleep(0)
    assert not waiting.done()
    await outbox.settle(TRIP)
    await asyncio.wait_for(waiting, 10)
    assert (refused, len(outbox)) == (["t1"], 0)
    found = outbox.find(TurnName(TRIP, "t1"))
    assert found is not None
    assert isinstance(found.refused, QuotaExceeded)
    assert outbox.find(TurnName(TRIP, "t2")) is None


async def test_a_cloud_that_cannot_be_understood_refuses_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begin = ScriptedCloud.Begin

    async def garbled(self: ScriptedCloud, request: dpb.BeginRequest, context: Any) -> Any:
        reply = await begin(self, request, context)
        reply.turns = b"\xc1"  # no MessagePack
        return reply

    monkeypatch.setattr(ScriptedCloud, "Begin", garbled)
    async with scripted_cloud() as cloud:
        clouds = CloudSet([cloud.address], Pacer())
        for one in clouds.clouds.values():
            one.expected_weights = MANIFEST.weights_digest
        delivery = Delivery(clouds, HistoryCache(), RECIPE.digest, lambda *_: None)
        outbox = Outbox(delivery.deliver)
        await keep(outbox, said("t1"))
        with pytest.raises(Overloaded):
            await outbox.settle(TRIP)
        await clouds.close()
    assert cloud.seen.begins
    assert (len(outbox), len(outbox.refused)) == (1, 0)


async def test_refused_turns_outlive_a_restart_and_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "outbox"

    async def refuse(_: OfflineTurn) -> None:
        raise QuotaExceeded("The session is full.", hint="Begin another.")

    outbox = Outbox(refuse, Journal(path))
    names = [f"t{number}" for number in range(OUTBOX_REFUSED_KEPT + 3)]
    await keep(outbox, *(said(name) for name in names))
    assert await outbox.flush()
    await outbox.close()
    again = Outbox(refuse, Journal(path))
    assert len(again) == 0
    assert [turn.asked.turn for turn in again.refused] == names[3:]
    (first, *_) = again.refused
    assert first.refused is not None
    assert (first.refused.code, str(first.refused)) == (
        "quota_exceeded",
        "The session is full. Begin another.",
    )
    assert first.tokens == SHOWN
    await again.close()


async def test_who_settles_a_session_may_be_cancelled_at_any_time(tmp_path: Path) -> None:
    class Slow(Journal):
        def remove(self, number: int) -> None:
            loop.call_soon_threadsafe(removing.set)
            go_on.wait(10)
            super().remove(number)

    loop, removing, go_on = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
    delivered: list[str] = []

    async def deliver(turn: OfflineTurn) -> None:
        delivered.append(turn.asked.turn)

    outbox = Outbox(deliver, Slow(tmp_path / "outbox"))
    await keep(outbox, said("t1"))
    settling = asyncio.create_task(outbox.settle(TRIP))
    await asyncio.wait_for(removing.wait(), 10)
    await asyncio.wait_for(outbox.settled(TurnName(TRIP, "t1")), 10)
    settling.cancel()
    go_on.set()
    await asyncio.gather(settling, return_exceptions=True)
    assert not outbox.holds(TRIP)
    await keep(outbox, said("t2"))
    await outbox.settle(TRIP)
    assert delivered == ["t1", "t2"]
    assert (outbox.holds(TRIP), len(outbox)) == (False, 0)
    await outbox.close()


async def test_what_follows_a_refused_turn_follows_the_one_before_it(tmp_path: Path) -> None:
    path = tmp_path / "outbox"

    async def refuse(turn: OfflineTurn) -> None:
        if turn.asked.turn != "t1":
            raise Overloaded("Full.")
        raise QuotaExceeded("The session is full.")

    outbox = Outbox(refuse, Journal(path))
    await keep(outbox, replace(said("t1"), follows="t0"), replace(said("t2"), follows="t1"))
    assert not await outbox.flush()
    await keep(outbox, replace(said("t3"), follows="t1"))  # it had begun before the refusal
    await outbox.close()
    again = Outbox(refuse, Journal(path))
    for box in (outbox, again):
        kept = box.find(TurnName(TRIP, "t2"))
        assert kept is not None
        assert (kept.follows, kept.refused) == ("t0", None)
        late = box.find(TurnName(TRIP, "t3"))
        assert late is not None
        assert late.follows == "t0"
    await again.close()


async def test_what_could_not_be_delivered_is_tried_again() -> None:
    done, tries = asyncio.Event(), []

    async def second_time(turn: OfflineTurn) -> None:
        tries.append(turn)
        if len(tries) == 1:
            raise ValueError("a fault of ours")
        done.set()

    async def never() -> None:
        await asyncio.Event().wait()

    outbox = Outbox(second_time, retry_s=0.01)
    await keep(outbox, offline())
    outbox.start(never)
    await asyncio.wait_for(done.wait(), 10)
    await outbox.close()
    assert len(tries) == 2


async def test_sessions_do_not_wait_for_each_other_and_each_keeps_its_order() -> None:
    delivered: list[str] = []
    stuck = asyncio.Event()

    async def deliver(turn: OfflineTurn) -> None:
        if turn.asked.session == BUSY:
            await stuck.wait()
        delivered.append(turn.asked.turn)

    outbox = Outbox(deliver)
    await keep(outbox, said("b1", "busy"), said("t1"), said("t2"), said("t3"))
    flushing = asyncio.create_task(outbox.flush())
    await outbox.settle(TRIP)
    assert delivered == ["t1", "t2", "t3"]
    assert (outbox.holds(TRIP), outbox.holds(BUSY)) == (False, True)
    stuck.set()
    assert await flushing


async def test_a_place_is_reserved_before_it_is_needed() -> None:
    async def deliver(_: OfflineTurn) -> None:
        raise Overloaded("Full.")

    outbox = Outbox(deliver)
    rooms = [outbox.reserve() for _ in range(OUTBOX_TURNS)]
    with pytest.raises(Overloaded):
        outbox.reserve()
    rooms[0].free()
    rooms[0].free()
    kept = outbox.reserve()
    with pytest.raises(Overloaded):
        outbox.reserve()
    await kept.keep(offline())
    await rooms[1].keep(offline())
    assert len(outbox) == 2


async def test_a_restart_loses_none_and_keeps_the_order(tmp_path: Path) -> None:
    path = tmp_path / "state" / "edge.outbox"
    delivered: list[OfflineTurn] = []

    async def away(_: OfflineTurn) -> None:
        raise Overloaded("Full.")

    async def deliver(turn: OfflineTurn) -> None:
        delivered.append(turn)

    first = Outbox(away, Journal(path))
    await keep(first, said("t1"), said("t2"), said("t3"))
    with pytest.raises(InvalidArgument, match="Another edge"):
        Journal(path)
    await first.close()
    second = Outbox(deliver, Journal(path))
    assert len(second) == 3
    assert await second.flush()
    await second.close()
    assert [turn.asked.turn for turn in delivered] == ["t1", "t2", "t3"]
    assert (delivered[0].tokens, delivered[0].reason) == (SHOWN, Reason.STOP)
    third = Journal(path)
    assert third.turns == []
    third.close()


def stored(name: str) -> StoredTurn:
    return said(name).stored()


def journal(path: Path, *names: str) -> bytes:
    file = Journal(path)
    for name in names:
        file.add(stored(name))
    file.close()
    return path.read_bytes()


def names_in(path: Path) -> list[str]:
    file = Journal(path)
    names = [OfflineTurn.of(number, turn).asked.turn for number, turn in file.turns]
    file.close()
    return names


def test_any_torn_end_costs_at_most_the_turn_that_was_being_written(tmp_path: Path) -> None:
    path = tmp_path / "outbox"
    one = len(journal(path, "t1"))
    data = journal(path, "t2")
    for cut in range(12, len(data)):
        path.write_bytes(data[:cut])
        assert names_in(path) == (["t1"] if cut >= one else [])


def test_bytes_that_changed_are_noticed_and_kept_for_a_person(tmp_path: Path) -> None:
    path = tmp_path / "outbox"
    journal(path, "t1", "t2")
    data = bytearray(journal(path, "t3"))
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert names_in(path) == ["t1"]
    assert (tmp_path / "outbox.damaged").read_bytes() == data


@given(st.binary(max_size=200))
def test_any_file_is_read_or_set_aside(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "outbox"
        path.write_bytes(b"SEGUEOUT" + (1).to_bytes(4, "little") + data)
        assert names_in(path) == []
