"""What a plan is called and what is reported of it: the same words on every side."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from segue_contract.errors import UNREADABLE, InvalidArgument


class Shape(StrEnum):
    """Who computes which part of a turn (ARCHITECTURE.md, The costs of a plan)."""

    EDGE = "edge"  # all of it on the edge
    SHIP = "ship"  # the edge prefills, its KV goes up, the cloud decodes
    TEXT = "text"  # token ids go up, the cloud prefills and decodes
    SPLIT = "split"  # the head's KV goes up while the cloud prefills the tail


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds: to the first token, the wait between it and the next, the whole reply."""

    ttft_s: float
    gap_s: float = 0.0
    total_s: float


class PlanReport(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One turn's ledger entry: what was known, foreseen and seen. Bytes, seconds, tokens."""

    shape: str
    forced: bool = False
    reason: str = ""
    first_token_by: str = ""
    instance: str = ""
    predicted: dict[str, Cost] = {}
    # shapes that could not have been chosen, each with the reason
    missing: dict[str, str] = {}
    actual: Cost | None = None
    # actual total minus the lowest foreseen total of another shape, where positive
    regret_s: float = 0.0
    inputs: dict[str, float] = {}
    prompt_tokens: int = 0
    prompt_blocks: int = 0
    edge_cached_blocks: int = 0
    cloud_cached_blocks: int = 0
    shipped_blocks: int = 0
    shipped_bytes: int = 0
    shipped_fp16_bytes: int = 0
    shipped_before_prefill_end_bytes: int = 0
    bridge_tokens: int = 0
    prefill_s: float = 0.0
    # time to first token that is not the model: RPC, template, tokenizer, plan, queueing
    overhead_s: float = 0.0
    offline: bool = False


_decoder = msgspec.msgpack.Decoder(PlanReport)


def with_actual(report: PlanReport, actual: Cost) -> PlanReport:
    """The entry with what happened. Regret: the actual total minus the lowest total foreseen for
    another shape that was possible, where positive: what a better choice would have saved, as far
    as the formulas know.
    """
    others = [
        cost.total_s
        for name, cost in report.predicted.items()
        if name != report.shape and name not in report.missing
    ]
    regret = max(0.0, actual.total_s - min(others)) if others else 0.0
    return msgspec.structs.replace(report, actual=actual, regret_s=regret)


def encode_plan(report: PlanReport) -> bytes:
    return msgspec.msgpack.encode(report)


def decode_plan(data: bytes) -> PlanReport:
    """Raises InvalidArgument where the bytes are no plan report."""
    try:
        return _decoder.decode(data)
    except UNREADABLE as error:
        raise InvalidArgument(f"These bytes are no plan report: {error}.") from error
