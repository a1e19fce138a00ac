"""The sampling rule: which token follows from which logits, on any machine alike.

    temperature 0   the largest logit; of equal ones the lowest id
    otherwise       w = exp((logit - max) / temperature) in float64, tokens sorted by (-w, id)
                    top_k   keep the first k; 0: all
                    top_p   keep the shortest prefix with at least this share of what top_k kept
                    min_p   keep tokens with w >= min_p (the largest w is 1)
                    draw    the first token at which the running sum of what is kept exceeds
                            uniform(seed, index) times its whole sum

The random number depends on the seed and on the token's index in the reply and on nothing else:
whoever goes on with a turn (edge, cloud, the next cloud) draws what the first would have drawn.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from segue_contract.checks import check_sampling_values
from segue_contract.errors import Internal
from segue_contract.sync.ops import Sampling

SamplingParams: TypeAlias = Sampling

Weights: TypeAlias = NDArray[np.float64]

_MASK: Final = 0xFFFFFFFF
_HEAD: Final = 512  # a usual nucleus is smaller; each further try takes eight times more


def check_sampling(sampling: Sampling, max_tokens: int) -> None:
    """Raises BadSampling, naming the field and its allowed range."""
    check_sampling_values(sampling, max_tokens)


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0 = 0xD2511F53 * c0
        product1 = 0xCD9E8D57 * c2
        c0 = (product1 >> 32) ^ c1 ^ k0
        c1 = product1 & _MASK
        c2 = (product0 >> 32) ^ c3 ^ k1
        c3 = product0 & _MASK
        k0 = (k0 + 0x9E3779B9) & _MASK
        k1 = (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, index: int) -> float:
    """The random number of reply token `index` under `seed`: 53 bits in [0, 1).

    Counter: the index's two words, then zeros. Key: the seed's two words.
    """
    high, low, _, _ = philox(
        (index & _MASK, (index >> 32) & _MASK, 0, 0), (seed & _MASK, (seed >> 32) & _MASK)
    )
    return float((high >> 5) * 67108864 + (low >> 6)) / 9007199254740992.0


def sample(logits: NDArray[np.float32], sampling: Sampling, index: int) -> int:
    """The id of reply token `index`.

    Args:
        logits: float32 `[vocab]`; minus infinity excludes a token.
        sampling: checked by `check_sampling`.
        index: place of the token in the reply, from 0.

    Raises:
        Internal: the logits have a NaN, a plus infinity, or exclude every token.
    """
    best = int(np.argmax(logits))  # a NaN wins the argmax: one look finds it
    if not np.isfinite(logits[best]):
        raise Internal("The model's logits are not finite.", hint="The model is damaged.")
    if sampling.temperature == 0.0:
        return best
    with np.errstate(over="ignore", under="ignore"):  # a tiny temperature: exp(-inf) is 0
        scaled = np.subtract(logits, logits[best], dtype=np.float64)
        scaled /= sampling.temperature
        weights = np.exp(scaled, out=scaled)
    return _draw(weights, sampling, uniform(sampling.seed, index))


def _draw(weights: Weights, sampling: Sampling, chance: float) -> int:
    """The id that `chance` in [0, 1) falls on. Sorts no more of the vocabulary than it must."""
    vocab = weights.size
    top_k = min(sampling.top_k, vocab) or vocab
    kept = top_k
    if sampling.min_p > 0.0:
        kept = min(kept, int(np.count_nonzero(weights >= sampling.min_p)))
    if sampling.top_p < 1.0:
        ids, sums = _nucleus(weights, top_k, sampling.top_p)
        kept = min(kept, ids.size)
    elif kept < vocab:
        ids, sums = _head(weights, kept)
    else:
        total = float(weights.sum())
        ids, sums = _head_reaching(weights, chance * total, strictly=True)
        return _at(ids, sums, chance * total)
    return _at(ids[:kept], sums[:kept], chance * float(sums[kept - 1]))


def _at(ids: NDArray[np.intp], sums: Weights, target: float) -> int:
    """The first id whose running sum exceeds `target`, or the last that adds to it."""
    place = int(np.searchsorted(sums, target, side="right"))
    if place == ids.size:  # only where `target` came from a sum rounded otherwise
        place = int(np.searchsorted(sums, sums[-1], side="left"))
    return int(ids[place])


def _nucleus(weights: Weights, top_k: int, top_p: float) -> tuple[NDArray[np.intp], Weights]:
    """The shortest prefix of the `top_k` heaviest with at least `top_p` of their sum."""
    if top_k < weights.size:
        ids, sums = _head(weights, top_k)
        target = top_p * float(sums[-1])
    else:
        target = top_p * float(weights.sum())
        ids, sums = _head_reaching(weights, target, strictly=False)
    size = min(int(np.searchsorted(sums, target, side="left")) + 1, ids.size)
    return ids[:size], sums[:size]


def _head_reaching(
    weights: Weights, target: float, *, strictly: bool
) -> tuple[NDArray[np.intp], Weights]:
    """As `_head`, with as many tokens as it takes to reach (or pass) the sum `target`."""
    count = min(_HEAD, weights.size)
    while True:
        ids, sums = _head(weights, count)
        reached = sums[-1] > target if strictly else sums[-1] >= target
        if reached or count == weights.size:
            return ids, sums
        count = min(8 * count, weights.size)


def _head(weights: Weights, count: int) -> tuple[NDArray[np.intp], Weights]:
    """Ids of the `count` heaviest tokens in the order (-weight, id), and their running sum."""
    if count < weights.size:
        border = np.partition(weights, weights.size - count)[weights.size - count]
        above = np.flatnonzero(weights > border)
        ties = np.flatnonzero(weights == border)[: count - above.size]
        ids = np.sort(np.concatenate((above, ties)))
    else:
        ids = np.arange(weights.size)
    ids = ids[np.argsort(-weights[ids], kind="stable")]
    return ids, np.cumsum(weights[ids])
