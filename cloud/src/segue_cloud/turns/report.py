"""The plan report that `turn_ended` carries: the edge's, brought up to the turn's end."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from segue_contract.errors import InvalidArgument
from segue_contract.kv.layout import BLOCK_TOKENS
from segue_contract.plan import Cost, PlanReport, Shape, decode_plan, with_actual


@dataclass(frozen=True)
class TurnTimes:
    """Seconds by one clock. `first_token` and `second_token` are None where there was none."""

    began: float
    first_token: float | None
    second_token: float | None
    ended: float


@dataclass(frozen=True)
class EdgeNote:
    """The edge's report as it came over the turn's stream, and when: its times end there."""

    report: PlanReport
    came: float


def read_note(data: bytes, now: float) -> EdgeNote:
    """Raises InvalidArgument where the bytes are no plan report."""
    report = decode_plan(data)
    if report.shape not in set(Shape):
        raise InvalidArgument(f"There is no plan shape {report.shape!r}.")
    return EdgeNote(report, now)


def final_report(
    note: EdgeNote | None, times: TurnTimes, *, prompt_tokens: int, cached_tokens: int, why: str
) -> PlanReport:
    """What the log keeps of the turn's plan. `why`: the reason where no edge planned it."""
    first = times.first_token if times.first_token is not None else times.ended
    second = times.second_token if times.second_token is not None else first
    cached_blocks = cached_tokens // BLOCK_TOKENS
    if note is None:
        report = PlanReport(
            shape=Shape.TEXT.value,
            reason=why,
            first_token_by="cloud",
            prompt_tokens=prompt_tokens,
            prompt_blocks=prompt_tokens // BLOCK_TOKENS,
            cloud_cached_blocks=cached_blocks,
        )
        began = times.began
        return with_actual(
            report,
            Cost(ttft_s=first - began, gap_s=second - first, total_s=times.ended - began),
        )
    report, so_far = note.report, note.report.actual
    began = note.came - (so_far.total_s if so_far is not None else 0.0)
    ttft_s, gap_s = first - began, second - first
    if so_far is not None and report.first_token_by:  # the edge saw it put before the device
        ttft_s, gap_s = so_far.ttft_s, so_far.gap_s or max(0.0, second - began - so_far.ttft_s)
    reused = cached_blocks - report.shipped_blocks  # what came up for this turn was not cached
    report = msgspec.structs.replace(
        report,
        first_token_by=report.first_token_by or "cloud",
        cloud_cached_blocks=max(report.cloud_cached_blocks, reused),
    )
    return with_actual(report, Cost(ttft_s=ttft_s, gap_s=gap_s, total_s=times.ended - began))
