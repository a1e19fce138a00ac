"""How a prompt is cut into prefill chunks, each one run of the graph. Pure.

Every run costs a constant (all weights once: about as much as 50 tokens of SmolLM2 on two cores),
and attention's square grows with its length. Measured on two cores, 512-token prompt, tokens/s:
1,890 in chunks of 64, 2,160 of 128, 2,250 of 256, 2,080 of 384, 1,830 at once; the order is the
same at 2,048. KV does not depend on how a prompt is cut. Smaller chunks keep a slow link busy
from early on, and the last one is small, so that little is left to send when it is done.
"""

from __future__ import annotations

import itertools
import math

from segue_contract.kv.layout import BLOCK_TOKENS

LARGE_CHUNK = 256  # up to it a prompt is one chunk
SMALL_CHUNK = 128
LONGEST_RUN = LARGE_CHUNK + BLOCK_TOKENS  # tokens of one run: the last also takes the tail
# What the last chunk leaves to send after the prefill.
_LAST_SHARE = 1 / 8
# A link that needs more than this part of the prefill's time has to start early.
_SLOW_LINK = 0.25


def chunk_size(prefill_s: float, wire_s: float) -> int:
    """The largest chunk for a prompt that takes `prefill_s` to compute and `wire_s` to send."""
    return SMALL_CHUNK if wire_s > _SLOW_LINK * prefill_s else LARGE_CHUNK


def chunks(start: int, tokens: int, chunk: int = LARGE_CHUNK) -> list[tuple[int, int]]:
    """Half-open ranges that cover `[start, tokens)`; all but the last end at a block boundary.

    The last one holds about an eighth, at least a block and at most a chunk: while it runs, the KV
    of all others goes up. The others are of even size.

    Args:
        start: tokens whose KV is there.
        tokens: the prompt's length, above `start`.
        chunk: tokens of a run, a multiple of 64; the first and the last may have up to 63 more.
    """
    assert start < tokens
    assert chunk % BLOCK_TOKENS == 0
    left = tokens - start
    if left <= chunk:
        return [(start, tokens)]
    last = max(1, int(min(left * _LAST_SHARE, chunk)) // BLOCK_TOKENS) * BLOCK_TOKENS
    first = -(-start // BLOCK_TOKENS)  # the first block boundary
    blocks = (tokens - last) // BLOCK_TOKENS - first  # before the last chunk
    if blocks < 1:
        return [(start, tokens)]
    count = math.ceil(blocks * BLOCK_TOKENS / chunk)
    cuts = [(first + blocks * index // count) * BLOCK_TOKENS for index in range(1, count + 1)]
    return list(itertools.pairwise([start, *cuts, tokens]))
