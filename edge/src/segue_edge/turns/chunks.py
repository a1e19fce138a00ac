"""How a prompt is cut into prefill chunks. Pure."""

from __future__ import annotations

import itertools

from segue_contract.kv.layout import BLOCK_TOKENS

CHUNK_TOKENS = 256  # the runtime's speed is flat from here on


def chunks(start: int, tokens: int, chunk: int = CHUNK_TOKENS) -> list[tuple[int, int]]:
    """Half-open ranges that cover `[start, tokens)`; all but the last end at a block boundary.

    The last full block gets a chunk of its own when a tail follows it, and what ends last is at
    most one block: its KV leaves only after the prefill, all earlier KV leaves during it.

    Args:
        start: cached tokens, a multiple of 64.
        tokens: the prompt's length, above `start`.
    """
    assert start % BLOCK_TOKENS == 0
    assert start < tokens
    last = (tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS  # where the last chunk begins
    cuts = [start]
    while cuts[-1] < last:
        left = last - cuts[-1]
        # a few big chunks, then smaller ones, so that the link is never left with much at the end
        size = (
            chunk if left > chunk else max(BLOCK_TOKENS, left // 2 // BLOCK_TOKENS * BLOCK_TOKENS)
        )
        cuts.append(min(last, cuts[-1] + size))
    cuts.append(tokens)
    return list(itertools.pairwise(cuts))
