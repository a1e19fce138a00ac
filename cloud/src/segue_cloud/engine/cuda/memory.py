"""How many KV pages fit on a card beside the weights. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from segue_cloud.engine.sequence import pages_for
from segue_contract.errors import ModelError
from segue_contract.limits import KV_PAGE_TOKENS, MAX_GRAPH_BYTES, MIB, POOL_MIN_TOKENS
from segue_contract.model.manifest import ModelGeometry

if TYPE_CHECKING:
    from segue_cloud.engine.options import EngineOptions

_USED_SHARE = 0.9  # of the card's free memory; the rest is other programs' and the allocator's
# Activations of the largest step, workspaces of the libraries; the graphs have their own bound.
_WORK_BYTES = 1024 * MIB


def weight_bytes(geometry: ModelGeometry, itemsize: int) -> int:
    """Bytes of all weights of a Llama, with one table where embeddings are tied."""
    g = geometry
    attention = g.hidden * g.head_dim * (2 * g.heads + 2 * g.kv_heads)
    layer = attention + 3 * g.hidden * g.ffn
    tables = (1 if g.tied_embeddings else 2) * g.vocab * g.hidden
    return (g.layers * layer + tables) * itemsize


def token_bytes(geometry: ModelGeometry, itemsize: int) -> int:
    """Bytes of one token's KV."""
    kv = geometry.kv
    return 2 * kv.layers * kv.kv_heads * kv.head_dim * itemsize


def card_pages(
    options: EngineOptions, geometry: ModelGeometry, itemsize: int, free_bytes: int
) -> int:
    """Pages of the pool on a card with `free_bytes` free, before the weights are there.

    All that the weights and the work leave, unless the options say how much.

    Raises:
        ModelError: model and pool do not fit; says what is needed.
    """
    page = token_bytes(geometry, itemsize) * KV_PAGE_TOKENS
    weights = weight_bytes(geometry, itemsize)
    graphs = MAX_GRAPH_BYTES if options.graphs else 0
    room = int(free_bytes * _USED_SHARE) - weights - graphs - _WORK_BYTES
    pool = options.pool_bytes or max(0, room)
    needed = pages_for(min(geometry.context, POOL_MIN_TOKENS)) * page
    if options.pool_bytes and options.pool_bytes < needed:
        raise ModelError(
            f"A KV pool of {pool // MIB} MiB is too small; this model needs {needed // MIB + 1}"
            " MiB.",
            hint=f"Give it more with --pool-mb {needed // MIB + 1} (or SEGUE_CLOUD_POOL_MB).",
            needed_mib=needed // MIB + 1,
        )
    wanted = options.pool_bytes or needed
    if weights + wanted > free_bytes:
        raise ModelError(
            f"The model ({weights // MIB} MiB) and a KV pool of {wanted // MIB} MiB do not fit the"
            f" {free_bytes // MIB} MiB that the card has free.",
            hint="Choose a smaller pool with --pool-mb, another card, or --device cpu.",
            needed_mib=(weights + wanted) // MIB,
        )
    return max(pool, needed) // page
