"""A step's input as a message, and back: the same arrays on every rank."""

from __future__ import annotations

import numpy as np
import torch

from segue_cloud.engine.attention import Window, chunk_mask
from segue_cloud.engine.sequence import pages_for
from segue_cloud.engine.step_input import Segment, StepInput
from segue_cloud.engine.tensor_parallel.messages import Array, ComputeStep


def pack_step(step: StepInput) -> ComputeStep:
    """Only the page tables that rows point at travel, as far as those rows see."""
    rows, tables = step.rows, step.tables[:0, :0]
    if len(rows):
        used, places = np.unique(rows[:, 1], return_inverse=True)
        tables = step.tables[used, : pages_for(int(rows[:, 2].max()))]
        rows = rows.copy()
        rows[:, 1] = places.reshape(-1)
    segments = np.array(
        [
            (s.first, s.count, s.start, 0 if s.slots is None else len(s.slots))
            for s in step.segments
        ],
        np.int64,
    )
    slots = [s.slots.cpu().numpy() for s in step.segments if s.slots is not None]
    return ComputeStep(
        tokens=Array.of(step.tokens.cpu().numpy()),
        positions=Array.of(step.positions_np),
        slots=Array.of(step.slots_np),
        rows=Array.of(rows),
        tables=Array.of(tables),
        segments=Array.of(segments.reshape(-1, 4)),
        segment_slots=Array.of(np.concatenate(slots) if slots else np.zeros(0, np.int64)),
        logit_rows=Array.of(step.logit_rows.cpu().numpy()),
    )


def unpack_step(message: ComputeStep, window: Window, dtype: torch.dtype, device: str) -> StepInput:
    """The step as `pack_step` got it, on this rank's device.

    Raises:
        BadLength: an array's bytes do not have its shape.
    """
    slots = torch.from_numpy(message.segment_slots.numpy()).to(device)
    segments: list[Segment] = []
    taken = 0
    for first, count, start, keys in message.segments.numpy().tolist():
        own = slots[taken : taken + keys] if keys else None
        taken += keys
        mask = chunk_mask(window, start, count, dtype, device)
        segments.append(Segment(first, count, start, own, mask))
    return StepInput(
        tokens=torch.from_numpy(message.tokens.numpy()).to(device),
        positions_np=message.positions.numpy(),
        slots_np=message.slots.numpy(),
        rows=message.rows.numpy(),
        tables=message.tables.numpy(),
        segments=tuple(segments),
        logit_rows=torch.from_numpy(message.logit_rows.numpy()).to(device),
    )
