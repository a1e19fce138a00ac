"""Weights as panels: the order in which `tiles` reads them.

A panel is `[pairs of inputs, 32 outputs, 2]`, 64-byte aligned; inputs and outputs that are missing
are zeros. So a product reads its weights from the first byte to the last.
"""

from __future__ import annotations

import mmap

import numpy as np
import torch
from numpy.typing import NDArray

from segue_cloud.engine.native.tiles import PANEL

Numbers = NDArray[np.uint16]
_HALF = PANEL // 2
_HUGE = getattr(mmap, "MADV_HUGEPAGE", None)


def pairs_of(inputs: int) -> int:
    return (inputs + 1) // 2


def panels_of(outputs: int) -> int:
    return -(-outputs // PANEL)


def size_of(outputs: int, inputs: int) -> int:
    """Numbers that the panels of a weight take."""
    return panels_of(outputs) * pairs_of(inputs) * 2 * PANEL


def reserve(numbers: int, *, huge: bool) -> Numbers:
    """Zeros for panels, page-aligned, which the system gives as they are first used.

    `huge`: in large pages where there are any; for what is used as a whole.
    """
    memory = mmap.mmap(-1, max(1, 2 * numbers), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge and _HUGE is not None:
        memory.madvise(_HUGE)
    return np.frombuffer(memory, np.uint16)[:numbers]


def pack(weight: torch.Tensor, into: Numbers) -> None:
    """Write `weight`, bfloat16 `[outputs, inputs]`, into its `size_of` numbers."""
    outputs, inputs = weight.shape
    panels, pairs = panels_of(outputs), pairs_of(inputs)
    padded = torch.nn.functional.pad(weight, (0, 2 * pairs - inputs, 0, panels * PANEL - outputs))
    target = torch.from_numpy(into).view(torch.bfloat16).view(panels, pairs, PANEL, 2)
    target.copy_(padded.view(panels, PANEL, pairs, 2).transpose(1, 2))


def interleaved(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`[2 * ffn, hidden]` whose panels hold 16 rows of `gate` and the same 16 rows of `up`."""
    missing = -gate.shape[0] % _HALF
    parts = [
        torch.nn.functional.pad(part, (0, 0, 0, missing)).view(-1, _HALF, part.shape[1])
        for part in (gate, up)
    ]
    return torch.stack(parts, dim=1).reshape(-1, gate.shape[1])
