"""Turns that lose their owner: taken over, found as orphans, given back at a planned stop."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio as redis

from segue_cloud.sessions.port import Status, TurnClaim
from segue_cloud.sessions.store import RedisStore
from segue_cloud.turns.opening import opening_ops
from segue_cloud.turns.recovery import recovering
from segue_contract.errors import (
    EngineGone,
    Overloaded,
    StaleEpoch,
    Unreachable,
)
from segue_contract.ids import SessionName, TurnName
from segue_contract.limits import (
    LOST_OWNER_LOOKS,
    TURN_ENGINES,
    TurnLimits,
)
from segue_contract.plan import Shape
from segue_contract.servers import Valkey
from segue_contract.sync.ops import encode_op
from segue_contract.turn.events import Ended
from tests.support.scripted_engine import ScriptedEngine
from tests.support.turn_bench import SESSION, WAIT_S, bench_on, shown_tokens

SHORT = TurnLimits(lease_s=0.3, stall_offer_s=0.3)


async def test_two_take_overs_at_once_leave_one_owner(
    valkey: Valkey, model_dir: Path, words: list[int]
) -> None:
    async with (
        bench_on(valkey.url, model_dir, ScriptedEngine(words, free=False)) as old,
        bench_on(valkey.url, model_dir, ScriptedEngine(words)) as new,
    ):
        begun = await old.begin()
        old.manager.start(old.spec(begun, has_edge=False))
        spec = new.spec(begun, shape=Shape.TEXT)
        (one, first), (two, second) = await asyncio.gather(
            new.manager.take_over(spec, ()), new.manager.take_over(spec, ())
        )
        assert one is two
        assert [first, second] == [False, True]
        turn = await new.ended(one)
        assert (turn.tokens, turn.reason) == (words, "stop")


async def test_a_turn_of_a_dead_engine_stays_open_and_goes_on_elsewhere(
    valkey: Valkey, model_dir: Path, words: list[int]
) -> None:
    broken = ScriptedEngine(words)
    broken.fail_at = (3, EngineGone("The engine died."))
    async with bench_on(valkey.url, model_dir, broken) as old:
        begun = await old.begin()
        owner = old.manager.start(old.spec(begun, has_edge=False))
        async with asyncio.timeout(WAIT_S):
            kinds = [type(event) async for event in owner.feed.read()]
        assert Ended not in kinds
        turn = await old.turn()
        assert not turn.ended
        assert turn.tokens == words[:3], "what it made is durable"
        async with bench_on(valkey.url, model_dir, ScriptedEngine(words)) as new:
            second, attached = await new.manager.take_over(new.spec(begun), ())
            assert not attached
            second.edge_lost()
            assert (await new.ended(second)).tokens == words


async def test_a_dead_engine_takes_no_turns(
    valkey: Valkey, model_dir: Path, words: list[int]
) -> None:
    engine = ScriptedEngine(words)
    async with bench_on(valkey.url, model_dir, engine) as bench:
        begun = await bench.begin()
        engine.died.set()
        with pytest.raises(EngineGone):
            await bench.begin("t2")
        async with bench_on(valkey.url, model_dir, engine) as again:
            assert not await again.manager.recover(SESSION)
            with pytest.raises(EngineGone):
                await again.manager.take_over(again.spec(begun), ())
        assert (await bench.turn()).epoch == begun.epoch


async def test_a_turn_under_which_engine_after_engine_dies_is_ended(
    valkey: Valkey, model_dir: Path, words: list[int]
) -> None:
    broken = ScriptedEngine(words)
    broken.fail_at = (0, EngineGone("The engine died."))
    async with bench_on(valkey.url, model_dir, broken) as bench:
        begun = await bench.begin()
        owner = bench.manager.start(bench.spec(begun, has_edge=False))
        for epoch in range(2, TURN_ENGINES + 1):
            async with asyncio.timeout(WAIT_S):
                await owner.ended.wait()
            assert not (await bench.turn()).ended
            owner, _ = await bench.manager.take_over(bench.spec(begun), ())
            assert owner.spec.key.epoch == epoch
            owner.edge_lost()
        turn = await bench.ended(owner)
        assert turn.reason == "error"
        assert turn.error_code == "engine_gone"


async def test_take_over_fences_the_old_owner_and_goes_on_where_the_log_ends(
    valkey: Valkey, model_dir: Path, words: list[int]
) -> None:
    stuck, free = ScriptedEngine(words, free=False), ScriptedEngine(words)
    async with (
        bench_on(valkey.url, model_dir, stuck) as old,
        bench_on(valkey.url, model_dir, free) as new,
    ):
        begun = await old.begin()
        first = old.manager.start(old.spec(begun, has_edge=False))
        stuck.allow(3)
        await shown_tokens(first, 3)
        spec = new.spec(begun)
        second, attached = await new.manager.take_over(spec, tuple(words[:4]))
        assert not attached
        assert second.spec.key.epoch == begun.epoch + 1
        assert second.next_index == 3 or second.next_index == 4
        second.edge_lost()
        turn = await new.ended(second)
        assert turn.tokens == words
        stuck.allow(2)  # the old one's next append is refused, and it stops
        async with asyncio.timeout(WAIT_S):
            await first.ended.wait()
        assert (await new.turn()).tokens == words


async def test_an_orphan_is_finished_though_nobody_asks(
    valkey: Valkey, model_dir: Path, words: list[int]
) -> None:
    async with bench_on(valkey.url, model_dir, ScriptedEngine(words), limits=SHORT) as dead:
        await dead.begin()
    async with bench_on(valkey.url, model_dir, ScriptedEngine(words), limits=SHORT) as bench:
        async with recovering(bench.manager, bench.running, every_s=0.05, grace_s=0.0):
            async with asyncio.timeout(WAIT_S):
                while not (turn := await bench.turn()).ended:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
        assert turn.tokens == words
        assert turn.epoch == 2


async def test_a_turn_that_waits_behind_an_orphan_comes_after_its_whole_reply(
    valkey: Valkey, model_dir: Path, words: list[int]
) -> None:
    async with bench_on(valkey.url, model_dir, ScriptedEngine(words), limits=SHORT) as bench:
        # No start comes between: an orphan waits only so long for somebody who can go on with it.
        async with bench_on(valkey.url, model_dir, ScriptedEngine(words), limits=SHORT) as dead:
            await dead.begin()
        async with asyncio.timeout(WAIT_S):
            _, owner = await bench.manager.run(bench.request("t2"))
        assert owner is not None
        assert (await bench.ended(owner)).tokens == words
        orphan = await bench.turn("t1")
        assert (orphan.tokens, orphan.reason) == (words, "stop")


async def test_orphans_go_to_those_with_room_and_none_ends_for_want_of_it(
    valkey: Valkey, model_dir: Path, words: list[int]
) -> None:
    names = [SessionName("default", f"s{at}") for at in range(5)]
    async with bench_on(valkey.url, model_dir, ScriptedEngine(words), limits=SHORT) as dead:
        for name in names:
            await dead.log.open_session(name, device="phone")
            await dead.begin(session=name)
    engine = ScriptedEngine(words, free=False)
    async with (
        bench_on(valkey.url, model_dir, engine, max_turns=2, limits=SHORT) as bench,
        recovering(bench.manager, bench.running, every_s=0.05, grace_s=0.0),
    ):
        async with asyncio.timeout(WAIT_S):
            while bench.manager.running < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert bench.manager.room == 0
        engine.allow(len(names) * len(words))
        async with asyncio.timeout(WAIT_S):
            for name in names:
                while not (turn := (await bench.log.state(name)).turns[0]).ended:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
                assert (turn.tokens, turn.reason) == (words, "stop")


async def test_an_instance_leaves_orphans_of_another_model_alone(
    valkey: Valkey, model_dir: Path, words: list[int]
) -> None:
    async with bench_on(valkey.url, model_dir, ScriptedEngine(words), limits=SHORT) as dead:
        await dead.begin()
    async with bench_on(
        valkey.url, model_dir, ScriptedEngine(words), model="n", limits=SHORT
    ) as bench:
        assert not await bench.running.due(8)
        assert not await bench.manager.recover(SESSION)
        assert (await bench.turn()).epoch == 1


async def test_a_planned_stop_gives_the_lease_back(
    valkey: Valkey, model_dir: Path, words: list[int]
) -> None:
    engine = ScriptedEngine(words, free=False)
    at_once = TurnLimits(stop_grace_s=0.05)
    async with bench_on(valkey.url, model_dir, ScriptedEngine(words)) as new:
        async with bench_on(valkey.url, model_dir, engine, limits=at_once) as old:
            owner = old.manager.start(old.spec(await old.begin(), has_edge=False))
            engine.allow(3)
            await shown_tokens(owner, 3)
            assert not await new.manager.recover(SESSION), "its lease holds"
            await old.manager.close()
            with pytest.raises(Unreachable):
                await old.begin("t2")
            kinds = [type(event) async for event in owner.feed.read()]
            assert Ended not in kinds
            assert await new.manager.recover(SESSION)
        second = new.manager.owned(SESSION, "t1")
        assert second is not None
        turn = await new.ended(second)
        assert (turn.tokens, turn.epoch) == (words, 2)


async def test_a_turn_is_opened_only_where_it_began(
    valkey: Valkey, model_dir: Path, words: list[int]
) -> None:
    engine = ScriptedEngine(words, free=False)
    async with (
        bench_on(valkey.url, model_dir, engine) as one,
        bench_on(valkey.url, model_dir, ScriptedEngine(words[::-1])) as two,
    ):
        begun = await one.begin()
        owner = one.manager.start(one.spec(begun, has_edge=False))
        with pytest.raises(StaleEpoch):
            two.manager.open(two.spec(begun))
        engine.allow(len(words))
        assert (await one.ended(owner)).tokens == words


async def test_a_lost_owner_s_turn_goes_on_before_its_lease_has_run_out(
    valkey: Valkey, model_dir: Path, words: list[int]
) -> None:
    limits = TurnLimits(lease_s=30.0, lost_owner_quiet_s=0.1)
    async with (
        bench_on(valkey.url, model_dir, ScriptedEngine(words), limits=limits) as silent,
        bench_on(valkey.url, model_dir, ScriptedEngine(words), limits=limits) as bench,
    ):
        await silent.begin()
        assert not await bench.manager.recover(SESSION), "its lease holds"
        await bench.manager.succeed(SESSION, "t1")
        async with asyncio.timeout(WAIT_S):
            while not (turn := await bench.turn()).ended:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert (turn.tokens, turn.epoch) == (words, 2)


async def test_a_living_owner_keeps_a_turn_whose_reader_lost_it(
    valkey: Valkey, model_dir: Path, words: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader's own network may be what was lost."""
    looked: list[bool] = []
    engine = ScriptedEngine(words, free=False)
    async with (
        bench_on(valkey.url, model_dir, engine) as living,
        bench_on(valkey.url, model_dir, ScriptedEngine(words)) as bench,
    ):
        owner = living.manager.start(living.spec(await living.begin(), has_edge=False))
        recover = bench.manager._takeover.recover

        async def look(session: SessionName, quiet_s: float) -> bool:
            looked.append(await recover(session, quiet_s))
            return looked[-1]

        monkeypatch.setattr(bench.manager._takeover, "recover", look)
        await bench.manager.succeed(SESSION, "t1")
        async with asyncio.timeout(WAIT_S):
            while len(looked) < LOST_OWNER_LOOKS:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        engine.allow(len(words))
        turn = await living.ended(owner)
    assert not any(looked)
    assert (turn.tokens, turn.epoch) == (words, 1)


async def test_a_turn_behind_a_hung_engine_is_offered_to_others(
    valkey: Valkey, model_dir: Path, words: list[int]
) -> None:
    engine = ScriptedEngine(words, free=False)
    async with (
        bench_on(valkey.url, model_dir, engine, limits=SHORT) as hung,
        bench_on(valkey.url, model_dir, ScriptedEngine(words), limits=SHORT) as bench,
    ):
        owner = hung.manager.start(hung.spec(await hung.begin(), has_edge=False))
        engine.allow(3)
        await shown_tokens(owner, 3)
        engine.stalled = True
        assert hung.manager.stalled(SESSION, "t1")
        async with asyncio.timeout(WAIT_S):
            while not await bench.manager.recover(SESSION):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            await owner.ended.wait()  # it hears that the turn is another one's
        second = bench.manager.owned(SESSION, "t1")
        turn = await bench.turn() if second is None else await bench.ended(second)
    assert (turn.tokens, turn.epoch, turn.reason) == (words, 2, "stop")


async def test_where_nobody_takes_it_a_turn_stays_with_its_hung_engine(
    valkey: Valkey, model_dir: Path, words: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ScriptedEngine(words, free=False)
    async with bench_on(valkey.url, model_dir, engine, limits=SHORT) as hung:
        owner = hung.manager.start(hung.spec(await hung.begin(), has_edge=False))
        engine.stalled = True
        renewed = asyncio.Event()
        renew = hung.log.renew_turn

        async def renew_turn(*args: Any) -> Any:
            renewed.set()
            return await renew(*args)

        monkeypatch.setattr(hung.log, "renew_turn", renew_turn)
        await asyncio.wait_for(renewed.wait(), WAIT_S)
        assert (await hung.turn()).epoch == 1
        engine.stalled = False
        engine.allow(len(words))
        assert (await hung.ended(owner)).tokens == words


async def test_a_turn_that_lost_its_session_and_got_no_end_gets_it_from_the_next_look(
    valkey: Valkey, model_dir: Path, words: list[int]
) -> None:
    """The store fell silent behind the claim of the next turn, before the end of this one."""
    async with bench_on(valkey.url, model_dir, ScriptedEngine(words), limits=SHORT) as dead:
        await dead.begin()
    async with bench_on(valkey.url, model_dir, ScriptedEngine(words), limits=SHORT) as bench:
        said = opening_ops(bench.request("t2"), model="m", now_ms=0)
        ops = [encode_op(op) for op in said]
        store = await RedisStore.connect(valkey.url)
        async with asyncio.timeout(WAIT_S):
            claim = await store.begin_turn(SESSION, "t2", ops, 30.0)
            while claim.status is Status.BUSY:  # its lease runs out
                claim = await store.begin_turn(SESSION, "t2", ops, 30.0)
        await store.close()
        assert not (await bench.turn("t1")).ended
        assert not await bench.manager.recover(SESSION), "t2 has an owner"
        turn = await bench.turn("t1")
        assert (turn.reason, turn.error_code) == ("error", "turn_failed")
        assert not (await bench.turn("t2")).ended


@pytest.mark.parametrize("when", ["before", "behind"])
async def test_an_orphan_that_the_store_lost_under_its_take_over_is_left_alone(
    valkey: Valkey, model_dir: Path, words: list[int], monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Between the look that found it and the claim, or behind the claim; another turn stands in its
    place by then, and stays its owner's."""
    async with bench_on(valkey.url, model_dir, ScriptedEngine(words), limits=SHORT) as dead:
        await dead.begin()
    async with bench_on(valkey.url, model_dir, ScriptedEngine(words), limits=SHORT) as bench:
        store = await RedisStore.connect(valkey.url)
        wiped = redis.from_url(valkey.url)
        said = opening_ops(bench.request("t2"), model="m", now_ms=0)
        claim = bench.log.take_over
        taken: list[Status] = []

        async def lose() -> None:
            await wiped.flushall()
            await store.open_session(SESSION)
            begun = await store.begin_turn(SESSION, "t2", [encode_op(op) for op in said], 30.0)
            assert begun.status is Status.OK

        async def losing(session: SessionName, turn: str, *args: Any, **more: Any) -> TurnClaim:
            assert turn == "t1"
            if when == "before":
                await lose()
            found = await claim(session, turn, *args, **more)
            taken.append(found.status)
            if when == "behind" and found.status is Status.OK:
                await lose()
            return found

        monkeypatch.setattr(bench.log, "take_over", losing)
        async with asyncio.timeout(WAIT_S):
            while when == "behind" and Status.OK not in taken:  # the lease runs out
                assert not await bench.manager.recover(SESSION)
        assert when == "behind" or not await bench.manager.recover(SESSION)
        assert taken[-1] is (Status.OK if when == "behind" else Status.MISSING)
        state = await bench.log.state(SESSION)
        assert [(turn.turn, turn.epoch, turn.ended) for turn in state.turns] == [("t2", 1, False)]
        assert (bench.manager.running, bench.manager.room) == (0, 8)
        await wiped.aclose()
        await store.close()


async def test_a_turn_whose_owner_leaves_is_prepared_here_and_goes_on_at_once(
    valkey: Valkey, model_dir: Path, words: list[int]
) -> None:
    """Its lease is the owner's meanwhile, and so is the turn until its reader comes here."""
    limits = TurnLimits(lease_s=30.0, lost_owner_quiet_s=30.0, stop_grace_s=0.1)
    engine = ScriptedEngine(words, free=False)
    async with (
        bench_on(valkey.url, model_dir, engine, limits=limits) as leaving,
        bench_on(valkey.url, model_dir, ScriptedEngine(words), limits=limits) as bench,
    ):
        owner = leaving.manager.start(leaving.spec(await leaving.begin(), has_edge=False))
        engine.allow(2)
        await shown_tokens(owner, 2)
        assert not await bench.manager.recover(SESSION), "nobody asked for it"
        assert await bench.manager.prepare(SESSION, "t1", leaving=True)
        (prepared,) = bench.engine.turns
        assert (list(prepared.made), prepared.max_tokens) == (words[:2], 3)
        assert bench.manager.places.held == 0, "it held a place as long as it was computed"
        engine.allow(1)
        await shown_tokens(owner, 3)
        assert (await bench.turn()).epoch == 1, "the owner goes on meanwhile"
        await bench.manager.succeed(SESSION, "t1")
        here = bench.manager.owned(SESSION, "t1")
        assert here is not None
        turn = await bench.ended(here)
        assert (turn.tokens, turn.epoch) == (words, 2)
        engine.allow(len(words))
        assert (await leaving.ended(owner)).epoch == 2
    running = bench.engine.turns[1]
    assert prepared.prompt == running.prompt, "the KV is found again"
    assert prepared.tenant == running.tenant == SESSION.tenant
    assert (prepared.weight, prepared.domains) == (running.weight, running.domains)


async def test_a_prepared_turn_is_taken_once_and_from_the_owner_that_left_alone(
    valkey: Valkey, model_dir: Path, words: list[int]
) -> None:
    limits = TurnLimits(lease_s=30.0, lost_owner_quiet_s=30.0, stop_grace_s=0.1)
    engines = [ScriptedEngine(words, free=False) for _ in range(3)]
    async with (
        bench_on(valkey.url, model_dir, engines[0], limits=limits) as leaving,
        bench_on(valkey.url, model_dir, engines[1], limits=limits) as one,
        bench_on(valkey.url, model_dir, engines[2], limits=limits) as two,
    ):
        leaving.manager.start(leaving.spec(await leaving.begin(), has_edge=False))
        for bench, engine in ((one, engines[1]), (two, engines[2])):
            engine.allow(1)
            assert await bench.manager.prepare(SESSION, "t1", leaving=True)
        name = TurnName(SESSION, "t1")
        assert await one.manager._takeover.go_on(name)
        assert not await two.manager._takeover.go_on(name), "it has a new owner since"
        assert one.manager.owned(SESSION, "t1") is not None
        assert two.manager.owned(SESSION, "t1") is None
        assert not await one.manager._takeover.go_on(name)


async def test_a_doubt_prepares_nothing_where_others_wait_and_takes_nothing(
    valkey: Valkey, model_dir: Path, words: list[int]
) -> None:
    limits = TurnLimits(lease_s=30.0, lost_owner_quiet_s=30.0, stop_grace_s=0.1)
    engine = ScriptedEngine(words)
    async with (
        bench_on(valkey.url, model_dir, ScriptedEngine(words, free=False)) as living,
        bench_on(valkey.url, model_dir, engine, limits=limits) as bench,
    ):
        living.manager.start(living.spec(await living.begin(), has_edge=False))
        engine.waiting = 1
        with pytest.raises(Overloaded):
            await bench.manager.prepare(SESSION, "t1", leaving=False)
        engine.waiting = 0
        assert await bench.manager.prepare(SESSION, "t1", leaving=False)
        assert not await bench.manager._takeover.go_on(TurnName(SESSION, "t1"))
        assert not await living.manager.prepare(SESSION, "t1", leaving=True), "it runs there"
        assert not await bench.manager.prepare(SESSION, "unknown", leaving=True)
        living.manager.leaving.set()
        with pytest.raises(Unreachable):
            await living.manager.prepare(SESSION, "t1", leaving=True)
