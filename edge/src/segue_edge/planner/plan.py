"""The choice: one pure function from measured facts to a plan.

The objective weighs what a user feels and what a node pays, in seconds:

    TTFT + gap + 0.25 * total + 0.02 * (edge-decoded tokens beyond 16)

The first token and the wait after it are felt in full. A stream that is under way is read, not
waited for, so its whole length weighs a quarter. The last term is the allowed quality loss and the
edge's scarce decode: a few tokens of the quantised model are what a bridge is for, a whole long
reply of it should save something.
"""

from __future__ import annotations

from dataclasses import dataclass

from segue_contract.errors import InvalidArgument
from segue_contract.limits import LINK_BACKLOG_S
from segue_contract.plan import Cost, Shape
from segue_edge.planner.costs import Foreseen, PlanInputs, foresee

CHOOSABLE = (Shape.SHIP, Shape.TEXT, Shape.EDGE)  # in this order where two cost the same


@dataclass(frozen=True)
class Weights:
    """How much a second, or an edge-decoded token, counts."""

    ttft: float = 1.0
    gap: float = 1.0
    total: float = 0.25
    edge_token: float = 0.02
    free_edge_tokens: float = 16.0


DEFAULT_WEIGHTS = Weights()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Who does what. Token ranges are half-open; `predicted` also has the shapes not chosen."""

    shape: Shape
    reason: str
    forced: bool
    ship_blocks: int
    cloud_prefill: tuple[int, int]
    predicted: dict[Shape, Cost]
    objective: dict[Shape, float]
    missing: dict[Shape, str]


def parse_force(value: str) -> Shape | None:
    """The shape a user forces with `--plan` or a request; None for "" and "auto".

    Raises:
        InvalidArgument: no such shape, or one that cannot be forced yet.
    """
    if value in ("", "auto"):
        return None
    for shape in CHOOSABLE:
        if value == shape.value:
            return shape
    raise InvalidArgument(
        f"{value[:40]!r} is no plan.", hint="Use auto, edge, ship or text.", plan=value[:40]
    )


def needs_missing(i: PlanInputs) -> dict[Shape, str]:
    """Shapes that cannot be chosen now, each with what it lacks."""
    missing = {Shape.SPLIT: "the split shape is foreseen, not run yet"}
    if not i.cloud_reachable:
        missing[Shape.SHIP] = missing[Shape.TEXT] = "the cloud cannot be reached"
    elif not i.recipe_accepted:
        missing[Shape.SHIP] = "the cloud does not accept this model's KV recipe"
    elif i.link_backlog_bytes > LINK_BACKLOG_S * i.goodput_bytes_per_s:
        missing[Shape.SHIP] = "the link has all it can carry from other turns"
    return missing


def weigh(foreseen: Foreseen, weights: Weights = DEFAULT_WEIGHTS) -> float:
    """The objective of one shape; lower is better."""
    cost = foreseen.cost
    return (
        weights.ttft * cost.ttft_s
        + weights.gap * cost.gap_s
        + weights.total * cost.total_s
        + weights.edge_token * max(0.0, foreseen.edge_tokens - weights.free_edge_tokens)
    )


def choose(i: PlanInputs, force: Shape | None = None, weights: Weights = DEFAULT_WEIGHTS) -> Plan:
    """The plan with the least objective among the shapes whose needs are met.

    A forced shape is taken if its needs are met; if not, the best other one is, and `reason` says
    why: a user's turn is answered rather than refused.
    """
    costs = foresee(i)
    objective = {shape: weigh(f, weights) for shape, f in costs.items()}
    missing = needs_missing(i)
    possible = [shape for shape in CHOOSABLE if shape not in missing]
    best = min(possible, key=lambda shape: objective[shape])
    if force is None:
        return _plan(i, best, costs, objective, missing, _why(best, possible, costs), False)
    if force in missing:
        reason = f"{force} was asked for, but {missing[force]}"
        return _plan(i, best, costs, objective, missing, reason, False)
    return _plan(i, force, costs, objective, missing, f"{force} was asked for", True)


def _why(best: Shape, possible: list[Shape], costs: dict[Shape, Foreseen]) -> str:
    if len(possible) == 1:
        return f"only {best} is possible"
    mine = costs[best].cost
    others = ", ".join(
        f"{shape} {_ms(costs[shape].cost.ttft_s)}/{_ms(costs[shape].cost.total_s)}"
        for shape in possible
        if shape != best
    )
    return f"{best} {_ms(mine.ttft_s)}/{_ms(mine.total_s)} to first/last token, against {others}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 10 else f"{seconds:.0f} s"


def _plan(
    i: PlanInputs,
    shape: Shape,
    costs: dict[Shape, Foreseen],
    objective: dict[Shape, float],
    missing: dict[Shape, str],
    reason: str,
    forced: bool,
) -> Plan:
    n = i.prompt_tokens
    shipped = i.full_blocks if shape == Shape.SHIP else 0
    if shape == Shape.SHIP:
        cloud_prefill = (n - i.tail_tokens, n)
    elif shape == Shape.TEXT:
        cloud_prefill = (min(i.cloud_cached_tokens, n - 1), n)
    else:
        cloud_prefill = (n, n)
    return Plan(
        shape=shape,
        reason=reason,
        forced=forced,
        ship_blocks=shipped,
        cloud_prefill=cloud_prefill,
        predicted={name: f.cost for name, f in costs.items()},
        objective=objective,
        missing=missing,
    )
