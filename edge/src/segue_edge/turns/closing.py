"""What is left to do when a turn has ended here: remember, learn, write down."""

from __future__ import annotations

import structlog

from segue_contract.kv.layout import BLOCK_TOKENS
from segue_contract.plan import PlanReport, Shape
from segue_contract.sync.state import TurnState as LoggedTurn
from segue_contract.telemetry import EVENT_TURN
from segue_contract.turn.events import Ended, Reason
from segue_edge.planner.estimators import EdgeSpeeds
from segue_edge.planner.ledger import ledger_line
from segue_edge.turns.asked import Asked
from segue_edge.turns.compute.warm import Warmer
from segue_edge.turns.history import HistoryCache
from segue_edge.turns.ledger_file import LedgerFile
from segue_edge.turns.measure import Measure

log = structlog.get_logger("segue.turn")


class TurnClosing:
    """Shared by all turns of a node."""

    def __init__(
        self, histories: HistoryCache, speeds: EdgeSpeeds, warmer: Warmer, ledger: LedgerFile
    ) -> None:
        self._histories = histories
        self._speeds = speeds
        self._warmer = warmer
        self._ledger = ledger

    def remember(
        self,
        asked: Asked,
        prompt: list[int],
        turn: LoggedTurn,
        ended: Ended,
        report: PlanReport,
    ) -> None:
        """The conversation goes on from here, and its KV lies where this turn was computed."""
        history = self._histories.of(asked.session)
        if ended.durable:
            held = [*prompt, *turn.tokens]
            if report.shape == Shape.EDGE.value:  # it logged the tokens and computed no KV of them
                held = prompt[: report.cloud_cached_blocks * BLOCK_TOKENS]
            history.cloud_now_holds(report.instance, held)
        if ended.reason is Reason.ERROR:
            return
        if ended.durable:
            history.add(turn)
        else:
            history.wait(turn)
        self._speeds.reply.observe(len(turn.tokens))
        self._warmer.add(asked.session, [*prompt, *turn.tokens])

    async def write_down(
        self, asked: Asked, ended: Ended, report: PlanReport, measure: Measure
    ) -> None:
        facts = {
            "session": asked.session.session,
            "turn": asked.turn,
            "end": ended.reason.value,
            "tokens": ended.next_index,
            "phases": measure.phases,
        }
        log.info(EVENT_TURN, **facts, **_summary(report))
        await self._ledger.append(ledger_line(report, **facts))


def _summary(report: PlanReport) -> dict[str, object]:
    """The report's figures that a log line carries; the ledger has all of it."""
    actual = report.actual
    assert actual is not None
    return {
        "shape": report.shape,
        "forced": report.forced,
        "reason": report.reason,
        "first_token_by": report.first_token_by,
        "instance": report.instance,
        "predicted_ms": {name: round(c.total_s * 1e3, 1) for name, c in report.predicted.items()},
        "ttft_ms": round(actual.ttft_s * 1e3, 1),
        "gap_ms": round(actual.gap_s * 1e3, 1),
        "total_ms": round(actual.total_s * 1e3, 1),
        "regret_ms": round(report.regret_s * 1e3, 1),
        "overhead_ms": round(report.overhead_s * 1e3, 1),
        "prompt_tokens": report.prompt_tokens,
        "edge_cached_blocks": report.edge_cached_blocks,
        "cloud_cached_blocks": report.cloud_cached_blocks,
        "shipped_blocks": report.shipped_blocks,
        "shipped_bytes": report.shipped_bytes,
        "bridge_tokens": report.bridge_tokens,
        "offline": report.offline,
    }
