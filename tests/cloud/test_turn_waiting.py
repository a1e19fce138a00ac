"""Turns that wait for their session."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from segue_contract.errors import (
    Overloaded,
    SessionBusy,
    StaleEpoch,
    TurnCancelled,
)
from segue_contract.ids import SessionName
from segue_contract.limits import MAX_READ_ENTRIES, MAX_TURNS_WAITING_PER_SESSION
from segue_contract.servers import Valkey
from segue_contract.sync.ops import Op, TurnWaiting, TurnWithdrawn, decode_op
from segue_contract.sync.state import Cursor
from tests.support.scripted_engine import ScriptedEngine
from tests.support.turn_bench import OTHER, SESSION, WAIT_S, Bench, bench_on


async def test_one_turn_at_a_time(valkey: Valkey, model_dir: Path, words: list[int]) -> None:
    async with bench_on(valkey.url, model_dir, ScriptedEngine(words, free=False)) as bench:
        first = bench.manager.start(bench.spec(await bench.begin(), has_edge=False))
        with pytest.raises(SessionBusy):
            await bench.begin("t2", wait=False)
        waiting = asyncio.create_task(bench.begin("t3"))
        bench.engine.allow(len(words))
        await bench.ended(first)
        begun = await asyncio.wait_for(waiting, WAIT_S)
        assert not begun.known
        third = bench.manager.start(bench.spec(begun, "t3", has_edge=False))
        bench.engine.allow(len(words))
        assert (await bench.ended(third)).tokens == words


async def waiting(bench: Bench, turns: int) -> None:
    async with asyncio.timeout(WAIT_S):
        while bench.manager.waiting < turns:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_waiting_turn_holds_no_place_and_can_be_taken_back(
    valkey: Valkey, model_dir: Path, words: list[int]
) -> None:
    engine = ScriptedEngine(words, free=False)
    async with bench_on(valkey.url, model_dir, engine, max_turns=2) as bench:
        first = bench.manager.start(bench.spec(await bench.begin(), has_edge=False))
        second = asyncio.create_task(bench.manager.run(bench.request("t2")))
        await waiting(bench, 1)
        await bench.log.open_session(OTHER, device="phone")
        elsewhere = await bench.begin("t1", session=OTHER)  # the place that t2 does not hold
        assert not elsewhere.known

        assert await bench.log.request_stop(SESSION, "t2") == "t2"
        bench.manager.stop(SESSION, "t2")
        with pytest.raises(TurnCancelled):
            await asyncio.wait_for(second, WAIT_S)
        engine.allow(len(words))
        assert (await bench.ended(first)).reason == "stop"
        with pytest.raises(TurnCancelled):  # asked again by a caller that did not hear of it
            await bench.begin("t2")
        assert [turn.turn for turn in (await bench.log.state(SESSION)).turns] == ["t1"]


async def test_first_come_first_served_across_instances(
    valkey: Valkey, model_dir: Path, words: list[int]
) -> None:
    mine, other = ScriptedEngine(words, free=False), ScriptedEngine(words)
    async with (
        bench_on(valkey.url, model_dir, mine) as here,
        bench_on(valkey.url, model_dir, other) as there,
    ):
        first = here.manager.start(here.spec(await here.begin(), has_edge=False))
        second = asyncio.create_task(there.manager.run(there.request("t2")))
        await waiting(there, 1)
        third = asyncio.create_task(here.manager.run(here.request("t3")))
        await waiting(here, 1)
        mine.allow(100)
        await here.ended(first)  # those who wait here hear of it at once, and are not next
        with pytest.raises(SessionBusy):
            await here.begin("t4", wait=False)
        _, owner = await asyncio.wait_for(second, WAIT_S)
        assert owner is not None
        await there.ended(owner)
        _, owner = await asyncio.wait_for(third, WAIT_S)
        assert owner is not None
        await here.ended(owner)
        state = await here.log.state(SESSION)
        assert [turn.turn for turn in state.turns] == ["t1", "t2", "t3"]


async def test_too_many_that_wait_are_refused(
    valkey: Valkey, model_dir: Path, words: list[int]
) -> None:
    engine = ScriptedEngine(words, free=False)
    async with bench_on(valkey.url, model_dir, engine) as bench:
        bench.manager.start(bench.spec(await bench.begin(), has_edge=False))
        tasks = [
            asyncio.create_task(bench.begin(f"w{at}"))
            for at in range(MAX_TURNS_WAITING_PER_SESSION)
        ]
        await waiting(bench, len(tasks))
        async with asyncio.timeout(WAIT_S):
            while True:  # each has its place once the store knows of it
                try:
                    await asyncio.wait_for(bench.begin("more"), 0.5)
                except Overloaded:
                    break
                except TimeoutError:
                    await bench.log.request_stop(SESSION, "more")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def shown_waiting(bench: Bench, *turns: str) -> None:
    """Return once the log shows that just these wait."""
    async with asyncio.timeout(WAIT_S):
        while True:
            state = await bench.log.state(SESSION)
            if [one.turn for one in state.waiting] == list(turns):
                return
            await asyncio.sleep(0.01)


async def ops_of(bench: Bench) -> list[Op]:
    page = await bench.log.read(SESSION, Cursor(), MAX_READ_ENTRIES)
    return [decode_op(entry.op) for entry in page.entries]


async def test_what_waits_at_two_instances_is_shown_once(
    valkey: Valkey, model_dir: Path, words: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        bench_on(valkey.url, model_dir, ScriptedEngine(words, free=False)) as here,
        bench_on(valkey.url, model_dir, ScriptedEngine(words)) as there,
    ):
        noted, note = asyncio.Event(), there.log.note

        async def told(session: SessionName, op: TurnWaiting | TurnWithdrawn) -> None:
            await note(session, op)
            noted.set()

        monkeypatch.setattr(there.log, "note", told)
        here.manager.start(here.spec(await here.begin(), has_edge=False))
        first = asyncio.create_task(here.begin("t2"))
        await shown_waiting(here, "t2")
        second = asyncio.create_task(there.begin("t2"))
        await asyncio.wait_for(noted.wait(), WAIT_S)
        await here.log.request_stop(SESSION, "t2")
        for bench, begun in ((here, first), (there, second)):
            bench.manager.stop(SESSION, "t2")
            with pytest.raises(TurnCancelled):
                await asyncio.wait_for(begun, WAIT_S)
        ops = [one for one in await ops_of(here) if isinstance(one, TurnWaiting | TurnWithdrawn)]
        assert [type(one) for one in ops] == [TurnWaiting, TurnWithdrawn]


async def test_instances_that_say_the_same_at_once_say_it_once(
    valkey: Valkey, model_dir: Path, words: list[int]
) -> None:
    async with (
        bench_on(valkey.url, model_dir, ScriptedEngine(words)) as here,
        bench_on(valkey.url, model_dir, ScriptedEngine(words)) as there,
    ):
        said = TurnWaiting(id="t2.waiting", turn="t2")
        told = await asyncio.gather(
            *(bench.log.note(SESSION, said) for bench in (here, there) for _ in range(4)),
            return_exceptions=True,
        )
        assert all(one is None or isinstance(one, StaleEpoch) for one in told)
        assert None in told
        assert len(await ops_of(here)) == 1


async def test_a_turn_that_waits_a_second_time_is_shown_under_another_id(
    valkey: Valkey, model_dir: Path, words: list[int]
) -> None:
    async with bench_on(valkey.url, model_dir, ScriptedEngine(words)) as bench:
        for _ in range(2):
            await bench.log.note(SESSION, TurnWaiting(id="t2.waiting", turn="t2"))
            await bench.log.note(SESSION, TurnWithdrawn(id="t2.withdrawn", turn="t2"))
        ids = [one.id for one in await ops_of(bench)]
        assert len(set(ids)) == len(ids) == 4


async def test_other_devices_see_what_waits(
    valkey: Valkey, model_dir: Path, words: list[int]
) -> None:
    engine = ScriptedEngine(words, free=False)
    async with bench_on(valkey.url, model_dir, engine) as bench:
        first = bench.manager.start(bench.spec(await bench.begin(), has_edge=False))
        second = asyncio.create_task(
            bench.manager.run(bench.request("t2", device="laptop", prompt="Wait for me"))
        )
        await shown_waiting(bench, "t2")
        third = asyncio.create_task(bench.manager.run(bench.request("t3")))
        await shown_waiting(bench, "t2", "t3")
        fourth = asyncio.create_task(bench.manager.run(bench.request("t4")))
        await shown_waiting(bench, "t2", "t3", "t4")
        said = (await bench.log.state(SESSION)).waiting[0]
        assert (said.device, said.prompt) == ("laptop", "Wait for me")

        assert await bench.log.request_stop(SESSION, "t3") == "t3"
        bench.manager.stop(SESSION, "t3")
        with pytest.raises(TurnCancelled):
            await asyncio.wait_for(third, WAIT_S)
        await shown_waiting(bench, "t2", "t4")

        engine.allow(100)
        await bench.ended(first)
        for task in (second, fourth):
            _, owner = await asyncio.wait_for(task, WAIT_S)
            assert owner is not None
            await bench.ended(owner)
        state = await bench.log.state(SESSION)
        assert [turn.turn for turn in state.turns] == ["t1", "t2", "t4"]
        assert not state.waiting
