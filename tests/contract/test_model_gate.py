"""Which recipes a budget chooses, and what a manifest then says of them."""

from __future__ import annotations

import itertools

import pytest

from segue_contract.kv.layout import KvGeometry, KvRecipe
from segue_contract.model.gate import (
    CODECS,
    EDGE,
    FLOAT,
    WEIGHT_ONLY,
    Measured,
    bytes_per_token,
    choose,
    codecs_of,
    entries,
)
from segue_contract.model.manifest import Quality

SIZES = KvGeometry(layers=30, kv_heads=3, head_dim=64)
STEPS = ("k8v8", "k8v4", "k4v4")
QUANTS = {EDGE: "w8a8", WEIGHT_ONLY: "w8", FLOAT: "none"}
BASE = KvRecipe(weights_digest="ab" * 16, weight_quant="", rope="base=10000")


def measured(graph: str, *losses: float) -> list[Measured]:
    """One entry per step without sinks, the safest first."""
    return [
        Measured(
            graph=graph,
            weight_quant=QUANTS[graph],
            codec=codec,
            quality=Quality(agreement=1 - loss, windows=4),
        )
        for codec, loss in zip(STEPS, losses, strict=False)
    ]


def test_the_ladder_gets_cheaper() -> None:
    sizes = [bytes_per_token(codec, SIZES) for codec in CODECS]
    assert all(a > b for a, b in itertools.pairwise(sizes))
    assert sizes[0] < 0.55 * SIZES.fp16_bytes_per_token
    for with_sinks, plain in (("k8v4-sink4", "k8v4"), ("k4v4-sink4", "k4v4")):
        extra = bytes_per_token(with_sinks, SIZES) - bytes_per_token(plain, SIZES)
        assert extra == 4 * SIZES.fp16_bytes_per_token / 512


def test_every_graph_is_measured_in_the_safest_step_and_all_that_sinks_make_better() -> None:
    assert codecs_of(EDGE) == CODECS
    for graph in (WEIGHT_ONLY, FLOAT):
        assert codecs_of(graph) == ("k8v8", "k8v4-sink4", "k4v4-sink4")


@pytest.mark.parametrize(
    ("losses", "codec"),
    [
        ((0.01, 0.02, 0.03), "k4v4"),
        ((0.01, 0.02, 0.031), "k8v4"),
        ((0.01, 0.04, 0.05), "k8v8"),
        ((0.04, 0.02, 0.05), "k8v4"),  # the budget decides, not the order
    ],
)
def test_the_cheapest_step_within_the_budget(losses: tuple[float, ...], codec: str) -> None:
    found = [*measured(EDGE, *losses), *measured(WEIGHT_ONLY, 0.0, 0.0, 0.0)]
    choice = choose(found, SIZES, 0.03)
    assert choice.edge is not None
    assert (choice.edge.graph, choice.edge.codec) == (EDGE, codec)
    assert choice.note == ""
    recipes = entries(found, choice, BASE)
    assert recipes["edge"].recipe == recipes[f"edge-{codec}"].recipe
    assert recipes["edge-weight-only"].recipe.codec == "k4v4"
    for one in found:
        assert recipes[one.name].allowed == (1 - one.quality.agreement < 0.0301)


def test_a_heavier_graph_where_every_int8_recipe_fails_and_a_word_about_it() -> None:
    edge = measured(EDGE, 0.05, 0.06, 0.07)
    choice = choose([*edge, *measured(WEIGHT_ONLY, 0.01, 0.05, 0.06)], SIZES, 0.03)
    assert choice.edge is not None
    assert choice.edge.name == "edge-weight-only-k8v8"
    assert "8-bit weights only" in choice.note
    found = [*edge, *measured(WEIGHT_ONLY, 0.04, 0.05, 0.06), *measured(FLOAT, 0.01, 0.02, 0.05)]
    choice = choose(found, SIZES, 0.03)
    assert choice.edge is not None
    assert choice.edge.name == "edge-fp32-k8v4"
    assert "float32" in choice.note
    recipes = entries(found, choice, BASE)
    assert recipes["edge"].recipe.weight_quant == "none"
    assert recipes["edge"].allowed
    assert not recipes["edge-k8v8"].allowed
    assert not recipes["edge-weight-only"].allowed


def test_nothing_within_the_budget_is_said_and_not_allowed() -> None:
    found = [
        one for graph in (EDGE, WEIGHT_ONLY, FLOAT) for one in measured(graph, 0.05, 0.06, 0.07)
    ]
    choice = choose(found, SIZES, 0.03)
    assert choice.edge is None
    assert "token ids" in choice.note
    recipes = entries(found, choice, BASE)
    assert not recipes["edge"].allowed
    assert [name for name, entry in recipes.items() if entry.allowed] == ["exact"]
