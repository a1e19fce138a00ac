"""Long computing in the event loop, a slice at a time: other sessions go on in between."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import TypeVar

from segue_contract.limits import STATE_SLICE_BYTES
from segue_contract.sync.state import (
    SessionState,
    decode_state_in_slices,
    encode_state_in_slices,
)

_T = TypeVar("_T")


async def in_slices(work: Generator[None, None, _T]) -> _T:
    """What `work` returns; the loop goes round wherever it yields."""
    while True:
        try:
            next(work)
        except StopIteration as done:
            result: _T = done.value
            return result
        await asyncio.sleep(0)


async def encoded(state: SessionState) -> bytes:
    """As `encode_state`. Nobody may change `state` meanwhile."""
    return await in_slices(encode_state_in_slices(state, STATE_SLICE_BYTES))


async def decoded(data: bytes) -> SessionState:
    """As `decode_state`."""
    return await in_slices(decode_state_in_slices(data, STATE_SLICE_BYTES))
