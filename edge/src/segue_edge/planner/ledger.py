"""The ledger: one entry per turn, what was foreseen beside what happened. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from segue_contract.plan import PlanReport
from segue_edge.planner.costs import PlanInputs
from segue_edge.planner.plan import Plan


def open_report(
    plan: Plan, inputs: PlanInputs, *, instance: str, edge_cached_blocks: int, offline: bool
) -> PlanReport:
    """The entry as the plan leaves it: foreseen costs and their inputs, nothing measured."""
    return PlanReport(
        shape=plan.shape.value,
        forced=plan.forced,
        reason=plan.reason,
        instance=instance,
        predicted={shape.value: cost for shape, cost in plan.predicted.items()},
        missing={shape.value: why for shape, why in plan.missing.items()},
        inputs=inputs.as_numbers(),
        prompt_tokens=inputs.prompt_tokens,
        prompt_blocks=inputs.full_blocks,
        edge_cached_blocks=edge_cached_blocks,
        offline=offline,
    )


def ledger_line(report: PlanReport, **facts: Any) -> bytes:
    """One JSON line: the report's fields after `facts` (turn, session, reason of the end, ...)."""
    entry = {**facts, **msgspec.to_builtins(report)}
    return msgspec.json.encode(_rounded(entry)) + b"\n"


def _rounded(value: Any) -> Any:
    """Floats to a microsecond's precision: a ledger is read by people, too."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return value
