"""A model for the compiled step: its weights as panels, its buffers, and its threads."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from segue_cloud.engine.attention import Window, rope_tables
from segue_cloud.engine.native.matrix_units import MatrixUnits
from segue_cloud.engine.native.memory import LOGIT_ROWS, ROWS, SPANS, Memory
from segue_cloud.engine.native.pages import NativePages
from segue_cloud.engine.native.panels import (
    Numbers,
    interleaved,
    pack,
    pairs_of,
    panels_of,
    reserve,
    size_of,
)
from segue_cloud.engine.native.step import (
    FFN_NORM,
    GATE_UP,
    NORM,
    OUT,
    PHASES,
    QKV,
    ROTATE,
    build_step,
)
from segue_cloud.engine.native.team import (
    CONTROL_SIZE,
    PLACE_SIZE,
    STOP,
    aligned_bytes,
    announce,
    counters,
    open_place,
)
from segue_cloud.engine.native.tiles import PANEL, TILE_ROWS
from segue_cloud.engine.step_input import NativeInput
from segue_cloud.engine.weights import LayerTensors
from segue_contract.limits import KV_PAGE_TOKENS
from segue_contract.model.manifest import ModelGeometry


class TensorSource(Protocol):
    """What the panels are made from (`weights.Tensors`), bfloat16 on the CPU."""

    def layers(self) -> Iterable[LayerTensors]: ...

    def final_norm(self) -> torch.Tensor: ...

    def embed(self) -> torch.Tensor: ...

    def head(self, embed: torch.Tensor) -> torch.Tensor: ...


class NativeModel:
    """Weights as panels, the buffers of a step, and the threads. One call at a time.

    Args:
        tensors: read one layer at a time; none is kept.
        tables: the page tables that all steps use, `[max_batch, pages]`: one row per turn, and
            no step samples more rows than that.
        max_rows: of a step.
        units: what computes the linear layers of large steps where it is faster at that.
    """

    def __init__(
        self,
        geometry: ModelGeometry,
        tensors: TensorSource,
        pages: NativePages,
        window: Window,
        threads: int,
        tables: NDArray[np.int32],
        max_rows: int,
        units: MatrixUnits | None = None,
    ) -> None:
        self._geometry = g = geometry
        self._threads = threads
        self._units = units
        self._enter = build_step()
        self._place = np.zeros(PLACE_SIZE, np.int64)
        self._control = np.zeros(CONTROL_SIZE, np.int64)
        open_place(self._place)
        weights, places, ends, norms = _pack_all(geometry, tensors)
        cos, sin = rope_tables(geometry)
        q = g.heads * g.head_dim
        lines = max(TILE_ROWS, g.heads // g.kv_heads)
        sizes = [0, 0, 0, g.hidden, g.ffn, g.vocab, g.heads, g.kv_heads, g.head_dim]
        context = (tables.shape[1] + 1) * KV_PAGE_TOKENS  # scores are made two pages at a time

        def wide(outputs: int) -> int:  # products are written a whole panel at a time
            return PANEL * panels_of(outputs)

        def narrow(rows: int, width: int) -> Numbers:
            return np.zeros((rows, 2 * pairs_of(width)), np.uint16)

        def zeros(*shape: int, dtype: type = np.int64) -> NDArray[Any]:
            return np.zeros(shape, dtype)

        self._memory = Memory(
            weights=weights,
            places=places,
            ends=ends,
            norms=norms,
            cos=cos.numpy(),
            sin=sin.numpy(),
            pages=pages.bits,
            flat_pages=pages.bits.reshape(-1),
            sizes=np.array(sizes, np.int64),
            tokens=zeros(max_rows),
            positions=zeros(max_rows),
            slots=zeros(max_rows),
            spans=zeros(max_rows, 4, dtype=np.int32),
            tables=tables,
            chosen=zeros(len(tables)),
            reals=np.array([g.norm_eps, g.head_dim**-0.5], np.float32),
            window=np.array([window.tokens, window.sinks], np.int64),
            residual=zeros(max_rows, wide(g.hidden), dtype=np.float32),
            x=narrow(max_rows, g.hidden),
            qkv=zeros(max_rows, wide(q + 2 * g.kv_heads * g.head_dim), dtype=np.float32),
            queries=narrow(max_rows, q),
            attended=narrow(max_rows, q),
            act=narrow(max_rows, wide(g.ffn)),
            logits=zeros(len(tables), wide(g.vocab), dtype=np.float32),
            counters=counters(g.layers * PHASES + 2),
            factors=_aligned(threads, lines),
            scratch=_aligned(threads, TILE_ROWS, PANEL),
            scores=_aligned(threads, lines, context),
            weigh=_aligned(threads, lines, context // 2).view(np.uint16),
            listed=zeros(threads, 3, tables.shape[1] + 1),
            tails=_aligned(threads, KV_PAGE_TOKENS * g.head_dim // 2).view(np.uint16),
        )
        self._helpers: list[threading.Thread] = []

    def start(self) -> None:
        """Compile or load the step's code, then start the other threads."""
        # With words of their own: no step that somebody could take for one to compute.
        self._enter(self._place, np.zeros_like(self._control), self._memory, 0, 1, 0, 0)
        for me in range(1, self._threads):
            helper = threading.Thread(
                target=self._enter,
                args=(self._place, self._control, self._memory, me, self._threads, 0, 0),
                name=f"segue-step-{me}",
                daemon=True,
            )
            helper.start()
            self._helpers.append(helper)

    def close(self) -> None:
        """End the threads; no step may follow."""
        self._control[STOP] = 1
        announce(self._place, self._control)
        for helper in self._helpers:
            helper.join()
        self._helpers.clear()

    def step(self, step: NativeInput) -> NDArray[np.float32]:
        """Logits `[N, vocab]` of the chosen rows, valid until the next step."""
        m = self._memory
        rows, spans, chosen = len(step.tokens), len(step.spans), len(step.chosen)
        m.sizes[ROWS], m.sizes[SPANS], m.sizes[LOGIT_ROWS] = rows, spans, chosen
        m.tokens[:rows] = step.tokens
        m.positions[:rows] = step.positions
        m.slots[:rows] = step.slots
        m.spans[:spans] = step.spans
        m.chosen[:chosen] = step.chosen
        last = PHASES * self._geometry.layers
        if self._units is None or rows < self._units.rows:
            self._run(0, last)
        else:
            self._run_with(self._units, rows)
        if chosen:
            self._run(last, last + 2)
        logits: NDArray[np.float32] = m.logits[:chosen, : self._geometry.vocab]
        return logits

    def _run(self, first: int, last: int) -> None:
        self._enter(self._place, self._control, self._memory, 0, self._threads, first, last)

    def _run_with(self, units: MatrixUnits, rows: int) -> None:
        """All layers, with their linear layers by `units`."""
        m, g = self._memory, self._geometry
        hidden, ffn, q = g.hidden, g.ffn, g.heads * g.head_dim
        torch.set_num_threads(self._threads)
        x, act, attended = (units.view(a[:rows]) for a in (m.x, m.act, m.attended))
        qkv, residual = torch.from_numpy(m.qkv[:rows]), torch.from_numpy(m.residual[:rows])
        for index, layer in enumerate(units.layers):
            first = index * PHASES
            self._run(first + NORM, first + QKV)
            made = layer.qkv(x[:, :hidden])
            qkv[:, : made.shape[1]] = made
            self._run(first + ROTATE, first + OUT)
            residual[:, :hidden] += layer.out(attended[:, :q])
            self._run(first + FFN_NORM, first + GATE_UP)
            both = layer.gate_up(x[:, :hidden])
            torch.mul(torch.nn.functional.silu(both[:, :ffn]), both[:, ffn:], out=act[:, :ffn])
            residual[:, :hidden] += layer.down(act[:, :ffn])
        torch.set_num_threads(1)  # as the runner left it


def _pack_all(
    geometry: ModelGeometry, tensors: TensorSource
) -> tuple[Numbers, NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Everything that a step reads and never writes: weights, places, ends, norms."""
    g = geometry
    q, kv = g.heads * g.head_dim, g.kv_heads * g.head_dim
    sizes = [
        size_of(q + 2 * kv, g.hidden),
        size_of(g.hidden, q),
        panels_of(2 * g.ffn) * size_of(PANEL, g.hidden),
        size_of(g.hidden, g.ffn),
    ]
    head = size_of(g.vocab, g.hidden)
    numbers = g.layers * sum(sizes) + head * (1 if g.tied_embeddings else 2)
    weights = reserve(numbers, huge=True)
    places = np.zeros((g.layers, 4), np.int64)
    norms = np.zeros((2 * g.layers + 1, g.hidden), np.float32)
    at = 0

    def put(weight: torch.Tensor, size: int) -> int:
        nonlocal at
        pack(weight, weights[at : at + size])
        at += size
        return at - size

    for index, layer in enumerate(tensors.layers()):
        parts = (layer.qkv, layer.out, interleaved(layer.gate, layer.up), layer.down)
        for part, (weight, size) in enumerate(zip(parts, sizes, strict=True)):
            places[index, part] = put(weight, size)
        norms[2 * index] = layer.input_norm.numpy()
        norms[2 * index + 1] = layer.ffn_norm.numpy()
    norms[-1] = tensors.final_norm().numpy()
    table = tensors.embed()
    embed = put(table, head)
    ends = [embed, embed if g.tied_embeddings else put(tensors.head(table), head)]
    return weights, places, np.array(ends, np.int64), norms


def _aligned(*shape: int) -> NDArray[np.float32]:
    """float32 zeros whose first byte begins a cache line."""
    return aligned_bytes(4 * int(np.prod(shape))).view(np.float32).reshape(shape)
