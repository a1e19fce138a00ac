"""What a turn needs of the model's runtime (implemented by `segue_edge.prefill`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from segue_contract.kv.layout import KvRecipe

Array = NDArray[Any]
OnBlock = Callable[[int, Array, Array], None]


class Kv(Protocol):
    """The KV of one conversation, grown in place."""

    def append_block(self, k: Array, v: Array) -> None:
        """Put 64 tokens after what is there: `[layers, kv_heads, 64, head_dim]` each."""
        ...


class Prefilled(Protocol):
    """`logits`: float32 `[vocab]` after the last token."""

    @property
    def logits(self) -> NDArray[np.float32]: ...


class EdgeModelPort(Protocol):
    """One thread calls it at a time."""

    @property
    def recipe(self) -> KvRecipe: ...

    def new_kv(self, capacity: int) -> Any:
        """An empty `Kv` with room for `capacity` tokens."""
        ...

    def extend(self, tokens: Sequence[int], past: Any, on_block: OnBlock | None) -> Prefilled:
        """Extend `past` to all `tokens`, of which it holds the first, in one run; `on_block` gets
        each whole new block, its arrays to keep."""
        ...

    def decode_step(self, token: int, kv: Any) -> NDArray[np.float32]:
        """Append one token to `kv`; the logits after it."""
        ...


class PrefixCachePort(Protocol):
    """Blocks by id, thread-safe."""

    def lookup(self, ids: Sequence[bytes]) -> int:
        """How many of `ids`, from the first on, are there."""
        ...

    def get(self, id: bytes) -> tuple[Array, Array] | None: ...

    def put(self, id: bytes, k: Array, v: Array, parent: bytes = ...) -> bool:
        """Keep a block that continues `parent`; True where it is there afterwards."""
        ...


class PrefixCaches(Protocol):
    """One cache, of which each tenant sees its own blocks."""

    def of(self, tenant: str) -> PrefixCachePort: ...
