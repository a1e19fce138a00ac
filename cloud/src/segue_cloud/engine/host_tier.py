"""Evicted KV blocks, coded in 8 bits and kept within a byte budget until somebody asks again.

Used by the engine thread; `offers` also by others (one look-up in a dictionary).
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from segue_cloud.engine.kv_pages import BlockPages
from segue_contract.errors import BadBlock
from segue_contract.kv.layout import KvBlock
from segue_contract.kv.quantize import decode_block, encode_block
from segue_contract.limits import EngineLimits

STEP = "k8v8"
# The pool is held under this share of its pages, so that a new turn rarely waits for an eviction.
TARGET_SHARE = 0.7
# Blocks coded between two steps; about 2 ms each for the default model.
BLOCKS_PER_STEP = 4
# Weight of the newest measurement, and every how many refusals one is brought back all the same:
# without a new measurement a refusal would be for ever.
_NEW = 0.2
_TRY_AGAIN = 256


@dataclass(slots=True)
class _Kept:
    payload: bytes
    credit: int


class HostTier:
    """Implements `block_pool.Tier`.

    At the budget the block kept longest goes; one that was used before it came here, or brought
    back since, is passed over once per use.

    Args:
        recompute_s: seconds that computing 64 tokens anew takes now; 0.0 while unknown.
        limits: how much time coding may take; beyond it a block that nobody used twice just goes.
    """

    def __init__(
        self,
        pages: BlockPages,
        budget_bytes: int,
        recompute_s: Callable[[], float],
        limits: EngineLimits = EngineLimits(),
    ) -> None:
        self.pages = pages
        self._budget = budget_bytes
        self._limits = limits
        self.recompute_s = recompute_s
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()
        self._refused = 0
        self._allowance_s = math.inf
        self.skipped_blocks = 0
        self.bytes_kept = 0
        self.brought_blocks = 0
        self.dropped_blocks = 0
        self.keep_s = 0.0
        self.bring_s = 0.0

    @property
    def blocks_kept(self) -> int:
        return len(self._kept)

    def keep(self, name: bytes, pages: Sequence[int], credit: int) -> None:
        if name in self._kept:
            self._kept.move_to_end(name)
            return
        if self._allowance_s <= 0 and not credit:
            self.skipped_blocks += 1
            return
        began = time.perf_counter()
        k, v = self.pages.read_block(pages)
        try:
            payload = encode_block(KvBlock(name, "", k, v), STEP)
        except BadBlock:
            return  # numbers that the code cannot hold: computing them anew is exact
        self.file(name, payload, credit)
        seconds = time.perf_counter() - began
        self._allowance_s -= seconds
        self.keep_s = _mean(self.keep_s, seconds)

    def file(self, name: bytes, payload: bytes, credit: int) -> None:
        """Take in a block that is coded, at the cost of others; one larger than all is dropped."""
        while self._kept and self.bytes_kept + len(payload) > self._budget:
            self._drop_one()
        if len(payload) <= self._budget:
            self._kept[name] = _Kept(payload, credit)
            self.bytes_kept += len(payload)

    def at_leisure(self) -> None:
        """Nobody waits: coding may take its time until the next step."""
        self._allowance_s = math.inf

    def stepped(self, seconds: float) -> None:
        """A step took so long: coding may take its share of it."""
        most = self._limits.coding_saved_up_s
        saved = min(self._allowance_s, most)
        self._allowance_s = min(most, saved + self._limits.coding_share * seconds)

    def close(self) -> None:
        """End what runs beside the engine thread; here nothing does."""

    def offers(self, name: bytes) -> bool:
        if name not in self._kept:
            return False
        recompute_s = self.recompute_s()
        if not recompute_s or self.bring_s < recompute_s:
            return True
        self._refused += 1
        return self._refused % _TRY_AGAIN == 0

    def bring(self, name: bytes, pages: Sequence[int]) -> None:
        began = time.perf_counter()
        kept = self._kept[name]
        kept.credit += 1
        self._kept.move_to_end(name)
        block = decode_block(kept.payload, self.pages.geometry, STEP, id=name)
        self.pages.write_block(pages, block)
        self.brought_blocks += 1
        self.bring_s = _mean(self.bring_s, time.perf_counter() - began)

    def _drop_one(self) -> None:
        while True:
            name, kept = self._kept.popitem(last=False)
            if kept.credit == 0:
                self.bytes_kept -= len(kept.payload)
                self.dropped_blocks += 1
                return
            kept.credit -= 1
            self._kept[name] = kept

    def check_integrity(self) -> None:
        """Assert that the budget holds and the bytes are counted right."""
        assert self.bytes_kept == sum(len(kept.payload) for kept in self._kept.values())
        assert self.bytes_kept <= self._budget


def _mean(old: float, new: float) -> float:
    return new if old == 0.0 else old + _NEW * (new - old)
