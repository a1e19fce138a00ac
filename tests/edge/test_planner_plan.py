"""Known cases of the plan, with the numbers of ARCHITECTURE.md, The costs of a plan."""

from __future__ import annotations

import dataclasses

import pytest

from segue_contract.errors import InvalidArgument
from segue_contract.limits import LINK_BACKLOG_S
from segue_contract.plan import Shape
from segue_edge.planner.costs import PlanInputs, edge_cost, ship_cost, split_cost, text_cost
from segue_edge.planner.plan import choose, parse_force

GBPS = 1e9 / 8
# Llama-3.1-8B, 4,096 tokens: A10 INT8 prefill 0.53 s, A100 0.38 s, int8 KV 277 MB.
A10_4K = 4096 / 0.53
A100_4K = 4096 / 0.38
INT8_8B = 277e6 / 4096


def inputs_8b(**changes: object) -> PlanInputs:
    base = PlanInputs(
        prompt_tokens=4096,
        reply_tokens=200,
        edge_prefill_tokens_per_s=A10_4K,
        edge_decode_step_s=0.05,
        cloud_prefill_tokens_per_s=A100_4K,
        cloud_decode_step_s=0.008,
        rtt_s=0.01,
        goodput_bytes_per_s=5 * GBPS,
        kv_bytes_per_token=INT8_8B,
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def test_an_idle_a100_beats_shipping_4k_over_5_gbps() -> None:
    plan = choose(inputs_8b())
    assert plan.shape == Shape.TEXT
    assert plan.predicted[Shape.TEXT].ttft_s == pytest.approx(0.39)
    assert plan.predicted[Shape.SHIP].ttft_s == pytest.approx(0.53)
    assert plan.cloud_prefill == (0, 4096)


def test_a_cloud_queue_of_a_second_makes_shipping_win() -> None:
    plan = choose(inputs_8b(cloud_queue_s=1.0))
    assert plan.shape == Shape.SHIP
    assert plan.ship_blocks == 64


def test_shipping_wins_when_the_edge_already_holds_the_kv() -> None:
    plan = choose(inputs_8b(edge_cached_tokens=4032, goodput_bytes_per_s=10 * GBPS))
    assert plan.shape == Shape.SHIP


def test_a_short_prompt_gets_its_first_token_from_the_edge() -> None:
    plan = choose(inputs_8b(prompt_tokens=192, cloud_prefill_tokens_per_s=2000, rtt_s=0.05))
    assert plan.shape == Shape.SHIP


def test_a_cloud_that_holds_the_prefix_gets_the_text() -> None:
    plan = choose(inputs_8b(cloud_cached_tokens=4032))
    assert plan.shape == Shape.TEXT
    assert plan.cloud_prefill == (4032, 4096)


def test_a_link_that_is_down_leaves_the_edge() -> None:
    plan = choose(inputs_8b(cloud_reachable=False))
    assert plan.shape == Shape.EDGE
    assert plan.reason == "only edge is possible"
    assert set(plan.missing) == {Shape.SPLIT, Shape.SHIP, Shape.TEXT}


def test_a_refused_recipe_is_never_shipped_even_when_forced() -> None:
    facts = inputs_8b(recipe_accepted=False, cloud_queue_s=1.0)
    assert choose(facts).shape != Shape.SHIP
    forced = choose(facts, Shape.SHIP)
    assert forced.shape != Shape.SHIP
    assert not forced.forced
    assert "recipe" in forced.reason


def test_a_saturated_link_switches_to_text() -> None:
    backlog = 5 * GBPS * LINK_BACKLOG_S + 1
    plan = choose(inputs_8b(cloud_queue_s=1.0, link_backlog_bytes=backlog))
    assert plan.shape == Shape.TEXT


@pytest.mark.parametrize("shape", [Shape.EDGE, Shape.SHIP, Shape.TEXT])
def test_a_forced_shape_is_taken(shape: Shape) -> None:
    plan = choose(inputs_8b(), shape)
    assert plan.shape == shape
    assert plan.forced


def test_the_formulas_in_numbers() -> None:
    facts = inputs_8b(goodput_bytes_per_s=1 * GBPS)
    ship = ship_cost(facts)
    # 277 MB at 1 Gbps are 2.216 s: 1.686 s more than the prefill, plus R + step.
    gap = 2.216 - 0.53 + 0.01 + 0.008
    bridge = gap / 0.05  # tokens that the edge decodes meanwhile: the user feels one step
    assert ship.edge_tokens == pytest.approx(1 + bridge)
    assert ship.cost.gap_s == pytest.approx(0.05)
    assert ship.cost.total_s == pytest.approx(0.53 + gap + (199 - bridge) * 0.008)
    assert text_cost(facts).cost.total_s == pytest.approx(0.39 + 199 * 0.008)
    assert edge_cost(facts).cost.total_s == pytest.approx(0.53 + 199 * 0.05)


def test_a_bridge_caps_the_felt_gap_at_one_edge_step() -> None:
    ship = ship_cost(inputs_8b(cloud_queue_s=1.0))
    assert ship.cost.gap_s == pytest.approx(0.05)
    assert ship.edge_tokens == pytest.approx(1 + (1.0 + 0.01 + 0.008) / 0.05)


def test_a_split_is_never_worse_than_text() -> None:
    facts = inputs_8b(edge_cached_tokens=2048, goodput_bytes_per_s=20 * GBPS)
    split = split_cost(facts)
    assert split.cost.ttft_s < text_cost(facts).cost.ttft_s
    assert 0 < split.split_at <= 4096


@pytest.mark.parametrize("value", ["", "auto"])
def test_auto_forces_nothing(value: str) -> None:
    assert parse_force(value) is None


@pytest.mark.parametrize("value", ["split", "fastest", "SHIP"])
def test_an_unknown_plan_is_refused(value: str) -> None:
    with pytest.raises(InvalidArgument, match="no plan"):
        parse_force(value)


@pytest.mark.parametrize("value", [0, -1.0, float("nan")])
def test_facts_that_are_no_measurement_are_refused(value: float) -> None:
    with pytest.raises(InvalidArgument, match="goodput"):
        inputs_8b(goodput_bytes_per_s=value)
