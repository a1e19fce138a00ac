"""The small operations of a Llama step as fused CPU kernels, compiled once by numba.

torch multiplies matrices well; what lies between two multiplications would cost it five to ten
calls a layer, and its attention cannot read a page table. These four kernels do that work in one
pass each and read the KV where it lies: nothing is copied or expanded per step.

bfloat16 numbers travel as their bits in uint16 and are widened by a shift; sums are in float32.
Compiled code is cached in the user's cache folder, so only the first start pays (some seconds).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import numba
import numpy as np

from segue_cloud.engine.compiled import Function
from segue_cloud.engine.compiled import exp as _exp
from segue_cloud.engine.compiled import load as _load
from segue_cloud.engine.compiled import store as _store
from segue_contract.limits import KV_PAGE_TOKENS

# Below this many multiply-adds a kernel runs on the calling thread: about 10 microseconds, which
# is what waking another thread costs.
_SERIAL_WORK = 50_000


class Kernel:
    """One function, compiled for one thread and for many; the work of a call decides."""

    def __init__(self, function: Function) -> None:
        self._serial = _compile(function, parallel=False)
        self._parallel = _compile(function, parallel=True)

    def __call__(self, work: int, *args: Any) -> None:
        """`work`: about how many multiply-adds the call takes."""
        (self._serial if work < _SERIAL_WORK else self._parallel)(*args)

    def load(self, *args: Any) -> None:
        """Run both forms once, so that neither is loaded or compiled in the middle of a turn."""
        self._serial(*args)
        self._parallel(*args)


def _compile(function: Function, *, parallel: bool) -> Any:
    # numba's cache tells functions apart by their qualified names, not by how they are compiled.
    assert isinstance(function, FunctionType)
    code, closure = function.__code__, function.__closure__
    twin = FunctionType(code, function.__globals__, function.__name__, None, closure)
    twin.__qualname__ = f"{function.__qualname__}.{'parallel' if parallel else 'serial'}"
    twin.__module__ = function.__module__
    return numba.njit(parallel=parallel, fastmath=True, nogil=True, cache=True)(twin)


_PAGE = KV_PAGE_TOKENS


@dataclass(frozen=True)
class Kernels:
    """Compiled functions, each called with its work (see `Kernel`) before the arguments below.

    Arrays are C-contiguous; `store` is uint16 (bfloat16 bits) or float32.

    add_norm(residual f32[T,H], delta store[T,H], add bool, weight f32[H], eps, out store[T,H])
        residual += delta (if add); out = RMSNorm(residual) * weight
    rope_store(qkv store[T,(Q+2K)*D], positions i64[T], slots i64[T], cos/sin f32[C,D/2],
               k/v store[K,slots,D])
        rotates q and k in place (rotate-half, as Hugging Face's Llama) and writes k, v
    attend(qkv, k, v, tables i32[S,P], rows i32[R,3] (qkv row, table, length), scale, window, sinks,
           out)
        out[row] = softmax(q k^T * scale) v over the first `length` tokens of a page table; where
        `window` is not 0, over the last `window` of them and the first `sinks`
    silu_mul(gate_up store[T,2F], out store[T,F])   silu(gate) * up
    refine(logits f32[T,V], hidden f32[T,H], head store[V,H], margin)
        logits within `margin` of their row's best are computed anew in float32
    """

    add_norm: Kernel
    rope_store: Kernel
    attend: Kernel
    silu_mul: Kernel
    refine: Kernel

    def set_threads(self, threads: int) -> None:
        """Threads that a kernel uses when the calling thread calls it."""
        numba.set_num_threads(min(threads, numba.get_num_threads()))


@functools.cache
def build_kernels(heads: int, kv_heads: int, head_dim: int) -> Kernels:
    """Kernels for one geometry; sizes become constants so that inner loops unroll."""
    return Kernels(
        add_norm=_build_add_norm(),
        rope_store=_build_rope_store(heads, kv_heads, head_dim),
        attend=_build_attend(heads // kv_heads, kv_heads, head_dim),
        silu_mul=_build_silu_mul(),
        refine=_build_refine(),
    )


def _build_add_norm() -> Kernel:
    def add_norm(residual: Any, delta: Any, add: Any, weight: Any, eps: Any, out: Any) -> None:
        width = residual.shape[1]
        for row in numba.prange(residual.shape[0]):
            square = np.float32(0)
            if add:
                for i in range(width):
                    residual[row, i] += _load(delta[row, i])
            for i in range(width):
                square += residual[row, i] * residual[row, i]
            scale = np.float32(1) / np.sqrt(square / np.float32(width) + eps)
            for i in range(width):
                out[row, i] = _store(residual[row, i] * scale * weight[i], out[0, 0])

    return Kernel(add_norm)


def _build_rope_store(heads: int, kv_heads: int, head_dim: int) -> Kernel:
    half_dim = head_dim // 2
    rotated = heads + kv_heads

    def rope_store(
        qkv: Any, positions: Any, slots: Any, cos: Any, sin: Any, k: Any, v: Any
    ) -> None:
        for row in numba.prange(qkv.shape[0]):
            position = positions[row]
            slot = slots[row]
            for head in range(rotated):
                base = head * head_dim
                for i in range(half_dim):
                    a = _load(qkv[row, base + i])
                    b = _load(qkv[row, base + half_dim + i])
                    c = cos[position, i]
                    s = sin[position, i]
                    qkv[row, base + i] = _store(a * c - b * s, qkv[0, 0])
                    qkv[row, base + half_dim + i] = _store(b * c + a * s, qkv[0, 0])
            for head in range(kv_heads):
                base = (heads + head) * head_dim
                for i in range(head_dim):
                    k[head, slot, i] = qkv[row, base + i]
                base = (rotated + head) * head_dim
                for i in range(head_dim):
                    v[head, slot, i] = qkv[row, base + i]

    return Kernel(rope_store)


def _build_attend(group: int, kv_heads: int, head_dim: int) -> Kernel:
    def attend(
        qkv: Any,
        k: Any,
        v: Any,
        tables: Any,
        rows: Any,
        scale: Any,
        window: Any,
        sinks: Any,
        out: Any,
    ) -> None:
        for task in numba.prange(rows.shape[0] * kv_heads):
            entry, head = task // kv_heads, task % kv_heads
            row = rows[entry, 0]
            table = tables[rows[entry, 1]]
            length = rows[entry, 2]
            # Tokens in [dark, lit) are out of the window.
            lit = length - window if 0 < window < length else 0
            dark = min(sinks, lit)
            scores = np.empty((group, length), np.float32)
            query = np.empty((group, head_dim), np.float32)
            total = np.zeros((group, head_dim), np.float32)
            for g in range(group):
                for i in range(head_dim):
                    query[g, i] = _load(qkv[row, (head * group + g) * head_dim + i]) * scale
            seen = 0
            for page in range((length + _PAGE - 1) // _PAGE):
                first, start = page * _PAGE, table[page] * _PAGE
                if first >= dark and first + _PAGE <= lit:
                    continue
                for t in range(min(_PAGE, length - first)):
                    if dark <= first + t < lit:
                        continue
                    for g in range(group):
                        dot = np.float32(0)
                        for i in range(head_dim):
                            dot += query[g, i] * _load(k[head, start + t, i])
                        scores[g, seen] = dot
                    seen += 1
            for g in range(group):
                largest = scores[g, 0]
                for t in range(seen):
                    largest = max(largest, scores[g, t])
                weight_sum = np.float32(0)
                for t in range(seen):
                    scores[g, t] = _exp(scores[g, t] - largest)
                    weight_sum += scores[g, t]
                inverse = np.float32(1) / weight_sum
                for t in range(seen):
                    scores[g, t] *= inverse
            seen = 0
            for page in range((length + _PAGE - 1) // _PAGE):
                first, start = page * _PAGE, table[page] * _PAGE
                if first >= dark and first + _PAGE <= lit:
                    continue
                for t in range(min(_PAGE, length - first)):
                    if dark <= first + t < lit:
                        continue
                    for g in range(group):
                        weight = scores[g, seen]
                        for i in range(head_dim):
                            total[g, i] += weight * _load(v[head, start + t, i])
                    seen += 1
            for g in range(group):
                for i in range(head_dim):
                    out[row, (head * group + g) * head_dim + i] = _store(total[g, i], out[0, 0])

    return Kernel(attend)


def _build_silu_mul() -> Kernel:
    def silu_mul(gate_up: Any, out: Any) -> None:
        width = out.shape[1]
        for row in numba.prange(out.shape[0]):
            for i in range(width):
                gate = _load(gate_up[row, i])
                up = _load(gate_up[row, width + i])
                out[row, i] = _store(gate * up / (np.float32(1) + _exp(-gate)), out[0, 0])

    return Kernel(silu_mul)


def _build_refine() -> Kernel:
    def refine(logits: Any, hidden: Any, head: Any, margin: Any) -> None:
        for row in numba.prange(logits.shape[0]):
            best = logits[row, 0]
            for i in range(logits.shape[1]):
                best = max(best, logits[row, i])
            for i in range(logits.shape[1]):
                if logits[row, i] >= best - margin:
                    total = np.float32(0)
                    for j in range(hidden.shape[1]):
                        total += hidden[row, j] * _load(head[i, j])
                    logits[row, i] = total

    return Kernel(refine)
