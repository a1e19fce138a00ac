"""From what this node knows of a turn to the planner's inputs, and the plan."""

from __future__ import annotations

from dataclasses import dataclass

from segue_contract.kv.layout import BLOCK_TOKENS, block_ids
from segue_contract.plan import PlanReport, Shape
from segue_edge.compute import Load
from segue_edge.planner.costs import PlanInputs
from segue_edge.planner.estimators import CloudView
from segue_edge.planner.ledger import open_report
from segue_edge.planner.plan import Plan, choose
from segue_edge.prefill.chunks import chunk_size
from segue_edge.turns.asked import Asked
from segue_edge.turns.cloud.begin import Begun
from segue_edge.turns.compute.tools import EdgeTools
from segue_edge.turns.history import HistoryCache


@dataclass
class Planned:
    """The plan with the ids of the prompt's full blocks, the prefill's chunk size in tokens and
    the report so far."""

    plan: Plan
    ids: list[bytes]
    report: PlanReport
    chunk: int


@dataclass(frozen=True)
class UnderWay:
    """A prefill of this very prompt that has begun: tokens it has yet to compute, and the blocks
    that were cached before it."""

    left_tokens: int
    cached_blocks: int


NOTHING_YET = UnderWay(0, 0)


@dataclass(frozen=True)
class TurnPlanner:
    """Plans turns. `instance`: this node's name; `force`: the plan shape of `--plan`."""

    tools: EdgeTools
    histories: HistoryCache
    instance: str
    force: Shape | None = None

    def plan(self, asked: Asked, begun: Begun, max_tokens: int, early: UnderWay) -> Planned:
        """Look up the caches, gather the estimates, choose."""
        tools = self.tools
        ids = block_ids(tools.recipe, begun.prompt)
        cached = early.cached_blocks
        if early is NOTHING_YET:
            cache = tools.cache.of(asked.session.tenant)
            cached = min(cache.lookup(ids), (len(begun.prompt) - 1) // BLOCK_TOKENS)
        load = tools.compute.load()
        ahead = Load(max(0, load.prefill_tokens - early.left_tokens), load.decoding)
        inputs = self._inputs(asked, begun, max_tokens, cached, ahead)
        plan = choose(inputs, asked.force or self.force)
        report = open_report(
            plan,
            inputs,
            instance=begun.cloud.instance if begun.cloud else self.instance,
            edge_cached_blocks=cached,
            offline=begun.cloud is None,
        )
        wire_s = inputs.ship_bytes / inputs.goodput_bytes_per_s if plan.ship_blocks else 0.0
        chunk = chunk_size(inputs.edge_prefill_tokens / inputs.edge_prefill_tokens_per_s, wire_s)
        return Planned(plan, ids, report, chunk)

    def _inputs(
        self,
        asked: Asked,
        begun: Begun,
        max_tokens: int,
        cached_blocks: int,
        ahead: Load,
    ) -> PlanInputs:
        cloud = begun.cloud
        view = cloud.view if cloud else CloudView()
        history = self.histories.of(asked.session)
        speeds = self.tools.speeds
        rate = speeds.prefill_tokens_per_s.value
        return PlanInputs(
            prompt_tokens=len(begun.prompt),
            reply_tokens=speeds.reply.expect(max_tokens),
            edge_cached_tokens=cached_blocks * BLOCK_TOKENS,
            cloud_cached_tokens=history.cloud_has(cloud.instance, begun.prompt) if cloud else 0,
            edge_prefill_tokens_per_s=rate,
            edge_decode_step_s=speeds.decode_step_s.value,
            edge_queue_s=ahead.prefill_tokens / rate,
            edge_decoding=ahead.decoding,
            cloud_prefill_tokens_per_s=view.prefill_tokens_per_s.value,
            cloud_decode_step_s=view.decode_step_s.value,
            cloud_queue_s=view.queue_s,
            rtt_s=view.rtt_s.value,
            goodput_bytes_per_s=view.goodput.bytes_per_s,
            link_backlog_bytes=float(cloud.backlog_bytes) if cloud else 0.0,
            kv_bytes_per_token=speeds.kv_bytes_per_token.value,
            cloud_reachable=cloud is not None,
            recipe_accepted=cloud is not None and self.tools.may_ship(cloud.recipes),
        )


def needs_edge(shape: Shape) -> bool:
    """Whether this node prefills for the shape."""
    return shape in (Shape.EDGE, Shape.SHIP)
