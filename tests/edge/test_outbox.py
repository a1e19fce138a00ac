"""The queues of offline turns: order, refusals, places, cancellations, restarts."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from segue_contract.errors import (
    Internal,
    InvalidArgument,
    ModelMismatch,
    Overloaded,
    QuotaExceeded,
    Revoked,
    StaleEpoch,
    Unauthenticated,
    UnknownNode,
)
from segue_contract.ids import TurnName
from segue_contract.limits import OUTBOX_REFUSED_KEPT, OUTBOX_TURNS
from segue_contract.turn.events import Reason
from segue_edge.turns.offline.journal import Journal, StoredTurn
from segue_edge.turns.offline.outbox import Outbox
from segue_edge.turns.offline.turn import OfflineTurn
from tests.support.offline_turns import BUSY, SHOWN, TRIP, keep, offline, said


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
    rate = QuotaExceeded("Too many tokens.", retry_after_s=30.0)  # it passes by itself
    passing = (Internal("A fault."), StaleEpoch("Not here."), ModelMismatch("Other."), rate)
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


@pytest.mark.parametrize("error", [Unauthenticated("An old token."), Revoked("Not any more.")])
async def test_a_turn_whose_token_counts_no_more_holds_up_nobody(error: Unauthenticated) -> None:
    """Its key was revoked, or it waited too long: its device is told, and later turns go on."""
    delivered: list[str] = []

    async def deliver(turn: OfflineTurn) -> None:
        if turn.asked.turn == "t1":
            raise error
        delivered.append(turn.asked.turn)

    outbox = Outbox(deliver)
    await keep(outbox, said("t1"), said("t2"))
    await outbox.settle(TRIP)
    assert (delivered, len(outbox)) == (["t2"], 0)
    found = outbox.find(TurnName(TRIP, "t1"))
    assert found is not None
    assert found.refused is error


async def test_an_edge_without_its_certificate_keeps_what_it_has_to_deliver() -> None:
    async def deliver(_: OfflineTurn) -> None:
        raise UnknownNode("The edge shows no certificate.")

    outbox = Outbox(deliver)
    await keep(outbox, said("t1"))
    with pytest.raises(Overloaded):
        await outbox.settle(TRIP)
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


async def test_a_device_that_was_told_of_refused_turns_dismisses_its_own(tmp_path: Path) -> None:
    path = tmp_path / "outbox"

    async def refuse(_: OfflineTurn) -> None:
        raise QuotaExceeded("The session is full.")

    outbox = Outbox(refuse, Journal(path))
    await keep(outbox, said("t1"), said("t2"), said("t3", "other"))
    await outbox.flush()
    assert await outbox.dismiss(TRIP, "laptop", {"t1", "t2"}) == 0
    assert await outbox.dismiss(TRIP, "phone", {"t1", "t3"}) == 1
    assert await outbox.dismiss(TRIP, "phone", {"t1"}) == 0
    await outbox.close()
    again = Outbox(refuse, Journal(path))
    for box in (outbox, again):
        assert {turn.asked.turn for turn in box.refused} == {"t2", "t3"}
    await again.close()


async def test_a_refusal_that_is_dismissed_at_once_does_not_come_back(tmp_path: Path) -> None:
    """The device is told before the file says so."""
    path = tmp_path / "outbox"
    told = asyncio.Event()

    async def refuse(turn: OfflineTurn) -> None:
        if turn.asked.turn != "t1":
            raise Overloaded("Full.")
        raise QuotaExceeded("The session is full.")

    class Slow(Journal):
        def replace(self, number: int, turn: StoredTurn) -> None:
            loop.call_soon_threadsafe(writing.set)
            go_on.wait(10)
            super().replace(number, turn)

    loop, writing, go_on = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
    outbox = Outbox(refuse, Slow(path), refused=lambda _: told.set())
    await keep(outbox, said("t1"), replace(said("t2"), follows="t1"))
    flushing = asyncio.create_task(outbox.flush())
    await asyncio.wait_for(told.wait(), 10)
    await asyncio.wait_for(writing.wait(), 10)  # what follows it
    dismissing = asyncio.create_task(outbox.dismiss(TRIP, "phone", {"t1"}))
    await asyncio.sleep(0)
    go_on.set()
    assert await dismissing == 1
    await flushing
    await outbox.close()
    again = Outbox(refuse, Journal(path))
    assert (len(again.refused), len(again)) == (0, 1)
    await again.close()


async def test_refused_turns_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(_: OfflineTurn) -> None:
        raise QuotaExceeded("The session is full.")

    outbox = Outbox(refuse)
    size = said("t1").size
    assert size > len("Hello") + len(SHOWN)
    monkeypatch.setattr("segue_edge.turns.offline.outbox.OUTBOX_REFUSED_BYTES", 2 * size + 1)
    await keep(outbox, *(said(f"t{number}") for number in range(1, 6)))
    await outbox.flush()
    assert [turn.asked.turn for turn in outbox.refused] == ["t4", "t5"]


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


async def test_who_closes_may_be_cancelled_while_a_delivery_ends(tmp_path: Path) -> None:
    path = tmp_path / "outbox"
    delivering, ending, go_on = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def deliver(_: OfflineTurn) -> None:
        delivering.set()
        try:
            await asyncio.Event().wait()
        finally:
            ending.set()
            await go_on.wait()

    async def at_once() -> None:
        pass

    outbox = Outbox(deliver, Journal(path))
    await keep(outbox, offline())
    outbox.start(at_once)
    await asyncio.wait_for(delivering.wait(), 10)
    closing = asyncio.create_task(outbox.close())
    await asyncio.wait_for(ending.wait(), 10)
    closing.cancel()
    await asyncio.wait({closing}, timeout=10)
    assert closing.cancelled()
    again = Journal(path)  # the file was closed, too
    assert len(again.turns) == 1
    again.close()
