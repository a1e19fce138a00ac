"""What each tenant gets of the engine where several have turns, on a simulated machine."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from segue_cloud.engine.block_pool import BlockPool
from segue_cloud.engine.fair import Demand, FairShare, StepTimes
from segue_cloud.engine.placement import Recipes
from segue_cloud.engine.port import EngineTurn
from segue_cloud.engine.scheduler import Scheduler, SchedulerLimits

DEMANDS = st.dictionaries(
    st.sampled_from("abcdefgh"),
    st.builds(
        lambda weight, turns, running: Demand(weight, min(running, turns), turns),
        st.sampled_from([0.1, 0.5, 1.0, 2.0, 7.0]),
        st.integers(1, 100),
        st.integers(0, 100),
    ),
    min_size=2,
)


def share_of(growth: float = 0.05, fixed_s: float = 1.0, row_s: float = 0.0) -> FairShare:
    """One that has seen steps of all sizes, each of `fixed_s` and `row_s` for each turn in it."""
    fair = FairShare(4, growth)
    for _ in range(50):
        for rows in (1, 2, 4, 8, 16, 32, 64, 128):
            fair.times.observe(rows, 0, fixed_s + row_s * rows)
    return fair


@given(DEMANDS, st.integers(1, 128), st.floats(0.0, 1.0))
def test_each_tenant_gets_its_part_of_a_step_and_the_rest_is_used(
    demands: dict[str, Demand], slots: int, row_s: float
) -> None:
    fair = share_of(row_s=row_s)
    for tenant in demands:
        fair.enter(tenant)
    allowed = fair.allowances(demands, slots)
    given_out = sum(allowed.values())
    weights = sum(one.weight for one in demands.values())
    assert 0 < given_out <= slots
    for tenant, one in demands.items():
        assert allowed[tenant] <= one.turns
        part = int(given_out * one.weight / weights)
        assert allowed[tenant] >= min(one.turns, part), "less than its weight says"
    if row_s == 0.0:  # more turns cost nobody anything
        assert given_out == min(slots, sum(one.turns for one in demands.values()))


@given(DEMANDS, st.integers(1, 16))
def test_over_many_steps_nobody_starves(demands: dict[str, Demand], slots: int) -> None:
    """Also a tenant whose weight is worth less than one turn of a step."""
    fair = share_of(row_s=1.0)
    for tenant, one in demands.items():
        fair.enter(tenant)
        one.running = one.turns
    weights = sum(one.weight for one in demands.values())
    got: Counter[str] = Counter()
    steps, rows = 300, 0
    for _ in range(steps):
        allowed = fair.allowances(demands, slots)
        got.update(allowed)
        rows += sum(allowed.values())
    for tenant, one in demands.items():
        least = min(steps * one.turns, rows * one.weight / weights)
        assert got[tenant] >= 0.85 * least - 2, (tenant, got, least)


@given(
    st.lists(st.tuples(st.integers(1, 128), st.floats(0.001, 10.0)), min_size=1, max_size=60),
    st.integers(1, 128),
    st.floats(0.0, 0.5),
)
def test_what_was_learned_of_steps_bounds_them(
    steps: list[tuple[int, float]], rows: int, growth: float
) -> None:
    times = StepTimes()
    for size, seconds in steps:
        times.observe(size, 0, seconds)
    curve = [times.seconds(n) for n in range(1, 129)]
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(curve))
    fits = times.rows_within(rows, growth, 128)
    assert rows <= fits <= 128
    if fits > rows:
        assert times.seconds(fits) <= (1 + growth) * times.seconds(rows) + 1e-9


class Machine:
    """A scheduler whose steps take `seconds(rows, prompt tokens)`; every tenant asks again as soon
    as one of its turns has ended."""

    def __init__(self, seconds: Callable[[int, int], float], pages: int = 4000) -> None:
        limits = SchedulerLimits(max_batch=64, step_tokens=512, mixed_tokens=256)
        self.scheduler = Scheduler(BlockPool(pages), Recipes("own", "edge"), limits)
        self.seconds = seconds
        self.now = 0.0
        self.tokens: Counter[str] = Counter()
        self.count = 0

    def ask(self, tenant: str, weight: float = 1.0) -> None:
        self.count += 1
        begin = 1000 * self.count
        turn = EngineTurn(
            f"{tenant}{self.count}",
            prompt=tuple(range(begin, begin + 100)),
            max_tokens=60,
            tenant=tenant,
            weight=weight,
        )
        self.scheduler.add(turn)

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        for number in itertools.count():
            if self.now >= until:
                break
            step = self.scheduler.schedule()
            assert step.works, "nobody works"
            rows = sum(work.count == 1 and work.samples for work in step.works)
            took = self.seconds(rows, step.tokens - rows)
            self.now += took
            self.scheduler.fair.times.observe(rows, step.tokens - rows, took)
            turns = {work.sequence.turn.turn: work.sequence.turn for work in step.works}
            for name, output in self.scheduler.postprocess(step, [7] * len(step.sampling)):
                assert output is not None
                self.tokens[turns[name].tenant] += len(output.tokens)
                if output.finished:
                    self.ask(turns[name].tenant, turns[name].weight)
            if number % 100 == 0:
                self.scheduler.check_integrity()


def cpu(rows: int, prompt: int) -> float:
    return 0.027 + 0.0025 * rows + 0.0015 * prompt


def card(rows: int, prompt: int) -> float:
    return 0.008 + 0.00001 * rows + 0.00003 * prompt


def tokens_beside(
    seconds: Callable[[int, int], float], others: int, pages: int = 4000
) -> Counter[str]:
    """Tokens of a tenant with four turns, and of another with `others`, which came first."""
    machine = Machine(seconds, pages)
    for _ in range(others):
        machine.ask("noisy")
    step_s = seconds(8, 0)
    machine.run(100 * step_s)
    for _ in range(4):
        machine.ask("quiet")
    machine.run(100 * step_s)
    machine.tokens.clear()
    machine.run(500 * step_s)
    return machine.tokens


def test_a_flood_costs_others_little_on_any_machine() -> None:
    for seconds in (cpu, card):
        ordinary = tokens_beside(seconds, 4)
        for pages in (4000, 400):
            flooded = tokens_beside(seconds, 200, pages)
            cost = 1 - flooded["quiet"] / ordinary["quiet"]
            assert cost <= 0.10, (seconds.__name__, pages, cost)
            assert flooded["noisy"] >= 0.9 * ordinary["noisy"], "the flood lost its own part"


def test_a_card_serves_more_of_a_flood_where_that_costs_nobody_much() -> None:
    beside = tokens_beside(card, 60)
    assert beside["noisy"] >= 2 * beside["quiet"]


def test_two_that_flood_get_what_their_weights_say() -> None:
    machine = Machine(cpu)
    for _ in range(60):
        machine.ask("two", weight=2.0)
        machine.ask("one", weight=1.0)
    machine.run(20.0)
    machine.tokens.clear()
    machine.run(60.0)
    assert abs(machine.tokens["two"] / machine.tokens["one"] - 2.0) < 0.2, machine.tokens


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 100), st.integers(2, 100))
def test_one_tenant_is_served_as_if_there_were_no_tenants(first: int, second: int) -> None:
    """The same steps, turn by turn, whatever the tenant is called."""
    plans = []
    for tenant in ("", "alone"):
        scheduler = Scheduler(
            BlockPool(100),
            Recipes("own", "edge"),
            SchedulerLimits(max_batch=4, step_tokens=96, mixed_tokens=64),
        )
        for number, size in enumerate((first, second, first + second, 3)):
            prompt = tuple(range(500 * number, 500 * number + size))
            scheduler.add(EngineTurn(f"t{number}", prompt, max_tokens=20, tenant=tenant))
        plan = []
        while not scheduler.idle:
            step = scheduler.schedule()
            plan.append([(w.sequence.turn.turn, w.start, w.count) for w in step.works])
            scheduler.postprocess(step, [7] * len(step.sampling))
        plans.append(plan)
    assert plans[0] == plans[1]
