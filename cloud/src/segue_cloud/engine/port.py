"""The engine port: what the rest of the cloud asks of whatever computes tokens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from segue_cloud.engine.domains import OPEN
from segue_contract.kv.layout import KvBlock
from segue_contract.sync.ops import Sampling


@dataclass(frozen=True)
class EngineTurn:
    """One reply to compute.

    `prompt` are the prompt's token ids; `made` the reply's tokens that others made already (the
    edge's first token and bridge); the engine goes on at reply index `len(made)`.
    `prompt_blocks`: ids of the prompt's full 64-token blocks under the edge's recipe, in order;
    empty where only the engine's own recipe applies. `max_tokens` counts `made` as well.
    `tenant`, `weight`: whose turn it is, and how large a part of the engine that tenant may claim.
    `domains`: whose KV it may use, see `domains`.
    """

    turn: str
    prompt: tuple[int, ...]
    made: tuple[int, ...] = ()
    prompt_blocks: tuple[bytes, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 256
    end_tokens: frozenset[int] = frozenset()
    tenant: str = ""
    weight: float = 1.0
    domains: tuple[bytes, ...] = (OPEN,)


@dataclass(frozen=True)
class EngineOutput:
    """Some tokens of a turn, from reply index `index` on. `finished`: "" | "stop" | "length".

    The end token itself is not among `tokens`. The first output of a turn also says how many
    prompt tokens the prefix cache (own or shipped blocks) spared.
    """

    index: int
    tokens: tuple[int, ...]
    finished: str = ""
    cached_tokens: int = 0


@dataclass(frozen=True)
class EngineStats:
    """Facts for the planner, health and metrics. Rates are measured online, 0.0 before any."""

    running: int
    waiting: int
    pages_free: int
    pages_total: int
    queue_s: float
    prefill_tokens_per_s: float
    decode_step_s: float
    prefix_hit_tokens: int
    steps: int
    stalled: bool = False  # a step hangs: it takes many times as long as such steps do


class Engine(Protocol):
    """Thread-safe seen from one event loop; the computing thread is the engine's own.

    `died` is set when the engine can compute no more; the process should then end, so that turns
    go to other instances.
    """

    @property
    def died(self) -> asyncio.Event: ...

    def submit(self, turn: EngineTurn) -> AsyncIterator[EngineOutput]:
        """Start a turn; leaving the iterator (`aclose`) cancels it and frees its pages.

        Raises:
            Overloaded: the bound of admitted turns is reached (before anything is queued).
            PromptTooLong: the turn can never fit the context or the pool.
            TurnFailed: the engine failed while it computed this turn.
            EngineGone: it computes nothing more, for nobody.
        """
        ...

    async def offer_blocks(self, blocks: Sequence[KvBlock], domain: bytes = OPEN) -> int:
        """Put committed blocks into the prefix cache, for turns that may use that domain; returns
        how many were taken (0: no room).

        Raises:
            BadRecipe: the model's manifest does not allow the block's recipe.
            BadBlock: another geometry.
        """
        ...

    def have_blocks(self, ids: Sequence[bytes], domains: Sequence[bytes] = (OPEN,)) -> int:
        """Length of the longest prefix of `ids` that the cache holds in these domains now."""
        ...

    async def computed_block(self, turn: EngineTurn) -> KvBlock | None:
        """The KV of the last full block of the turn's prompt, its last token left out, as the cache
        has it now for the first of its domains; None where it has not. `k`, `v`: float32."""
        ...

    def stats(self) -> EngineStats: ...

    async def close(self) -> None: ...
