"""Speeds of the engine, learned from its own steps. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Weight of the newest step: a change of load shows after some ten steps.
_NEW = 0.1


@dataclass
class Rates:
    """Exponential means; 0.0 before the first measurement."""

    prefill_tokens_per_s: float = 0.0
    decode_step_s: float = 0.0
    busy_s: float = 0.0
    steps: int = 0

    def observe(self, prompt_tokens: int, decode_rows: int, seconds: float) -> None:
        """Take in one step. In a mixed one, decoding is taken to cost what it usually does."""
        self.steps += 1
        self.busy_s += seconds
        if prompt_tokens == 0:
            self.decode_step_s = _mean(self.decode_step_s, seconds)
            return
        decode_s = self.decode_step_s if decode_rows else 0.0
        prefill_s = max(seconds - decode_s, seconds / 2)
        self.prefill_tokens_per_s = _mean(self.prefill_tokens_per_s, prompt_tokens / prefill_s)

    def queue_s(
        self, prefill_backlog: int, decode_backlog: Sequence[int], waiting: int, max_batch: int
    ) -> float:
        """About how long a turn that arrives now waits before its own prompt is computed."""
        wait = 0.0
        if self.prefill_tokens_per_s > 0:
            wait = prefill_backlog / self.prefill_tokens_per_s
        ahead = len(decode_backlog) + waiting + 1 - max_batch
        if ahead > 0 and decode_backlog:
            # Seats come free as turns end; most end before their bound, so this is a high guess.
            order = sorted(decode_backlog)
            wait += order[min(ahead, len(order)) - 1] * self.decode_step_s
        return wait


def _mean(old: float, new: float) -> float:
    return new if old == 0.0 else old + _NEW * (new - old)
