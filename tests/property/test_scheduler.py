"""The scheduler under any load: every turn gets exactly its tokens, in any pool that fits it."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from segue_cloud.engine.block_pool import BlockPool
from segue_cloud.engine.placement import ALL, Reach, Recipes
from segue_cloud.engine.port import EngineOutput, EngineTurn
from segue_cloud.engine.scheduler import Scheduler, SchedulerLimits, Step
from segue_cloud.engine.sequence import HOLE
from segue_contract.kv.layout import block_ids

PAGES = 20
EDGE = "edge-recipe"
RECIPES = Recipes("own-recipe", EDGE)
LIMITS = SchedulerLimits(max_batch=4, step_tokens=96, mixed_tokens=64, context=4096)


def fake_token(known: list[int]) -> int:
    """A 'model': the next token depends on all tokens before it and on nothing else."""
    return (sum(known) * 31 + len(known)) % 97 + 1


def run_step(scheduler: Scheduler, step: Step, reach: Reach = ALL) -> list[int]:
    """What the runner does, with checks: the KV of every earlier token in sight is there."""
    pages: list[int] = []
    for work in step.works:
        assert work.count > 0
        assert work.start == work.sequence.computed
        end = work.start + work.count
        assert end <= len(work.sequence.tokens)
        assert work.samples == (end == len(work.sequence.tokens))
        assert len(work.sequence.pages) * 16 >= end
        for key in range(work.start + 1):
            if not reach.window or key < reach.sinks or work.start - key < reach.window:
                assert work.sequence.pages[key // 16] != HOLE
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
        self.scheduler = Scheduler(BlockPool(PAGES), RECIPES, LIMITS)
        self.reach = ALL
        self.expected: dict[str, Expected] = {}
        self.count = 0
        self.tenants = 1

    @initialize(
        share=st.sampled_from([0.4, 0.7, 1.0]),
        reach=st.sampled_from([ALL, Reach(70, 0), Reach(16, 4), Reach(100, 65)]),
        tenants=st.integers(1, 6),
    )
    def choose(self, share: float, reach: Reach, tenants: int) -> None:
        self.reach = reach
        self.tenants = tenants
        self.scheduler = Scheduler(BlockPool(PAGES, target=share), RECIPES, LIMITS, reach)

    @rule(
        size=st.integers(1, 500),
        kind=st.integers(1, 3),
        made=st.integers(0, 5),
        more=st.integers(1, 60),
        ends=st.booleans(),
        tenant=st.integers(0, 5),
    )
    def add(self, size: int, kind: int, made: int, more: int, ends: bool, tenant: int) -> None:
        self.count += 1
        turn = EngineTurn(
            turn=f"t{self.count}",
            prompt=tuple([kind] * size),  # three families share prefixes
            made=tuple([7] * made),
            max_tokens=made + more,
            end_tokens=frozenset((1, 5, 9)) if ends else frozenset(),
            tenant=f"tenant{tenant % self.tenants}",
            weight=0.1 * 3 ** (tenant % self.tenants),
        )
        if self.scheduler.peak_pages(size + made + more) > PAGES:
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
            self._take(self.scheduler.postprocess(step, self._run(step)))

    def _run(self, step: Step) -> list[int]:
        working = {work.sequence.turn.turn for work in step.works}
        assert not self.expected or working, "nobody works"
        if self.tenants == 1 and self.expected:
            assert self.oldest in working, "the oldest turn waits for others"
        for work in step.works:
            live = work.sequence.pages_live
            assert live <= self.scheduler.peak_pages(len(work.sequence.tokens))
        return run_step(self.scheduler, step, self.reach)

    @property
    def oldest(self) -> str:
        return min(self.expected, key=lambda name: int(name[1:]))

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
            sampled = run_step(scheduler, step, self.reach)
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
    return Scheduler(BlockPool(pages), RECIPES, SchedulerLimits(**limits))


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


@given(
    sizes=st.lists(st.tuples(st.integers(1, 400), st.integers(1, 40)), min_size=1, max_size=6),
    flood=st.lists(st.tuples(st.integers(1, 400), st.integers(1, 40)), min_size=1, max_size=4),
    pages=st.integers(30, 120),
    share=st.sampled_from([0.5, 0.7, 1.0]),
)
@settings(max_examples=60, deadline=None)
def test_younger_turns_without_end_delay_nobody_beyond_a_bound(
    sizes: list[tuple[int, int]], flood: list[tuple[int, int]], pages: int, share: float
) -> None:
    """However many come later: a turn ends within the steps that it and the older ones need."""
    pool = BlockPool(pages, target=share)
    scheduler = Scheduler(pool, RECIPES, SchedulerLimits(8, step_tokens=128, mixed_tokens=64))
    for number, (size, new) in enumerate(sizes):
        prompt = tuple(range(1000 * number, 1000 * number + size))
        scheduler.add(EngineTurn(turn=f"old{number}", prompt=prompt, max_tokens=new))
    waiting = {f"old{number}" for number in range(len(sizes))}
    # One after another, in the smallest chunks; a turn may be computed twice if it is preempted.
    bound = sum(2 * (-(-(size + new) // 64)) + new for size, new in sizes)
    began: dict[str, int] = {}
    for count in range(bound):
        if not waiting:
            break
        size, new = flood[count % len(flood)]
        prompt = tuple(range(10**6 + 1000 * count, 10**6 + 1000 * count + size))
        scheduler.add(EngineTurn(turn=f"young{count}", prompt=prompt, max_tokens=new))
        step = scheduler.schedule()
        for work in step.works:
            began.setdefault(work.sequence.turn.turn, count)
        for name, output in scheduler.postprocess(step, run_step(scheduler, step)):
            assert output is not None
            if output.finished:
                waiting.discard(name)
    assert not waiting, f"after {bound} steps these still wait"
    oldest_first = sorted(began, key=lambda name: (name[0] == "y", int(name.strip("oldyung"))))
    steps = [began[name] for name in oldest_first]
    assert steps == sorted(steps), "a younger turn began before an older one"


def test_running_turns_are_kept_within_the_pool() -> None:
    """Many short prompts with long replies: hardly anything is computed twice."""
    scheduler = scheduler_of(300, max_batch=64)
    turns = [
        EngineTurn(turn=f"t{i}", prompt=tuple(range(1000 * i, 1000 * i + 40)), max_tokens=200)
        for i in range(64)
    ]
    for turn in turns:
        scheduler.add(turn)
    computed = 0
    while not scheduler.idle:
        step = scheduler.schedule()
        computed += step.tokens
        scheduler.postprocess(step, run_step(scheduler, step))
    needed = sum(len(turn.prompt) + turn.max_tokens - 1 for turn in turns)
    # The first replies teach it how long they are; with one page in reserve a turn it was 1.33.
    assert computed <= 1.2 * needed
    assert scheduler.preemptions <= len(turns) // 4


def test_a_long_windowed_turn_holds_few_pages() -> None:
    """A prompt of 2,000 tokens in a pool of 640: whatever the window has passed is given back."""
    reach = Reach(window=128, sinks=4)
    pool = BlockPool(40)
    scheduler = Scheduler(pool, RECIPES, SchedulerLimits(step_tokens=64, mixed_tokens=64), reach)
    turn = EngineTurn(turn="long", prompt=tuple(range(2000)), max_tokens=500)
    scheduler.add(turn)
    bound = scheduler.peak_pages(2500)
    assert bound <= 22  # the window's 8, a chunk's 4, the sinks' 4 and up to a block between
    made: list[int] = []
    while not scheduler.idle:
        step = scheduler.schedule()
        for _, output in scheduler.postprocess(step, run_step(scheduler, step, reach)):
            assert output is not None
            made += output.tokens
        assert 40 - pool.pages_free <= bound
        scheduler.check_integrity()
    assert (made, "length") == Expected(turn).reply()
