"""Blocks of KV between the card's pages and the host: through pinned memory, beside a bare copy;
through the tier that keeps evicted blocks; and the codec alone on the host. MB/s are megabytes of
the pool's bfloat16 KV per second throughout."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from segue_cloud.engine.cuda.host_tier import PinnedTier
from segue_cloud.engine.cuda.pages import DevicePages
from segue_cloud.engine.cuda.transfers import CudaTransfers, DirectTransfers
from segue_cloud.engine.host_tier import STEP
from segue_contract.kv.layout import KvBlock
from segue_contract.kv.quantize import decode_block, encode_block
from segue_contract.limits import MIB
from tests.bench.harness import Report, median_of
from tests.bench.suites._card_plan import synchronize
from tests.support.shapes import LLAMA_8B
from tests.support.tiny_llama import TINY

SEED = 8
_PAGES_PER_BLOCK = 4


def run(report: Report, quick: bool) -> None:
    on_card = torch.cuda.is_available()
    device = "cuda" if on_card else "cpu"
    geometry = LLAMA_8B if on_card else TINY
    count, rounds = (4, 1) if quick else (48, 3)
    transfers = CudaTransfers(device) if on_card else DirectTransfers()
    pages = DevicePages(geometry.kv, count * _PAGES_PER_BLOCK, torch.bfloat16, device, transfers)
    print("kv seed", SEED)
    rng = np.random.default_rng(SEED)
    shape = (geometry.layers, geometry.kv_heads, 64, geometry.head_dim)
    k, v = (rng.standard_normal(shape, np.float32) for _ in range(2))
    block = KvBlock(b"block", "", k, v)
    block_mb = 2 * k.size * 2 / 1e6
    report.row("kv_block_mb", block_mb, "MB", note="64 tokens in bfloat16")
    places = [tuple(range(4 * i, 4 * i + 4)) for i in range(count)]

    def per_s(work: Callable[[], object]) -> float:
        return count * block_mb / median_of(work, repeats=rounds, warmup=1)

    _bare_copies(report, device, 4 * MIB if quick else 256 * MIB)
    note = "float32 blocks to bfloat16 pages, 8 buffers"
    report.row("kv_write_mb_per_s", per_s(lambda: _write(pages, places, block)), "MB/s", note=note)
    note = "bfloat16 pages to float32 arrays, the next copy under way"
    report.row("kv_read_mb_per_s", per_s(lambda: _read(pages, places)), "MB/s", note=note)
    _check(pages, places[-1], block)
    _tier(report, pages, places, block_mb)
    _codec(report, pages, block, block_mb, rounds)


def _bare_copies(report: Report, device: str, size: int) -> None:
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=device != "cpu").random_()
    there = torch.empty(size, dtype=torch.uint8, device=device)
    for name, to, source in (("up", there, pinned), ("down", pinned, there)):

        def copy(to: torch.Tensor = to, source: torch.Tensor = source) -> None:
            to.copy_(source, non_blocking=True)
            synchronize(device)

        speed = size / 1e6 / median_of(copy, repeats=5, warmup=1)
        report.row(f"kv_bare_copy_{name}_mb_per_s", speed, "MB/s", note="pinned memory, one piece")


def _write(pages: DevicePages, places: Sequence[tuple[int, ...]], block: KvBlock) -> None:
    for place in places:
        pages.write_block(place, block)
    synchronize(str(pages.k[0].device))


def _read(pages: DevicePages, places: Sequence[tuple[int, ...]]) -> None:
    """One copy ahead of the reader, as the tier's thread has it."""
    pending = pages.start_read(places[0])
    for place in [*places[1:], None]:
        following = None if place is None else pages.start_read(place)
        assert pending is not None, "fewer are under way than there are buffers"
        pending.arrays()
        pages.give_back(pending)
        pending = following


def _check(pages: DevicePages, place: Sequence[int], block: KvBlock) -> None:
    """What was written comes back, rounded to bfloat16."""
    for found, sent in zip(pages.read_block(place), (block.k, block.v), strict=True):
        rounded = torch.from_numpy(sent).bfloat16().float().numpy()
        assert np.array_equal(found, rounded), "a block came back otherwise than it went"


def _tier(
    report: Report, pages: DevicePages, places: Sequence[tuple[int, ...]], block_mb: float
) -> None:
    """The engine's second tier: blocks out, coded by its thread, and back in."""
    tier = PinnedTier(pages, 4 << 30, lambda: 0.0)
    names = [number.to_bytes(16, "big") for number in range(len(places))]
    try:
        began = time.perf_counter()
        for name, place in zip(names, places, strict=True):
            tier.keep(name, place, 0)
            if len(names) > 8:
                tier.settle()  # else a full set of buffers means a dropped block
        tier.settle()
        kept_s = time.perf_counter() - began
        assert tier.blocks_kept == len(places)
        began = time.perf_counter()
        for name, place in zip(names, places, strict=True):
            tier.bring(name, place)
        synchronize(str(pages.k[0].device))
        brought_s = time.perf_counter() - began
    finally:
        tier.close()
    total = block_mb * len(places)
    note = f"copied and coded in {STEP}, one thread"
    report.row("kv_tier_keep_mb_per_s", total / kept_s, "MB/s", note=note)
    report.row("kv_tier_bring_mb_per_s", total / brought_s, "MB/s", note="decoded and copied")


def _codec(
    report: Report, pages: DevicePages, block: KvBlock, block_mb: float, rounds: int
) -> None:
    payload = encode_block(block, STEP)
    encode_s = median_of(lambda: encode_block(block, STEP), repeats=3 * rounds)
    decode_s = median_of(lambda: decode_block(payload, pages.geometry, STEP), repeats=3 * rounds)
    report.row("kv_encode_mb_per_s", block_mb / encode_s, "MB/s", note=f"{STEP} alone, one core")
    report.row("kv_decode_mb_per_s", block_mb / decode_s, "MB/s", note=f"{STEP} alone, one core")
