"""What the demo's events say in numbers. Pure: values in, values out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from segue.local.device import Happened
from segue_contract.limits import KV_BLOCK_TOKENS
from segue_contract.plan import PlanReport, Shape
from segue_contract.sync.ops import Usage


@dataclass
class Seen:
    """A turn's reply as one device got it: per token its text and when it came."""

    pieces: list[str] = field(default_factory=list)
    at: list[float] = field(default_factory=list)
    made_by: list[str] = field(default_factory=list)
    ended_at: float = 0.0
    reason: str = ""

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def apply(self, event: Happened) -> None:
        """Tokens that are known already keep their first time; a rewind forgets."""
        if event.event == "tokens":
            for number, piece in enumerate(event.pieces, start=event.index):
                if number == len(self.pieces):
                    self.pieces.append(piece)
                    self.at.append(event.at)
                    self.made_by.append(event.made_by)
        elif event.event == "rewound":
            del self.pieces[event.index :], self.at[event.index :], self.made_by[event.index :]
        elif event.event == "ended":
            self.ended_at, self.reason = event.at, event.reason

    @property
    def tokens_per_s(self) -> float:
        """After the first token, so that the wait for it does not count."""
        if len(self.at) < 2 or self.at[-1] <= self.at[0]:
            return 0.0
        return (len(self.at) - 1) / (self.at[-1] - self.at[0])

    def made(self, by: str) -> int:
        """How many tokens `by` ("edge" or "cloud") made."""
        return self.made_by.count(by)


def delays_s(first: Seen, second: Seen) -> list[float]:
    """Per token that both saw: how far apart in time they had it, in seconds."""
    return [abs(there - here) for here, there in zip(first.at, second.at, strict=False)]


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all values do not exceed; 0.0 of none."""
    if not values:
        return 0.0
    ordered = sorted(values)
    rank = math.ceil(share * len(ordered) - 1e-9)  # 0.5 * 4 is rank 2, whatever floats say
    return ordered[max(rank, 1) - 1]


@dataclass
class TurnNumbers:
    """One turn, measured. Times in seconds; `delays`: how far apart both devices had each token."""

    asked_by: str
    ttft_s: float
    first_token_by: str
    tokens: int
    edge_tokens: int
    tokens_per_s: float
    delays: list[float]
    plan: PlanReport
    usage: Usage = field(default_factory=Usage)

    @property
    def cloud_reused_blocks(self) -> int:
        """Whole blocks of the prompt that the cloud had, without those shipped for this turn."""
        cached = self.usage.cloud_cached_tokens // KV_BLOCK_TOKENS - self.plan.shipped_blocks
        return max(self.plan.cloud_cached_blocks, cached)

    @property
    def edge_reused_blocks(self) -> int:
        """Whole blocks of the prompt that the edge had; 0 where it computed nothing."""
        if self.plan.shape == Shape.TEXT:
            return 0
        cached = self.usage.edge_cached_tokens // KV_BLOCK_TOKENS
        return max(self.plan.edge_cached_blocks, cached)

    @property
    def prompt_blocks(self) -> int:
        return self.plan.prompt_blocks or self.usage.prompt_tokens // KV_BLOCK_TOKENS

    def rows(self, number: int) -> Iterable[Row]:
        prefix = f"turn{number}_"
        plan = self.plan
        yield Row(prefix + "ttft_ms", self.ttft_s * 1000, "ms")
        yield Row(prefix + "overhead_ms", plan.overhead_s * 1000, "ms")
        yield Row(prefix + "tokens", self.tokens, "tokens")
        yield Row(prefix + "edge_tokens", self.edge_tokens, "tokens")
        yield Row(prefix + "tokens_per_s", self.tokens_per_s, "tokens/s")
        yield Row(prefix + "device_to_device_ms_p50", percentile(self.delays, 0.50) * 1000, "ms")
        yield Row(prefix + "device_to_device_ms_p99", percentile(self.delays, 0.99) * 1000, "ms")
        yield Row(prefix + "kv_shipped_bytes", plan.shipped_bytes, "bytes")
        yield Row(prefix + "kv_shipped_fp16_bytes", plan.shipped_fp16_bytes, "bytes")
        yield Row(prefix + "prompt_tokens", self.usage.prompt_tokens, "tokens")
        yield Row(prefix + "prompt_blocks", self.prompt_blocks, "blocks")
        yield Row(prefix + "edge_reused_blocks", self.edge_reused_blocks, "blocks")
        yield Row(prefix + "cloud_reused_blocks", self.cloud_reused_blocks, "blocks")


@dataclass(frozen=True)
class Row:
    """One number of a report."""

    name: str
    value: float
    unit: str


@dataclass
class DemoNumbers:
    """All that the demo measured."""

    turns: list[TurnNumbers]
    start_s: float
    killed_after_tokens: int
    same_text: bool

    @property
    def delays(self) -> list[float]:
        return [delay for turn in self.turns for delay in turn.delays]

    def rows(self) -> list[Row]:
        rows = [
            Row("start_s", self.start_s, "s"),
            Row("killed_after_tokens", self.killed_after_tokens, "tokens"),
            Row("same_text", float(self.same_text), "bool"),
            Row("device_to_device_ms_p50", percentile(self.delays, 0.50) * 1000, "ms"),
            Row("device_to_device_ms_p99", percentile(self.delays, 0.99) * 1000, "ms"),
            Row("device_to_device_tokens", len(self.delays), "tokens"),
        ]
        for number, turn in enumerate(self.turns, start=1):
            rows += turn.rows(number)
        return [Row(row.name, round(row.value, 3), row.unit) for row in rows]
