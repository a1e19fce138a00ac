"""The KV of one conversation: one buffer that both graphs read and write in place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from segue_contract.kv.layout import BLOCK_TOKENS, KvGeometry

Floats = NDArray[np.float32]
_STEP = 256  # tokens by which a buffer grows at least


class PastKv:
    """Keys (after RoPE) and values of `length` tokens, float32, room for `capacity`.

    `k`, `v`: `[layers, kv_heads, capacity, head_dim]`; beyond `length` they hold nothing of worth.
    GroupQueryAttention appends in place where past and present are one buffer, so a step copies no
    KV. One thread at a time.
    """

    def __init__(self, geometry: KvGeometry, capacity: int) -> None:
        self.geometry = geometry
        self.length = 0
        self._allocate(capacity)

    def _allocate(self, capacity: int) -> None:
        g = self.geometry
        capacity = max(_STEP, -(-capacity // _STEP) * _STEP)
        # Not zeroed: pages that are never written are never touched.
        self._values = np.empty((2, g.layers, 1, g.kv_heads, capacity, g.head_dim), np.float32)
        self._bindings: dict[ort.InferenceSession, ort.IOBinding] = {}

    @property
    def capacity(self) -> int:
        return int(self._values.shape[4])

    @property
    def nbytes(self) -> int:
        return int(self._values.nbytes)

    @property
    def k(self) -> Floats:
        return self._values[0, :, 0]

    @property
    def v(self) -> Floats:
        return self._values[1, :, 0]

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` in all; what is there is kept."""
        if tokens <= self.capacity:
            return
        old, length = self._values, self.length
        self._allocate(max(tokens, old.shape[4] + old.shape[4] // 2))
        self._values[..., :length, :] = old[..., :length, :]

    def append_block(self, k: NDArray[np.generic], v: NDArray[np.generic]) -> None:
        """Put a block of 64 tokens after what is there (`[layers, kv_heads, 64, head_dim]`)."""
        start, end = self.length, self.length + BLOCK_TOKENS
        self.reserve(end)
        self.k[:, :, start:end] = k
        self.v[:, :, start:end] = v
        self.length = end

    def block(self, index: int) -> tuple[Floats, Floats]:
        """Copies of block `index`'s k and v."""
        start = index * BLOCK_TOKENS
        assert start + BLOCK_TOKENS <= self.length, "only whole blocks"
        part = slice(start, start + BLOCK_TOKENS)
        return self.k[:, :, part].copy(), self.v[:, :, part].copy()

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        assert 0 <= length <= self.length
        self.length = length

    @classmethod
    def from_blocks(
        cls,
        geometry: KvGeometry,
        blocks: Sequence[tuple[NDArray[np.generic], NDArray[np.generic]]],
        capacity: int = 0,
    ) -> PastKv:
        """A buffer that begins with these blocks, with room for `capacity` tokens."""
        kv = cls(geometry, max(capacity, len(blocks) * BLOCK_TOKENS))
        for k, v in blocks:
            kv.append_block(k, v)
        return kv

    def binding(self, session: ort.InferenceSession) -> ort.IOBinding:
        """A run of `session` with this very memory as past and present; the rest is for the caller
        to bind. Kept until the buffer grows: to bind 120 values takes a twentieth of a decode step.
        """
        kept = self._bindings.get(session)
        if kept is not None:
            return kept
        binding = session.io_binding()
        for which, side in enumerate(("key", "value")):
            for layer in range(self.geometry.layers):
                value = ort.OrtValue.ortvalue_from_numpy(self._values[which, layer])
                binding.bind_ortvalue_input(f"past_key_values.{layer}.{side}", value)
                binding.bind_ortvalue_output(f"present.{layer}.{side}", value)
        self._bindings[session] = binding
        return binding
