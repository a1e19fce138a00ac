"""Turns that wait for their session."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from segue_contract.errors import (
    Overloaded,
    SessionBusy,
    TurnCancelled,
)
from segue_contract.limits import (
    MAX_TURNS_WAITING_PER_SESSION,
)
from segue_contract.servers import Valkey
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
