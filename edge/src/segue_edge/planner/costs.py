"""What each shape of a turn would cost: ARCHITECTURE.md, The costs of a plan.

Notation: R round trip, B goodput, q the cloud's queue, t_edge(x) and t_cloud(x) the time to prefill
x tokens there, KV(x) the bytes of x tokens' KV on the wire. All times in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

from segue_contract.errors import InvalidArgument
from segue_contract.kv.layout import BLOCK_TOKENS
from segue_contract.limits import EDGE_DECODE_SHARE
from segue_contract.plan import Cost, Shape


@dataclass(frozen=True, kw_only=True)
class PlanInputs:
    """Everything the choice depends on. Tokens, seconds, bytes; all measured or estimated.

    `edge_queue_s` is the prefill work ahead of this turn on the edge, `edge_decoding` the replies
    that are decoded there now; `link_backlog_bytes` what other turns have yet to send.
    `reply_tokens` is the expected length of the reply.
    """

    prompt_tokens: int
    reply_tokens: float
    edge_cached_tokens: int = 0
    cloud_cached_tokens: int = 0
    edge_prefill_tokens_per_s: float
    edge_decode_step_s: float
    edge_queue_s: float = 0.0
    edge_decoding: int = 0
    cloud_prefill_tokens_per_s: float
    cloud_decode_step_s: float
    cloud_queue_s: float = 0.0
    rtt_s: float
    goodput_bytes_per_s: float
    link_backlog_bytes: float = 0.0
    kv_bytes_per_token: float
    cloud_reachable: bool = True
    recipe_accepted: bool = True

    def __post_init__(self) -> None:
        positive = {
            "prompt_tokens": self.prompt_tokens,
            "reply_tokens": self.reply_tokens,
            "edge_prefill_tokens_per_s": self.edge_prefill_tokens_per_s,
            "edge_decode_step_s": self.edge_decode_step_s,
            "cloud_prefill_tokens_per_s": self.cloud_prefill_tokens_per_s,
            "cloud_decode_step_s": self.cloud_decode_step_s,
            "goodput_bytes_per_s": self.goodput_bytes_per_s,
            "kv_bytes_per_token": self.kv_bytes_per_token,
        }
        for name, value in positive.items():
            if not value > 0:  # also catches NaN
                raise InvalidArgument(f"The planner needs {name} above 0, not {value}.")

    @property
    def full_blocks(self) -> int:
        return self.prompt_tokens // BLOCK_TOKENS

    @property
    def edge_prefill_tokens(self) -> int:
        """At least one: the logits of the last position are never cached."""
        return max(1, self.prompt_tokens - self.edge_cached_tokens)

    @property
    def cloud_prefill_tokens(self) -> int:
        return max(1, self.prompt_tokens - self.cloud_cached_tokens)

    @property
    def tail_tokens(self) -> int:
        """Prompt tokens after the last full block: the cloud computes their KV itself."""
        return self.prompt_tokens - self.full_blocks * BLOCK_TOKENS

    @property
    def ship_tokens(self) -> int:
        """Tokens in full blocks that the cloud lacks."""
        return max(0, self.full_blocks * BLOCK_TOKENS - self.cloud_cached_tokens)

    @property
    def ship_bytes(self) -> float:
        return self.ship_tokens * self.kv_bytes_per_token

    @property
    def edge_share(self) -> float:
        """Of the edge's time for prompts: replies that are decoded there take the rest."""
        return 1.0 - EDGE_DECODE_SHARE if self.edge_decoding else 1.0

    @property
    def edge_ttft_s(self) -> float:
        """Until the edge has prefilled this prompt, behind those that wait already."""
        own_s = self.edge_prefill_tokens / self.edge_prefill_tokens_per_s
        return (self.edge_queue_s + own_s) / self.edge_share

    @property
    def edge_step_s(self) -> float:
        """Between two tokens of this reply on the edge: the others take turns with it."""
        return self.edge_decode_step_s * (1 + self.edge_decoding)

    def as_numbers(self) -> dict[str, float]:
        """For the ledger: every input as a number."""
        return {name: float(value) for name, value in vars(self).items()}


@dataclass(frozen=True)
class Foreseen:
    """A shape's cost, the tokens that the edge's quantised model would decode for it, and, for
    a split, how many prompt tokens the edge would prefill."""

    cost: Cost
    edge_tokens: float = 0.0
    split_at: int = 0


def edge_cost(i: PlanInputs) -> Foreseen:
    """All of it on the edge: t_edge(n), then the edge's own decode rate."""
    ttft = i.edge_ttft_s
    total = ttft + _rest(i) * i.edge_step_s
    cost = Cost(ttft_s=ttft, gap_s=i.edge_step_s, total_s=total)
    return Foreseen(cost, edge_tokens=i.reply_tokens)


def text_cost(i: PlanInputs) -> Foreseen:
    """Token ids go up: R + q + t_cloud(n), then the cloud's decode rate."""
    ttft = i.rtt_s + i.cloud_queue_s + i.cloud_prefill_tokens / i.cloud_prefill_tokens_per_s
    total = ttft + _rest(i) * i.cloud_decode_step_s
    return Foreseen(Cost(ttft_s=ttft, gap_s=i.cloud_decode_step_s, total_s=total))


def ship_cost(i: PlanInputs) -> Foreseen:
    """KV goes up while the edge prefills, and the first token comes from the edge.

    gap = max(0, KV/B - t_edge) + R + q + t_cloud(tail) + step. The bridge fills it: the user feels
    no more than one edge step, and bridged tokens are not decoded again. Their credit is capped at
    the cloud's own pace, so that a slower link never looks cheaper (an edge may decode faster).
    """
    ttft = i.edge_ttft_s
    wire = (i.link_backlog_bytes + i.ship_bytes) / i.goodput_bytes_per_s
    gap = (
        max(0.0, wire - ttft)
        + i.rtt_s
        + i.cloud_queue_s
        + i.tail_tokens / i.cloud_prefill_tokens_per_s
        + i.cloud_decode_step_s
    )
    rest = _rest(i)
    bridge = min(rest, gap / i.edge_step_s)
    credit = bridge * min(i.cloud_decode_step_s, i.edge_step_s)
    felt = min(gap, i.edge_step_s)
    total = ttft + gap + rest * i.cloud_decode_step_s - credit
    return Foreseen(Cost(ttft_s=ttft, gap_s=felt, total_s=total), edge_tokens=1.0 + bridge)


def split_cost(i: PlanInputs) -> Foreseen:
    """The head's KV goes up while the cloud prefills the tail after it: foreseen, not yet run.

    max(t_edge(x), KV(x)/B) + t_cloud(n - x), with x the block boundary that minimises it.
    """
    best: Foreseen | None = None
    for block in range(i.full_blocks + 1):
        x = block * BLOCK_TOKENS
        on_edge = max(0, x - i.edge_cached_tokens) / i.edge_prefill_tokens_per_s
        sent = max(0, x - i.cloud_cached_tokens) * i.kv_bytes_per_token
        wire = (i.link_backlog_bytes + sent) / i.goodput_bytes_per_s if sent else 0.0
        head = max((i.edge_queue_s + on_edge) / i.edge_share, wire) if x else 0.0
        rest_of_prompt = max(1, i.prompt_tokens - max(x, i.cloud_cached_tokens))
        ttft = head + i.rtt_s + i.cloud_queue_s + rest_of_prompt / i.cloud_prefill_tokens_per_s
        if best is None or ttft < best.cost.ttft_s:
            total = ttft + _rest(i) * i.cloud_decode_step_s
            cost = Cost(ttft_s=ttft, gap_s=i.cloud_decode_step_s, total_s=total)
            best = Foreseen(cost, split_at=x)
    assert best is not None
    return best


def foresee(i: PlanInputs) -> dict[Shape, Foreseen]:
    """The cost of every shape, also of those that cannot be chosen now."""
    return {
        Shape.EDGE: edge_cost(i),
        Shape.SHIP: ship_cost(i),
        Shape.TEXT: text_cost(i),
        Shape.SPLIT: split_cost(i),
    }


def _rest(i: PlanInputs) -> float:
    """Reply tokens after the first."""
    return max(0.0, i.reply_tokens - 1.0)
