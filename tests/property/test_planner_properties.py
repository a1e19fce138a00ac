"""What must hold of the planner for all facts, not for chosen ones."""

from __future__ import annotations

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from segue_contract.plan import Shape
from segue_edge.planner.costs import PlanInputs, foresee
from segue_edge.planner.plan import CHOOSABLE, choose, weigh

SLACK = 1 + 1e-9  # float addition in another order


@st.composite
def facts(draw: st.DrawFn) -> PlanInputs:
    def within(low: float, high: float) -> float:
        return draw(st.floats(low, high, allow_nan=False))

    prompt = draw(st.integers(1, 8192))
    return PlanInputs(
        prompt_tokens=prompt,
        reply_tokens=within(1, 4096),
        edge_cached_tokens=draw(st.integers(0, prompt)),
        cloud_cached_tokens=draw(st.integers(0, prompt)),
        edge_prefill_tokens_per_s=within(1, 1e6),
        edge_decode_step_s=within(1e-4, 1),
        edge_queue_s=within(0, 10),
        edge_decoding=draw(st.integers(0, 100)),
        cloud_prefill_tokens_per_s=within(1, 1e6),
        cloud_decode_step_s=within(1e-4, 1),
        cloud_queue_s=within(0, 10),
        rtt_s=within(0, 1),
        goodput_bytes_per_s=within(1e3, 1e10),
        link_backlog_bytes=within(0, 1e9),
        kv_bytes_per_token=within(100, 1e6),
        cloud_reachable=draw(st.booleans()),
        recipe_accepted=draw(st.booleans()),
    )


@given(facts(), st.floats(1, 1000))
def test_more_bandwidth_never_costs_more(given_facts: PlanInputs, factor: float) -> None:
    faster = dataclasses.replace(
        given_facts, goodput_bytes_per_s=given_facts.goodput_bytes_per_s * factor
    )
    slow, fast = foresee(given_facts), foresee(faster)
    for shape in Shape:
        assert fast[shape].cost.ttft_s <= slow[shape].cost.ttft_s * SLACK
        assert fast[shape].cost.gap_s <= slow[shape].cost.gap_s * SLACK
        assert fast[shape].cost.total_s <= slow[shape].cost.total_s * SLACK
        assert weigh(fast[shape]) <= weigh(slow[shape]) * SLACK


@given(facts(), st.floats(0, 100))
def test_a_longer_cloud_queue_never_makes_the_cloud_cheaper(
    given_facts: PlanInputs, more: float
) -> None:
    longer = dataclasses.replace(given_facts, cloud_queue_s=given_facts.cloud_queue_s + more)
    before, after = foresee(given_facts), foresee(longer)
    for shape in Shape:
        assert weigh(before[shape]) <= weigh(after[shape]) * SLACK
    assert after[Shape.EDGE] == before[Shape.EDGE]


@given(facts(), st.floats(0, 100), st.integers(0, 100))
def test_a_busier_edge_never_makes_its_own_part_cheaper(
    given_facts: PlanInputs, more_s: float, more_replies: int
) -> None:
    busier = dataclasses.replace(
        given_facts,
        edge_queue_s=given_facts.edge_queue_s + more_s,
        edge_decoding=given_facts.edge_decoding + more_replies,
    )
    before, after = foresee(given_facts), foresee(busier)
    for shape in Shape:
        assert before[shape].cost.ttft_s <= after[shape].cost.ttft_s * SLACK
    assert weigh(before[Shape.EDGE]) <= weigh(after[Shape.EDGE]) * SLACK
    assert after[Shape.TEXT] == before[Shape.TEXT]


def test_two_replies_on_the_edge_double_the_time_to_its_first_token() -> None:
    idle = PlanInputs(
        prompt_tokens=1000,
        reply_tokens=10,
        edge_prefill_tokens_per_s=1000,
        edge_decode_step_s=0.01,
        cloud_prefill_tokens_per_s=1000,
        cloud_decode_step_s=0.03,
        rtt_s=0.01,
        goodput_bytes_per_s=1e9,
        kv_bytes_per_token=1e4,
    )
    busy = dataclasses.replace(idle, edge_decoding=2)
    assert foresee(idle)[Shape.EDGE].cost.ttft_s == 1.0
    assert foresee(busy)[Shape.EDGE].cost.ttft_s == 2.0
    assert abs(foresee(busy)[Shape.EDGE].cost.gap_s - 0.03) < 1e-12


@given(facts(), st.sampled_from([None, *CHOOSABLE]))
def test_the_choice_is_possible_and_the_least(given_facts: PlanInputs, force: Shape | None) -> None:
    plan = choose(given_facts, force)
    assert plan.shape in CHOOSABLE
    assert plan.shape not in plan.missing
    if plan.forced:
        assert plan.shape == force
        return
    possible = [shape for shape in CHOOSABLE if shape not in plan.missing]
    assert plan.objective[plan.shape] == min(plan.objective[shape] for shape in possible)
    if not given_facts.cloud_reachable:
        assert plan.shape == Shape.EDGE


@given(facts(), st.sampled_from([None, *CHOOSABLE]))
def test_a_plan_covers_the_prompt(given_facts: PlanInputs, force: Shape | None) -> None:
    plan = choose(given_facts, force)
    n = given_facts.prompt_tokens
    start, end = plan.cloud_prefill
    assert 0 <= start <= end == n
    assert plan.ship_blocks in (0, n // 64)
    whole_blocks = plan.shape == Shape.SHIP and n % 64 == 0
    assert (start == n) == (plan.shape == Shape.EDGE or whole_blocks)
    assert choose(given_facts, force) == plan  # pure: the same facts, the same plan
