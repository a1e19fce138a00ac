"""The steps of a run, the most valuable first. Pure."""

from __future__ import annotations

from dataclasses import dataclass

TOTAL_LIMIT_S = 360.0  # of all steps: a borrowed card is there for minutes
CPU_PATIENCE = 3  # times as long where there is none


@dataclass(frozen=True)
class Step:
    """`name`: of its module and its JSON. `limit_s`: then its process is ended; the rows it has
    by then count. `flashinfer`: whether a carried FlashInfer may be used, which compiles kernels
    for a minute: the other steps measure what runs without it."""

    name: str
    title: str
    limit_s: float
    flashinfer: bool = False


STEPS = (
    Step("exactness", "the tokens of transformers", 70),
    Step("decode", "decode beside the memory roof", 115),
    Step("prefill", "prefill beside the compute roof", 40),
    Step("kv", "KV to the host and back", 25),
    Step("attention", "attention, FlashInfer's too", 65, flashinfer=True),
    Step("gpu_tests", "tests/gpu", 45),
)


def limit_of(step: Step, spent_s: float, total_s: float = TOTAL_LIMIT_S) -> float:
    """Seconds that a step gets when so many are spent; 0.0: too few to begin it."""
    left = min(step.limit_s, total_s - spent_s)
    return left if left >= 5.0 else 0.0
