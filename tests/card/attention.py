"""Attention of decode steps over pages, alone: by torch, which copies the keys together, and by
FlashInfer where its wheel was carried, which reads them where they lie."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec
import numpy as np
import torch

from segue_cloud.engine.attention import Window
from segue_cloud.engine.cuda.attention import GatherAttention, PagedAttention, Rows
from segue_cloud.engine.cuda.flashinfer import FlashInferAttention, why_not
from segue_cloud.engine.cuda.pages import DevicePages
from segue_cloud.engine.cuda.shapes import Shape
from segue_cloud.engine.cuda.transfers import CudaTransfers, DirectTransfers
from segue_contract.limits import KV_PAGE_TOKENS
from segue_contract.model.manifest import ModelGeometry
from tests.bench.harness import Report, median_of
from tests.bench.suites._card_plan import plan_here, synchronize
from tests.bench.suites._profile import profiled

SEED = 9
_LAYERS = 4  # each with pages of its own, so that no cache holds what the next call reads
Attend = Callable[[], torch.Tensor]


def run(report: Report, quick: bool) -> None:
    plan = plan_here(report, quick)
    if plan is None:
        return
    geometry = msgspec.structs.replace(plan.geometry, layers=_LAYERS)
    turn_pages = -(-plan.context // KV_PAGE_TOKENS)
    count = max(plan.batches) * turn_pages
    on_card = plan.device != "cpu"
    transfers = CudaTransfers(plan.device) if on_card else DirectTransfers()
    pages = DevicePages(geometry.kv, count, torch.bfloat16, plan.device, transfers)
    print("kv seed", SEED)
    torch.manual_seed(SEED)
    for cache in (*pages.k, *pages.v):
        cache.normal_()
    tables = np.random.default_rng(SEED).permutation(count).astype(np.int32)
    tables = tables.reshape(-1, turn_pages)
    scratch = pages.scratch_page * KV_PAGE_TOKENS
    gather = GatherAttention(geometry, pages, scratch, Window())
    flash = _flashinfer(report, geometry, pages)
    for batch in plan.batches:
        rows = Rows(tables[:batch], np.full(batch, plan.context, np.int64))
        q = torch.randn(batch, geometry.heads, geometry.head_dim, device=plan.device).bfloat16()
        ours = _timed(report, "torch", gather, rows, q, geometry, plan.device)
        if flash is None:
            continue
        theirs = _timed(report, "flashinfer", flash, rows, q, geometry, plan.device)
        apart = float((ours.float() - theirs.float()).abs().max())
        note = "largest difference of the two, bfloat16"
        report.row(f"attention_apart_{batch}", apart, "", 2e-2, "lower", note)


def _flashinfer(
    report: Report, geometry: ModelGeometry, pages: DevicePages
) -> PagedAttention | None:
    reason = why_not(geometry, torch.bfloat16, pages.k[0].device.type, Window())
    if reason:
        report.missing("FlashInfer", reason)
        return None
    began = time.perf_counter()
    found = FlashInferAttention(geometry, pages)
    seconds = time.perf_counter() - began
    report.row("flashinfer_start_s", seconds, "s", note="its kernels compiled, where they were not")
    return found


def _timed(
    report: Report,
    name: str,
    attention: PagedAttention,
    rows: Rows,
    q: torch.Tensor,
    geometry: ModelGeometry,
    device: str,
) -> torch.Tensor:
    """Microseconds a layer, through the static buffers of a captured step; returns layer 0's."""
    batch, width = rows.tables.shape
    attention.shapes((batch,), width)
    attention.plan(rows, Shape(batch, width))
    outs = [torch.empty_like(q) for _ in range(geometry.layers)]

    def layers() -> None:
        for layer, out in enumerate(outs):
            attention.attend(q, layer, out)
        synchronize(device)

    attention.start()
    us = 1e6 * median_of(layers, repeats=20, warmup=3) / geometry.layers
    read = 2 * int(rows.lengths.sum()) * geometry.kv_heads * geometry.head_dim * 2
    report.row(f"attention_{name}_us_{batch}", us, "us", note="one layer, launched by Python")
    report.row(f"attention_{name}_gb_per_s_{batch}", read / us / 1e3, "GB/s", note="KV read once")
    if batch > 1:
        with profiled(device) as kernels:
            layers()
        report.details[f"profile_attention_{name}_{batch}"] = kernels
    return outs[0]
