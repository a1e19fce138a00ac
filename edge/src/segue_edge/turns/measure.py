"""What happened in a turn, measured, and the ledger entry made of it."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from segue_contract.kv.layout import KvGeometry
from segue_contract.plan import Cost, PlanReport, with_actual


class Measure:
    """Times in seconds since the request arrived; counts of tokens, blocks and bytes."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._started = now()
        self.first_token_s: float | None = None
        self.second_token_s: float | None = None
        self.first_token_by = ""
        self.model_s = 0.0  # prefill and sampling of an edge-made first token
        self.edge_cached_blocks = 0
        self.cloud_cached_blocks = 0
        self.shipped_blocks = 0
        self.shipped_bytes = 0
        self.shipped_before_prefill_end = 0
        self.bridge_tokens = 0
        self.offline = False
        self.phases: dict[str, float] = {}

    @property
    def elapsed_s(self) -> float:
        return self._now() - self._started

    def mark(self, phase: str) -> None:
        """Note when a phase was over, for the log."""
        self.phases[phase] = round(self.elapsed_s, 5)

    def note_shipped(self, blocks: int, size: int) -> None:
        """So many blocks, `size` bytes on the wire, went up so far."""
        self.shipped_blocks, self.shipped_bytes = blocks, size

    def saw_tokens(self, count: int, made_by: str) -> None:
        """Tokens were put before the device."""
        if self.first_token_s is None:
            self.first_token_s = self.elapsed_s
            self.first_token_by = made_by
            count -= 1
        if count > 0 and self.second_token_s is None:
            self.second_token_s = self.elapsed_s

    @property
    def overhead_s(self) -> float:
        """Time to first token that was not the model: meaningful where the edge made it."""
        if self.first_token_s is None or self.first_token_by != "edge":
            return 0.0
        return max(0.0, self.first_token_s - self.model_s)

    def complete(self, report: PlanReport, geometry: KvGeometry) -> PlanReport:
        """`report` with everything that is known by now; before the first token that is no more
        than the time so far, and `first_token_by` is empty."""
        first = self.first_token_s or self.elapsed_s
        gap = (self.second_token_s or first) - first
        filled = msgspec.structs.replace(
            report,
            first_token_by=self.first_token_by,
            edge_cached_blocks=self.edge_cached_blocks,
            cloud_cached_blocks=self.cloud_cached_blocks,
            shipped_blocks=self.shipped_blocks,
            shipped_bytes=self.shipped_bytes,
            shipped_fp16_bytes=self.shipped_blocks * geometry.fp16_bytes_per_block,
            shipped_before_prefill_end_bytes=self.shipped_before_prefill_end,
            bridge_tokens=self.bridge_tokens,
            prefill_s=self.model_s,
            overhead_s=self.overhead_s,
            offline=self.offline,
        )
        actual = Cost(ttft_s=first, gap_s=gap, total_s=self.elapsed_s)
        return with_actual(filled, actual)
