"""Turns of one instance: who owns them, what the log gets, what happens when somebody goes away."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from segue_contract.errors import (
    InvalidArgument,
    Overloaded,
    TurnConflict,
    TurnFailed,
)
from segue_contract.limits import PLACE_CLAIM_S, StoreLimits, TurnLimits
from segue_contract.plan import Shape
from segue_contract.servers import Valkey
from segue_contract.turn.events import Ended, Started
from tests.support.scripted_engine import ScriptedEngine
from tests.support.servers import stopped
from tests.support.turn_bench import OTHER, SESSION, WAIT_S, bench_on, shown_tokens, tokens_of


async def test_a_turn_without_an_edge_is_in_the_log_as_the_engine_made_it(
    valkey: Valkey, model_dir: Path, words: list[int]
) -> None:
    async with bench_on(valkey.url, model_dir, ScriptedEngine(words)) as bench:
        _, owner = await bench.manager.run(bench.request())
        assert owner is not None
        events = [event async for event in owner.feed.read()]
        turn = await bench.ended(owner)
        assert turn.tokens == words
        assert turn.text == "The sea is wide and the night is long."
        assert (turn.reason, turn.model, turn.weights) == ("stop", "m", "digest")
        assert isinstance(events[0], Started)
        assert isinstance(events[-1], Ended)
        assert tokens_of(events) == words
        later = [event async for event in owner.feed.read(from_index=3)]
        assert tokens_of(later) == words[3:]


async def test_edge_tokens_then_hand_over(
    valkey: Valkey, model_dir: Path, words: list[int]
) -> None:
    async with bench_on(valkey.url, model_dir, ScriptedEngine(words)) as bench:
        owner = bench.manager.start(bench.spec(await bench.begin()))
        detokenizer = bench.tokenizer.detokenizer()
        pieces = [detokenizer.push(token) for token in words]
        owner.edge_tokens(0, tuple(words[:2]), tuple(pieces[:2]))
        owner.edge_tokens(1, tuple(words[1:3]), tuple(pieces[1:3]))  # overlaps: only one is new
        with pytest.raises(InvalidArgument):
            owner.edge_tokens(5, (1,), ("x",))
        with pytest.raises(InvalidArgument):
            owner.hand_over(7)
        owner.hand_over(3)
        turn = await bench.ended(owner)
        assert turn.tokens == words
        assert turn.text == "The sea is wide and the night is long."
        assert bench.engine.turns[0].made == tuple(words[:3])


async def test_a_lost_edge_leaves_the_turn_to_the_cloud(
    valkey: Valkey, model_dir: Path, words: list[int]
) -> None:
    async with bench_on(valkey.url, model_dir, ScriptedEngine(words)) as bench:
        owner = bench.manager.start(bench.spec(await bench.begin()))
        owner.edge_tokens(0, (words[0],), ("The",))
        owner.edge_lost()
        turn = await bench.ended(owner)
        assert turn.tokens == words


async def test_an_edge_may_end_the_turn_itself(
    valkey: Valkey, model_dir: Path, words: list[int]
) -> None:
    async with bench_on(valkey.url, model_dir, ScriptedEngine(words)) as bench:
        spec = bench.spec(await bench.begin(), shape=Shape.EDGE)
        owner = bench.manager.start(spec)
        owner.edge_tokens(0, tuple(words), tuple("x" for _ in words))
        owner.edge_ended("stop", len(words))
        turn = await bench.ended(owner)
        assert (turn.reason, turn.tokens) == ("stop", words)
        assert not bench.engine.turns


async def test_a_stop_string_ends_the_turn_and_is_left_out(
    valkey: Valkey, model_dir: Path, words: list[int]
) -> None:
    async with bench_on(valkey.url, model_dir, ScriptedEngine(words)) as bench:
        spec = bench.spec(await bench.begin(), stop=("wide and",), has_edge=False)
        owner = bench.manager.start(spec)
        turn = await bench.ended(owner)
        assert turn.text == "The sea is "
        assert turn.reason == "stop"
        assert bench.engine.cancelled == 1


async def test_a_stop_string_may_span_the_hand_over(
    valkey: Valkey, model_dir: Path, words: list[int]
) -> None:
    async with bench_on(valkey.url, model_dir, ScriptedEngine(words)) as bench:
        spec = bench.spec(await bench.begin(), stop=("sea is wide",))
        owner = bench.manager.start(spec)
        owner.edge_tokens(0, tuple(words[:3]), ("The", " sea", " is"))
        owner.hand_over(3)
        turn = await bench.ended(owner)
        assert turn.text == "The sea is"  # shown before it could be known; nothing after it
        assert turn.reason == "stop"


async def test_stop_cancels_at_once_wherever_it_is_asked_for(
    valkey: Valkey, model_dir: Path, words: list[int]
) -> None:
    async with bench_on(valkey.url, model_dir, ScriptedEngine(words, free=False)) as bench:
        begun = await bench.begin()
        owner = bench.manager.start(bench.spec(begun, has_edge=False))
        bench.engine.allow(2)
        await shown_tokens(owner, 2)
        assert await bench.log.request_stop(SESSION) == "t1"
        bench.engine.allow(1)  # the next append brings the mark back
        turn = await bench.ended(owner)
        assert turn.reason == "cancelled"
        assert turn.tokens == words[: len(turn.tokens)]


async def test_beyond_the_bound_it_refuses_with_a_hint(
    valkey: Valkey, model_dir: Path, words: list[int]
) -> None:
    engine = ScriptedEngine(words, free=False)
    async with bench_on(valkey.url, model_dir, engine, max_turns=1) as bench:
        bench.manager.start(bench.spec(await bench.begin(), has_edge=False))
        await bench.log.open_session(OTHER, device="phone")
        with pytest.raises(Overloaded) as refused:
            await bench.begin("t2", session=OTHER)
        assert refused.value.fields["retry_after_s"] > 0
        engine.queue_s = 60.0  # its claim is kept for longer than it was told to wait
        with pytest.raises(Overloaded) as refused:
            await bench.begin("t2", session=OTHER)
        assert refused.value.fields["retry_after_s"] < PLACE_CLAIM_S
        assert not (await bench.log.state(OTHER)).turns
        engine.allow(len(words))


async def test_a_full_instance_still_lets_its_own_turns_be_joined(
    valkey: Valkey, model_dir: Path, words: list[int]
) -> None:
    engine = ScriptedEngine(words, free=False)
    async with bench_on(valkey.url, model_dir, engine, max_turns=1) as bench:
        owner = bench.manager.start(bench.spec(await bench.begin(), has_edge=False))
        assert (await bench.begin()).known
        await bench.log.open_session(OTHER, device="phone")
        with pytest.raises(Overloaded):  # who joins a turn leaves it its place
            await bench.begin("t2", session=OTHER)
        engine.allow(len(words))
        await bench.ended(owner)


async def test_a_caller_that_leaves_cancels_nothing(
    valkey: Valkey, model_dir: Path, words: list[int]
) -> None:
    engine = ScriptedEngine(words, free=False)
    async with bench_on(valkey.url, model_dir, engine) as bench:
        caller = asyncio.create_task(bench.manager.run(bench.request()))
        await asyncio.sleep(0)  # it has begun and waits for the store
        caller.cancel()
        await asyncio.gather(caller, return_exceptions=True)
        async with asyncio.timeout(WAIT_S):
            while (owner := bench.manager.owned(SESSION, "t1")) is None:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        engine.allow(len(words))
        assert (await bench.ended(owner)).tokens == words
        assert not bench.manager.knows(SESSION, "t1")


async def test_a_known_turn_is_joined(valkey: Valkey, model_dir: Path, words: list[int]) -> None:
    async with bench_on(valkey.url, model_dir, ScriptedEngine(words)) as bench:
        owner = bench.manager.start(bench.spec(await bench.begin(), has_edge=False))
        await bench.ended(owner)
        again = await bench.begin()
        assert again.known
        assert again.ended


async def test_a_failing_engine_ends_the_turn_with_its_error(
    valkey: Valkey, model_dir: Path, words: list[int]
) -> None:
    engine = ScriptedEngine(words)
    engine.fail_at = (3, TurnFailed("The engine broke.", hint="Try again."))
    async with bench_on(valkey.url, model_dir, engine) as bench:
        owner = bench.manager.start(bench.spec(await bench.begin(), has_edge=False))
        turn = await bench.ended(owner)
        assert turn.reason == "error"
        assert turn.error_code == "turn_failed"
        assert turn.tokens == words[:3]


async def test_a_store_that_stands_still_holds_the_reply_up_and_ends_nothing(
    valkey: Valkey, model_dir: Path, words: list[int]
) -> None:
    engine = ScriptedEngine(words, free=False)
    async with bench_on(
        valkey.url, model_dir, engine, store_limits=StoreLimits(timeout_s=0.2)
    ) as bench:
        owner = bench.manager.start(bench.spec(await bench.begin(), has_edge=False))
        engine.allow(2)
        await shown_tokens(owner, 2)
        with stopped(valkey):
            engine.allow(len(words))
            while engine.decoded < len(words):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await asyncio.sleep(3 * 0.2)  # several calls of it give up
            assert not owner.ended.is_set()
        async with asyncio.timeout(WAIT_S):
            events = [event async for event in owner.feed.read()]
        assert tokens_of(events) == words
        ends = [event for event in events if isinstance(event, Ended)]
        assert [(end.reason, end.durable) for end in ends] == [("stop", True)]
        turn = await bench.turn()
        assert (turn.tokens, turn.reason, turn.epoch) == (words, "stop", 1)


async def test_a_store_that_never_comes_back_leaves_the_turn_open_and_tells_no_end(
    valkey: Valkey, model_dir: Path, words: list[int]
) -> None:
    engine = ScriptedEngine(words, free=False)
    async with bench_on(
        valkey.url,
        model_dir,
        engine,
        store_limits=StoreLimits(timeout_s=0.2),
        limits=TurnLimits(store_calls=2),
    ) as bench:
        owner = bench.manager.start(bench.spec(await bench.begin(), has_edge=False))
        valkey.process.kill()
        engine.allow(3)
        async with asyncio.timeout(WAIT_S):
            events = [event async for event in owner.feed.read()]
        assert [type(event) for event in events] == [Started]


async def test_the_same_id_with_other_content_is_a_conflict(
    valkey: Valkey, model_dir: Path, words: list[int]
) -> None:
    async with bench_on(
        valkey.url, model_dir, ScriptedEngine(words), store_limits=StoreLimits(turn_ids=1)
    ) as bench:
        for turn in ("t1", "t2", "t3"):
            owner = bench.manager.start(bench.spec(await bench.begin(turn), turn, has_edge=False))
            await bench.ended(owner)
        for turn in ("t1", "t3"):  # t1 is long forgotten but for its id
            again = await bench.begin(turn)
            assert again.known
            assert again.ended
            with pytest.raises(TurnConflict):
                await bench.begin(turn, prompt="Something else")
        assert len((await bench.log.state(SESSION)).turns) == 3
