"""The scheduler under any load: every turn gets exactly its tokens, in any pool that fits it."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from segue_cloud.engine.block_pool import BlockPool
from segue_cloud.engine.port import EngineOutput, EngineTurn
from segue_cloud.engine.scheduler import Scheduler, SchedulerLimits, Step
from segue_contract.kv.layout import block_ids

PAGES = 20
OWN, EDGE = "own-recipe", "edge-recipe"
LIMITS = SchedulerLimits(max_batch=4, step_tokens=96, mixed_tokens=64, context=4096)


def fake_token(known: list[int]) -> int:
    """A 'model': the next token depends on all tokens before it and on nothing else."""
    return (sum(known) * 31 + len(known)) % 97 + 1


def run_step(scheduler: Scheduler, step: Step) -> list[int]:
    """What the runner does, with checks: the KV of every earlier token is there."""
    pages: list[int] = []
    for work in step.works:
        assert work.count > 0
        assert work.start == work.sequence.computed
        end = work.start + work.count
        assert end <= len(work.sequence.tokens)
        assert work.samples == (end == len(work.sequence.tokens))
        assert len(work.sequence.pages) * 16 >= end
        pages.extend(work.sequence.pages[work.start // 16 : -(-end // 16)])
    assert len(set(pages)) == len(pages), "two turns write one page"
    return [fake_token(work.sequence.tokens) for work in step.sampling]


@dataclass
class Expected:
    turn: EngineTurn
    got: list[int] = field(default_factory=list)

    def reply(self) -> tuple[list[int], str]:
        known = [*self.turn.prompt, *self.turn.made]
        made = len(self.turn.made)
        out: list[int] = []
        while made + len(out) < self.turn.max_tokens:
            token = fake_token(known)
            if token in self.turn.end_tokens:
                return out, "stop"
            known.append(token)
            out.append(token)
        return out, "length"


class SchedulerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(BlockPool(PAGES), OWN, EDGE, LIMITS)
        self.expected: dict[str, Expected] = {}
        self.count = 0

    @rule(
        size=st.integers(1, 200),
        kind=st.integers(1, 3),
        made=st.integers(0, 5),
        more=st.integers(1, 60),
        ends=st.booleans(),
    )
    def add(self, size: int, kind: int, made: int, more: int, ends: bool) -> None:
        self.count += 1
        turn = EngineTurn(
            turn=f"t{self.count}",
            prompt=tuple([kind] * size),  # three families share prefixes
            made=tuple([7] * made),
            max_tokens=made + more,
            end_tokens=frozenset((1, 5, 9)) if ends else frozenset(),
        )
        if size + made + more > PAGES * 16:
            return  # the engine refuses these on arrival
        assert self.scheduler.add(turn) is None
        self.expected[turn.turn] = Expected(turn)

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.expected)))
        assert self.scheduler.cancel(name)
        assert not self.scheduler.cancel(name)
        del self.expected[name]

    @precondition(lambda self: self.expected)
    @rule(steps=st.integers(1, 30))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            step = self.scheduler.schedule()
            assert step.tokens <= LIMITS.step_tokens + LIMITS.max_batch
            self.scheduler.check_integrity()
            self._take(self.scheduler.postprocess(step, run_step(self.scheduler, step)))

    def _take(self, outputs: list[tuple[str, EngineOutput | None]]) -> None:
        for name, output in outputs:
            assert output is not None
            expected = self.expected[name]
            assert output.index == len(expected.turn.made) + len(expected.got)
            expected.got.extend(output.tokens)
            if output.finished:
                assert (expected.got, output.finished) == expected.reply()
                del self.expected[name]

    @precondition(lambda self: self.expected)
    @rule(steps=st.integers(1, 30), leaves=st.booleans())
    def steps_ahead(self, steps: int, leaves: bool) -> None:
        """Each step is planned before the tokens of the one before it are known."""
        scheduler = self.scheduler
        step = scheduler.schedule()
        for _ in range(steps):
            sampled = run_step(scheduler, step)
            scheduler.begin(step)
            ahead = scheduler.schedule()
            scheduler.check_integrity()
            if leaves and self.expected:
                name = min(self.expected)
                assert scheduler.cancel(name)
                del self.expected[name]
                leaves = False
            self._take(scheduler.end(step, sampled))
            step = scheduler.still_valid(ahead)

    @invariant()
    def sound(self) -> None:
        self.scheduler.check_integrity()
        assert self.scheduler.idle == (not self.expected)
        if self.scheduler.idle:
            assert self.scheduler.pool.pages_free == PAGES, "an ended turn left pages behind"

    def teardown(self) -> None:
        bound = 20_000
        while self.expected and bound:
            bound -= 1
            self.step(1)
        assert not self.expected, "a turn never ended"


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def scheduler_of(pages: int, **limits: int) -> Scheduler:
    return Scheduler(BlockPool(pages), OWN, EDGE, SchedulerLimits(**limits))


def run_all(scheduler: Scheduler) -> dict[str, list[int]]:
    """Run until idle; the reply tokens of each turn."""
    replies: dict[str, list[int]] = {}
    while not scheduler.idle:
        step = scheduler.schedule()
        assert step.works
        for name, output in scheduler.postprocess(step, run_step(scheduler, step)):
            assert output is not None
            replies.setdefault(name, []).extend(output.tokens)
    return replies


@given(chunk=st.integers(64, 300), pages=st.integers(14, 60))
@settings(max_examples=40, deadline=None)
def test_neither_chunks_nor_a_small_pool_change_a_reply(chunk: int, pages: int) -> None:
    turns = [
        EngineTurn(turn=f"t{i}", prompt=tuple(range(1, 40 + 23 * i)), max_tokens=30)
        for i in range(6)
    ]
    wide = scheduler_of(1000)
    narrow = scheduler_of(pages, step_tokens=chunk, mixed_tokens=64, max_batch=3)
    for turn in turns:
        wide.add(turn)
        narrow.add(turn)
    assert run_all(narrow) == run_all(wide)


def test_decoding_turns_never_wait_for_a_long_prompt() -> None:
    scheduler = scheduler_of(1000, step_tokens=128, mixed_tokens=64)
    scheduler.add(EngineTurn(turn="short", prompt=(1, 2, 3), max_tokens=50))
    first = scheduler.schedule()
    scheduler.postprocess(first, run_step(scheduler, first))
    scheduler.add(EngineTurn(turn="long", prompt=tuple(range(1, 1000)), max_tokens=1))
    for _ in range(10):
        step = scheduler.schedule()
        assert [w.sequence.turn.turn for w in step.works] == ["short", "long"]
        assert step.works[1].count == 64
        scheduler.postprocess(step, run_step(scheduler, step))


def test_a_short_prompt_shares_the_step_with_a_long_one() -> None:
    scheduler = scheduler_of(1000, step_tokens=256)
    scheduler.add(EngineTurn(turn="long", prompt=tuple(range(1, 1000)), max_tokens=1))
    step = scheduler.schedule()
    scheduler.postprocess(step, run_step(scheduler, step))
    scheduler.add(EngineTurn(turn="short", prompt=tuple(range(1, 65)), max_tokens=1))
    step = scheduler.schedule()
    counts = {w.sequence.turn.turn: w.count for w in step.works}
    assert counts == {"long": 192, "short": 64}


def test_the_next_turn_of_a_session_reuses_prompt_and_reply() -> None:
    scheduler = scheduler_of(1000)
    prompt = tuple(range(1, 101))
    scheduler.add(EngineTurn(turn="one", prompt=prompt, max_tokens=100))
    reply = run_all(scheduler)["one"]
    second = (*prompt, *reply, *range(1, 20))
    scheduler.add(EngineTurn(turn="two", prompt=second, max_tokens=2))
    step = scheduler.schedule()
    assert step.works[0].start == 192  # 199 computed tokens make three full blocks
    [(_, output)] = scheduler.postprocess(step, run_step(scheduler, step))
    assert output is not None
    assert output.cached_tokens == 192
    # The edge need not ship what we computed ourselves.
    assert scheduler.pool.count_prefix(block_ids(EDGE, second)) == 3


def test_one_prompt_token_is_always_left_to_compute() -> None:
    scheduler = scheduler_of(1000)
    prompt = tuple(range(1, 129))
    for name in ("one", "two"):
        scheduler.add(EngineTurn(turn=name, prompt=prompt, max_tokens=1))
        step = scheduler.schedule()
        start = step.works[0].start
        scheduler.postprocess(step, run_step(scheduler, step))
    assert start == 64


def test_a_turn_that_is_complete_on_arrival_ends_at_once() -> None:
    scheduler = scheduler_of(1000)
    full = EngineTurn(turn="a", prompt=(1,), made=(2, 3), max_tokens=2)
    stopped = EngineTurn(
        turn="b", prompt=(1,), made=(2, 9), max_tokens=8, end_tokens=frozenset({9})
    )
    outputs = [scheduler.add(full), scheduler.add(stopped)]
    assert [o.finished for o in outputs if o] == ["length", "stop"]
    assert scheduler.idle


def test_bad_logits_end_one_turn_and_share_nothing_of_it() -> None:
    scheduler = scheduler_of(1000)
    for name, start in (("good", 1), ("bad", 200)):
        scheduler.add(EngineTurn(turn=name, prompt=tuple(range(start, start + 70)), max_tokens=5))
    step = scheduler.schedule()
    tokens = [4 if w.sequence.turn.turn == "good" else -1 for w in step.sampling]
    outputs = dict(scheduler.postprocess(step, tokens))
    assert outputs["bad"] is None
    assert outputs["good"] is not None
    assert scheduler.pool.count_prefix(block_ids(EDGE, range(1, 71))) == 1
    assert scheduler.pool.count_prefix(block_ids(EDGE, range(200, 270))) == 0
    scheduler.check_integrity()
