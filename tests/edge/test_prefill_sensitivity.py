"""Sensitive matrices are found by measuring, and only where the target is missed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from segue_contract.model.manifest import Quality
from segue_edge.prefill import quantise
from segue_edge.prefill.sensitivity import Group, groups_of, search, suffix
from tests.edge.test_prefill_quantise import IDS, mlp_graph, run


def loss_of(costs: dict[str, float], tried: list[frozenset[str]]):
    """A model whose every matrix costs what `costs` says unless it is left heavier."""

    def measure(heavier: frozenset[str]) -> Quality:
        tried.append(heavier)
        loss = sum(cost for name, cost in costs.items() if name not in heavier)
        return Quality(agreement=1 - loss, mean_kl=loss)

    return measure


COSTS = {"a": 0.01, "b": 0.08, "c": 0.001, "d": 0.03}
GROUPS = [Group(name.upper(), frozenset({name})) for name in COSTS]


def test_nothing_is_searched_where_the_target_is_met() -> None:
    tried: list[frozenset[str]] = []
    found = search(GROUPS, loss_of(COSTS, tried), 0.85)
    assert tried == [frozenset()]
    assert (found.heavier, found.measured, found.titles) == (frozenset(), 1, ())


def test_the_costliest_groups_join_until_the_target_is_met() -> None:
    tried: list[frozenset[str]] = []
    found = search(GROUPS, loss_of(COSTS, tried), 0.98)
    assert found.heavier == {"b", "d"}
    assert found.titles == ("B", "D")
    assert found.quality.agreement >= 0.98
    assert found.measured == len(tried) == 1 + len(GROUPS) + 2


def test_a_target_out_of_reach_gives_the_best() -> None:
    found = search(GROUPS, loss_of(COSTS | {"head": 0.1}, []), 0.99)
    assert found.heavier == set(COSTS)
    harmful = loss_of({"a": 0.05, "b": -0.02}, [])
    assert search(GROUPS[:2], harmful, 0.99).heavier == {"a"}, "b got worse by it"


def test_groups_are_projections_of_quarters_of_the_depth() -> None:
    names = [f"/model/layers.{i}/mlp/{p}/MatMul" for i in range(8) for p in ("up_proj", "down")]
    groups = groups_of([*names, "/lm_head/MatMul"], 8)
    assert len(groups) == 8
    assert groups[0].names == {f"/model/layers.{i}/mlp/down/MatMul" for i in (0, 1)}
    assert frozenset().union(*(g.names for g in groups)) == set(names)
    assert len(groups_of(names[:4], 2)) == 4, "fewer layers than parts"


def test_another_choice_has_another_name() -> None:
    assert suffix(()) == ""
    assert suffix(["a", "b"]) == suffix(["b", "a"]) != suffix(["a"])


def test_on_a_graph_the_matrix_that_needs_it_is_found(tmp_path: Path) -> None:
    exact = run(mlp_graph(tmp_path), tmp_path, IDS)
    tried: list[frozenset[str]] = []

    def measure(heavier: frozenset[str]) -> Quality:
        tried.append(heavier)
        graph = mlp_graph(tmp_path)
        quantise.w8a8(graph, heavier)
        found = run(graph, tmp_path, IDS)
        error = float((np.abs(found - exact).max(axis=1) / np.abs(exact).max(axis=1)).mean())
        return Quality(agreement=1 - error, mean_kl=error)

    groups = [Group(n, frozenset({n})) for n in ("down_proj", "up_proj", "gate_proj")]
    plain = measure(frozenset())
    found = search(groups, measure, plain.agreement + 1e-3)
    assert found.heavier
    assert found.quality.agreement >= plain.agreement + 1e-3
    best = min(groups, key=lambda group: measure(group.names).mean_kl)
    assert found.titles[0] == best.title
