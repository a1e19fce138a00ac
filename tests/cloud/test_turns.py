"""Turns of one instance: who owns them, what the log gets, what happens when somebody goes away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from segue_cloud.log.session_log import SessionLog
from segue_cloud.sessions.running import RunningTurns
from segue_cloud.sessions.store import RedisStore
from segue_cloud.turns.manager import Begun, TurnManager
from segue_cloud.turns.opening import TurnRequest
from segue_cloud.turns.owner import OwnerDeps, TurnOwner
from segue_cloud.turns.recovery import recovering
from segue_cloud.turns.spec import OwnedTurn
from segue_cloud.turns.writer import TurnKey
from segue_contract.chat import ChatTokenizer
from segue_contract.errors import (
    EngineGone,
    InvalidArgument,
    Overloaded,
    SessionBusy,
    StaleEpoch,
    TurnCancelled,
    TurnConflict,
    TurnFailed,
    Unreachable,
)
from segue_contract.ids import SessionName
from segue_contract.limits import (
    MAX_TURNS_WAITING_PER_SESSION,
    STORE_PATIENCE_CALLS,
    STORE_TIMEOUT_S,
    TURN_ENGINES,
)
from segue_contract.model.manifest import read_manifest
from segue_contract.plan import Shape
from segue_contract.servers import Valkey
from segue_contract.sync.ops import Sampling
from segue_contract.sync.state import TurnState, find_turn
from tests.support.scripted_engine import ScriptedEngine
from tests.support.servers import stopped

SESSION = SessionName("default", "trip")
OTHER = SessionName("default", "work")
WAIT_S = 20.0


@dataclass
class Bench:
    """One instance's turns over a real store and a scripted engine."""

    manager: TurnManager
    log: SessionLog
    engine: ScriptedEngine
    tokenizer: ChatTokenizer
    running: RunningTurns

    def request(self, turn: str = "t1", **changes: object) -> TurnRequest:
        values: dict[str, object] = {
            "session": SESSION, "device": "phone", "turn": turn,
            "prompt": "Hello", "max_tokens": 100, "sampling": Sampling(),
        }  # fmt: skip
        return TurnRequest(**(values | changes))  # type: ignore[arg-type]

    async def begin(self, turn: str = "t1", **changes: object) -> Begun:
        return await self.manager.begin(self.request(turn, **changes), expect_open=False)

    def spec(self, begun: Begun, turn: str = "t1", **changes: object) -> OwnedTurn:
        values: dict[str, object] = {
            "key": TurnKey(SESSION, turn, begun.epoch, "phone", begun.nonce),
            "prompt": (1, 2, 3), "max_tokens": 100, "sampling": Sampling(), "stop": (),
            "shape": Shape.SHIP, "has_edge": True,
        }  # fmt: skip
        return OwnedTurn(**(values | changes))  # type: ignore[arg-type]

    async def turn(self, turn: str = "t1") -> TurnState:
        state = await self.log.state(SESSION)
        found = find_turn(state, turn)
        assert found is not None
        return found

    async def ended(self, owner: TurnOwner) -> TurnState:
        async with asyncio.timeout(WAIT_S):
            await owner.ended.wait()
        return await self.turn(owner.spec.key.turn)


@asynccontextmanager
async def bench_on(
    url: str,
    model_dir: Path,
    engine: ScriptedEngine,
    *,
    max_turns: int = 8,
    model: str = "m",
    store_timeout_s: float = STORE_TIMEOUT_S,
    store_patience_calls: int = STORE_PATIENCE_CALLS,
) -> AsyncIterator[Bench]:
    tokenizer = ChatTokenizer.load(model_dir, read_manifest(model_dir))
    store = await RedisStore.connect(url, timeout_s=store_timeout_s)
    async with SessionLog(store) as log:
        deps = OwnerDeps(
            log, engine, tokenizer, frozenset({2}), 8192, 49152,
            lambda: time.time_ns() // 1_000_000, time.monotonic, store_patience_calls,
        )  # fmt: skip
        running = store.running_turns(model)
        manager = TurnManager(deps, running, model=model, max_turns=max_turns)
        await log.open_session(SESSION, device="phone")
        try:
            yield Bench(manager, log, engine, tokenizer, running)
        finally:
            await manager.close()
            await store.close()


@pytest.fixture
def words(model_dir: Path) -> list[int]:
    tokenizer = ChatTokenizer.load(model_dir, read_manifest(model_dir))
    return tokenizer.encode("The sea is wide and the night is long.")


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
        assert turn.reason == "stop"
        kinds = [event.WhichOneof("kind") for event in events]
        assert kinds[0] == "started"
        assert kinds[-1] == "ended"
        shown = [token for event in events for token in event.frame.tokens]
        assert shown == words
        later = [event async for event in owner.feed.read(from_index=3)]
        assert [token for event in later for token in event.frame.tokens] == words[3:]


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
        async with asyncio.timeout(WAIT_S):
            async for event in owner.feed.read():
                if event.frame.index + len(event.frame.tokens) >= 2:
                    break
        assert await bench.log.request_stop(SESSION) == "t1"
        bench.engine.allow(1)  # the next append brings the mark back
        turn = await bench.ended(owner)
        assert turn.reason == "cancelled"
        assert turn.tokens == words[: len(turn.tokens)]


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
        assert not (await bench.log.state(OTHER)).turns
        engine.allow(len(words))


async def test_a_full_instance_still_lets_its_own_turns_be_joined(
    valkey: Valkey, model_dir: Path, words: list[int]
) -> None:
    engine = ScriptedEngine(words, free=False)
    async with bench_on(valkey.url, model_dir, engine, max_turns=1) as bench:
        owner = bench.manager.start(bench.spec(await bench.begin(), has_edge=False))
        assert (await bench.begin()).known
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


async def test_a_turn_of_a_dead_engine_stays_open_and_goes_on_elsewhere(
    valkey: Valkey, model_dir: Path, words: list[int]
) -> None:
    broken = ScriptedEngine(words)
    broken.fail_at = (3, EngineGone("The engine died."))
    async with bench_on(valkey.url, model_dir, broken) as old:
        begun = await old.begin()
        owner = old.manager.start(old.spec(begun, has_edge=False))
        async with asyncio.timeout(WAIT_S):
            kinds = [event.WhichOneof("kind") async for event in owner.feed.read()]
        assert "ended" not in kinds
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
        async with asyncio.timeout(WAIT_S):
            async for event in first.feed.read():
                if event.frame.index + len(event.frame.tokens) >= 3:
                    break
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


@pytest.fixture
def short_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("claims", "takeover", "writer", "manager", "recovery"):
        monkeypatch.setattr(f"segue_cloud.turns.{module}.TURN_LEASE_S", 0.3)


@pytest.mark.usefixtures("short_lease")
async def test_an_orphan_is_finished_though_nobody_asks(
    valkey: Valkey, model_dir: Path, words: list[int]
) -> None:
    async with bench_on(valkey.url, model_dir, ScriptedEngine(words)) as dead:
        await dead.begin()
    async with bench_on(valkey.url, model_dir, ScriptedEngine(words)) as bench:
        async with recovering(bench.manager, bench.running, every_s=0.05, grace_s=0.0):
            async with asyncio.timeout(WAIT_S):
                while not (turn := await bench.turn()).ended:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
        assert turn.tokens == words
        assert turn.epoch == 2


@pytest.mark.usefixtures("short_lease")
async def test_a_turn_that_waits_behind_an_orphan_comes_after_its_whole_reply(
    valkey: Valkey, model_dir: Path, words: list[int]
) -> None:
    async with bench_on(valkey.url, model_dir, ScriptedEngine(words)) as dead:
        await dead.begin()
    async with bench_on(valkey.url, model_dir, ScriptedEngine(words)) as bench:
        async with asyncio.timeout(WAIT_S):
            _, owner = await bench.manager.run(bench.request("t2"))
        assert owner is not None
        assert (await bench.ended(owner)).tokens == words
        orphan = await bench.turn("t1")
        assert (orphan.tokens, orphan.reason) == (words, "stop")


async def shown_tokens(owner: TurnOwner, count: int) -> None:
    async with asyncio.timeout(WAIT_S):
        async for event in owner.feed.read():
            if event.frame.index + len(event.frame.tokens) >= count:
                return


async def test_a_store_that_stands_still_holds_the_reply_up_and_ends_nothing(
    valkey: Valkey, model_dir: Path, words: list[int]
) -> None:
    engine = ScriptedEngine(words, free=False)
    async with bench_on(valkey.url, model_dir, engine, store_timeout_s=0.2) as bench:
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
        assert [token for event in events for token in event.frame.tokens] == words
        ends = [event.ended for event in events if event.WhichOneof("kind") == "ended"]
        assert [(end.reason, end.durable) for end in ends] == [("stop", True)]
        turn = await bench.turn()
        assert (turn.tokens, turn.reason, turn.epoch) == (words, "stop", 1)


async def test_a_store_that_never_comes_back_leaves_the_turn_open_and_tells_no_end(
    valkey: Valkey, model_dir: Path, words: list[int]
) -> None:
    engine = ScriptedEngine(words, free=False)
    async with bench_on(
        valkey.url, model_dir, engine, store_timeout_s=0.2, store_patience_calls=2
    ) as bench:
        owner = bench.manager.start(bench.spec(await bench.begin(), has_edge=False))
        valkey.process.kill()
        engine.allow(3)
        async with asyncio.timeout(WAIT_S):
            events = [event async for event in owner.feed.read()]
        assert [event.WhichOneof("kind") for event in events] == ["started"]


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


async def test_the_same_id_with_other_content_is_a_conflict(
    valkey: Valkey, model_dir: Path, words: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("segue_cloud.sessions.store.TURN_ID_MEMORY", 1)
    async with bench_on(valkey.url, model_dir, ScriptedEngine(words)) as bench:
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


@pytest.mark.usefixtures("short_lease")
async def test_orphans_go_to_those_with_room_and_none_ends_for_want_of_it(
    valkey: Valkey, model_dir: Path, words: list[int]
) -> None:
    names = [SessionName("default", f"s{at}") for at in range(5)]
    async with bench_on(valkey.url, model_dir, ScriptedEngine(words)) as dead:
        for name in names:
            await dead.log.open_session(name, device="phone")
            await dead.begin(session=name)
    engine = ScriptedEngine(words, free=False)
    async with (
        bench_on(valkey.url, model_dir, engine, max_turns=2) as bench,
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


@pytest.mark.usefixtures("short_lease")
async def test_an_instance_leaves_orphans_of_another_model_alone(
    valkey: Valkey, model_dir: Path, words: list[int]
) -> None:
    async with bench_on(valkey.url, model_dir, ScriptedEngine(words)) as dead:
        await dead.begin()
    async with bench_on(valkey.url, model_dir, ScriptedEngine(words), model="n") as bench:
        assert not await bench.running.due(8)
        assert not await bench.manager.recover(SESSION)
        assert (await bench.turn()).epoch == 1


async def test_a_planned_stop_gives_the_lease_back(
    valkey: Valkey, model_dir: Path, words: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("segue_cloud.turns.manager.SHUTDOWN_GRACE_S", 0.1)
    engine = ScriptedEngine(words, free=False)
    async with bench_on(valkey.url, model_dir, ScriptedEngine(words)) as new:
        async with bench_on(valkey.url, model_dir, engine) as old:
            owner = old.manager.start(old.spec(await old.begin(), has_edge=False))
            engine.allow(3)
            await shown_tokens(owner, 3)
            assert not await new.manager.recover(SESSION), "its lease holds"
            await old.manager.close()
            with pytest.raises(Unreachable):
                await old.begin("t2")
            kinds = [event.WhichOneof("kind") async for event in owner.feed.read()]
            assert "ended" not in kinds
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
