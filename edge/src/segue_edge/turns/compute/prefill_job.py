"""The compute jobs of a turn: prefill in chunks with blocks out, and single decoded tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from segue_contract.kv.layout import BLOCK_TOKENS, ROOT_PARENT
from segue_contract.sampling import sample
from segue_contract.sync.ops import Sampling
from segue_edge.compute import Job
from segue_edge.prefill.chunks import LARGE_CHUNK, chunks
from segue_edge.turns.compute.model_port import Array, EdgeModelPort, PrefixCachePort

OnBlock = Callable[[int, Array, Array], None]


@dataclass
class Prefill:
    """A finished prefill.

    `model_s` is the model's own time (runtime and sampling), without queueing and without what
    is done with finished blocks. `rates`: (tokens, seconds) of every chunk.
    """

    first_token: int
    kv: Any
    cached_tokens: int
    model_s: float = 0.0
    rates: list[tuple[int, float]] = field(default_factory=list)


class PrefillJob(Job[Prefill]):
    """Prefill `tokens` after whatever prefix the cache holds; one chunk per step.

    Args:
        ids: block ids of `tokens`' full blocks.
        on_block: called in the compute thread with every full block from 0 on, cached or new.
        sampling: how the next token is chosen, at reply index `index`; None: nobody wants one.
        room: tokens that may be decoded after it.
    """

    def __init__(
        self,
        model: EdgeModelPort,
        cache: PrefixCachePort,
        tokens: Sequence[int],
        ids: Sequence[bytes],
        *,
        on_block: OnBlock | None = None,
        sampling: Sampling | None = None,
        index: int = 0,
        room: int = 0,
        chunk: int = LARGE_CHUNK,
    ) -> None:
        super().__init__()
        self._model = model
        self._cache = cache
        self._room = room
        self._tokens = list(tokens)
        self._ids = list(ids)
        self._on_block = on_block
        self._sampling = sampling
        self._index = index
        self._chunk = chunk
        self._pending: list[tuple[int, int]] | None = None
        self._block_s = 0.0
        self._out = Prefill(first_token=-1, kv=None, cached_tokens=0)

    @property
    def left(self) -> int:
        """Tokens still to compute, for the estimate of the queue."""
        if self._pending is None:
            return len(self._tokens)
        return sum(b - a for a, b in self._pending)

    def step(self) -> bool:
        if self._pending is None:
            self._restore()
        assert self._pending is not None
        start, stop = self._pending.pop(0)
        self._block_s = 0.0
        begun = time.perf_counter()
        result = self._model.extend(self._tokens[:stop], self._out.kv, self._take_block)
        seconds = time.perf_counter() - begun - self._block_s
        self._out.rates.append((stop - start, seconds))
        self._out.model_s += seconds
        if self._pending:
            return False
        if self._sampling is not None:
            begun = time.perf_counter()
            self._out.first_token = sample(result.logits, self._sampling, self._index)
            self._out.model_s += time.perf_counter() - begun
        return True

    def result(self) -> Prefill:
        return self._out

    def _restore(self) -> None:
        """Take cached blocks, but never the last token: its logits are needed."""
        usable = min(self._cache.lookup(self._ids), (len(self._tokens) - 1) // BLOCK_TOKENS)
        blocks: list[tuple[Array, Array]] = []
        for block in self._ids[:usable]:
            kept = self._cache.get(block)
            if kept is None:
                break
            blocks.append(kept)
        self._out.kv = self._model.new_kv(len(self._tokens) + self._room)
        for k, v in blocks:
            self._out.kv.append_block(k, v)
        self._out.cached_tokens = len(blocks) * BLOCK_TOKENS
        self._pending = chunks(self._out.cached_tokens, len(self._tokens), self._chunk)
        if self._on_block is not None:
            for index, (k, v) in enumerate(blocks):
                self._on_block(index, k, v)

    def _take_block(self, index: int, k: Array, v: Array) -> None:
        begun = time.perf_counter()
        if index < len(self._ids):
            parent = self._ids[index - 1] if index else ROOT_PARENT
            self._cache.put(self._ids[index], k, v, parent=parent)
            if self._on_block is not None:
                self._on_block(index, k, v)
        self._block_s += time.perf_counter() - begun


class NoCache:
    """For prompts that nobody will send again."""

    def lookup(self, ids: Sequence[bytes]) -> int:
        return 0

    def get(self, id: bytes) -> tuple[Array, Array] | None:
        return None

    def put(self, id: bytes, k: Array, v: Array, parent: bytes = ROOT_PARENT) -> bool:
        return False


class DecodeJob(Job[tuple[int, float]]):
    """Append `token` to `kv` and choose the one at reply index `index`; (token, model seconds)."""

    def __init__(
        self, model: EdgeModelPort, kv: Any, token: int, sampling: Sampling, index: int
    ) -> None:
        super().__init__()
        self._model = model
        self._kv = kv
        self._token = token
        self._sampling = sampling
        self._index = index
        self._out = (0, 0.0)

    def step(self) -> bool:
        begun = time.perf_counter()
        logits = self._model.decode_step(self._token, self._kv)
        chosen = sample(logits, self._sampling, self._index)
        self._out = (chosen, time.perf_counter() - begun)
        return True

    def result(self) -> tuple[int, float]:
        return self._out
