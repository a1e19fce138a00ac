"""How a prompt is cut into prefill chunks. Pure.

Every run of the graph costs a constant (all weights and the output layer once: about as much as 50
tokens of SmolLM2 on two cores), so chunks are few and large. Two things ask for more of them: KV
must be on its way before the prefill ends, and a slow link must be kept busy from early on.
"""

from __future__ import annotations

import itertools
import math

from segue_contract.kv.layout import BLOCK_TOKENS

LARGE_CHUNK = 512
SMALL_CHUNK = 128
# Below it a prompt is one chunk: its whole KV is less than the cost of another run.
_WHOLE_TOKENS = 256
# What the last chunk leaves to send after the prefill.
_LAST_SHARE = 1 / 8
# A link that needs more than this part of the prefill's time has to start early.
_SLOW_LINK = 0.25


def chunk_size(prefill_s: float, wire_s: float) -> int:
    """The largest chunk for a prompt that takes `prefill_s` to compute and `wire_s` to send."""
    return SMALL_CHUNK if wire_s > _SLOW_LINK * prefill_s else LARGE_CHUNK


def chunks(start: int, tokens: int, chunk: int = LARGE_CHUNK) -> list[tuple[int, int]]:
    """Half-open ranges that cover `[start, tokens)`; all but the last end at a block boundary.

    The last one holds about an eighth, at least a block: while it runs, the KV of all others goes
    up. The others are of even size.

    Args:
        start: cached tokens, a multiple of 64.
        tokens: the prompt's length, above `start`.
    """
    assert start % BLOCK_TOKENS == 0
    assert start < tokens
    left = tokens - start
    if left <= min(chunk, _WHOLE_TOKENS):
        return [(start, tokens)]
    last = max(1, int(left * _LAST_SHARE) // BLOCK_TOKENS) * BLOCK_TOKENS
    blocks = (left - last) // BLOCK_TOKENS  # before the last chunk
    if blocks < 1:
        return [(start, tokens)]
    count = math.ceil(blocks * BLOCK_TOKENS / chunk)
    cuts = [start + blocks * index // count * BLOCK_TOKENS for index in range(count + 1)]
    return list(itertools.pairwise([*cuts, tokens]))
