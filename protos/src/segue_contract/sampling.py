"""The sampling rule: which token follows from which logits, on any machine alike.

    temperature 0   the largest logit; of equal ones the lowest id
    otherwise       x = (logit - largest logit) / temperature in float64, w = exp(x), tokens sorted
                    by (-logit, id)
                    top_k   keep the first k; 0: all
                    top_p   keep the shortest prefix with at least this share of what top_k kept
                    min_p   keep tokens with w >= min_p (the largest w is 1)
                    draw    of what is kept the token with the largest x + gumbel(seed, index, id);
                            of equal ones the lowest id

`x + gumbel` is largest at a token with probability w / (sum of the kept w), as if the token were
drawn by its weight (the Gumbel-max trick; Maddison, Tarlow, Minka, "A* Sampling", 2014). The noise
depends on the seed, on the token's index in the reply and on its id, and on nothing else: whoever
goes on with a turn (edge, cloud, the next cloud) adds what the first would have added. Where two
models' logits differ a little, a token changes only if the two best scores lie that close together.

Everything behind the logits is float64. Logarithms and exponentials of two math libraries may
differ by a few of its last digits, which moves a score by some 1e-14: two machines with equal
logits disagree where two scores, or a filter's border, lie closer than that, about once in 1e13
tokens. Logits of two machines differ by more than 1e-7 as soon as they sum in another order.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from segue_contract.errors import Internal
from segue_contract.sync.ops import Sampling

Ids: TypeAlias = NDArray[np.intp]
Logits: TypeAlias = NDArray[np.float32]
Weights: TypeAlias = NDArray[np.float64]
Words: TypeAlias = NDArray[np.uint64]

_MASK: Final = 0xFFFFFFFF
_HEAD: Final = 512  # a usual nucleus is smaller; each further try takes eight times more

# SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
_GAMMA: Final = 0x9E3779B97F4A7C15
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_TABLE: Final = np.arange(1, (1 << 14) + 1, dtype=np.uint64) * np.uint64(_GAMMA)  # stays in cache


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


def stream(seed: int, index: int) -> int:
    """Where the SplitMix64 stream of reply token `index` under `seed` begins: 64 bits.

    The first two words of Philox. Counter: the index's two words, then zeros. Key: the seed's.
    """
    low, high, _, _ = philox(
        (index & _MASK, (index >> 32) & _MASK, 0, 0), (seed & _MASK, (seed >> 32) & _MASK)
    )
    return high << 32 | low


def words(seed: int, index: int, ids: Ids) -> Words:
    """Random words, 64 bits, shape of `ids`: number `id` of the stream of (seed, index)."""
    return _mixed((ids.astype(np.uint64) + np.uint64(1)) * np.uint64(_GAMMA), stream(seed, index))


def gumbel(seed: int, index: int, ids: Ids) -> Weights:
    """Standard Gumbel noise of these tokens, shape of `ids`."""
    return gumbel_of(words(seed, index, ids))


def gumbel_of(random: Words) -> Weights:
    """-log(-log(u)), between -3.7 and 36.8, of random words, in their shape.

    u = 1 - (n + 1/2) / 2**52, where n is the word's upper 52 bits: exact, and never 0 or 1.
    """
    strength = (random >> np.uint64(12)).astype(np.float64)
    strength += 0.5
    strength *= 2.0**-52
    return -np.log(-np.log(1.0 - strength))


def sample(logits: Logits, sampling: Sampling, index: int) -> int:
    """The id of reply token `index`.

    Args:
        logits: float32 `[vocab]`; minus infinity excludes a token.
        sampling: checked by `checks.check_sampling_values`.
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
        ids = _kept(logits, logits[best], sampling)
        if ids is None:
            return _drawn_of_all(logits, best, sampling, index)
        scores = _scaled(logits[ids], logits[best], sampling.temperature)
        scores += gumbel(sampling.seed, index, ids)
        return int(ids[scores == scores.max()].min())


# -- the filters ----------------------------------------------------------------------------------


def _scaled(logits: Logits, largest: np.float32, temperature: float) -> Weights:
    scaled = np.subtract(logits, largest, dtype=np.float64)
    scaled /= temperature
    return scaled


def _kept(logits: Logits, largest: np.float32, sampling: Sampling) -> Ids | None:
    """Ids of the tokens that the filters keep, in any order; None: all."""
    vocab = logits.size
    ids = _head(logits, sampling.top_k) if 0 < sampling.top_k < vocab else None
    if sampling.top_p == 1.0 and sampling.min_p == 0.0:
        return ids
    x = _scaled(logits if ids is None else logits[ids], largest, sampling.temperature)
    weights = np.exp(x, out=x)
    if sampling.top_p < 1.0:
        if ids is None:
            target = sampling.top_p * float(weights.sum())
            ids, sums = _head_reaching(logits, weights, target)
            weights = weights[ids]
        else:
            sums = np.cumsum(weights)
            target = sampling.top_p * float(sums[-1])
        size = int(np.searchsorted(sums, target, side="left")) + 1
        ids, weights = ids[:size], weights[:size]
    if sampling.min_p > 0.0:
        heavy = np.flatnonzero(weights >= sampling.min_p)
        ids = heavy if ids is None else ids[heavy]
    return ids


def _head_reaching(logits: Logits, weights: Weights, target: float) -> tuple[Ids, Weights]:
    """The largest tokens, as `_head`, as many as reach the sum `target`, and the running sum."""
    count = min(_HEAD, weights.size)
    while True:
        ids = _head(logits, count)
        sums = np.cumsum(weights[ids])
        if sums[-1] >= target or count == weights.size:
            return ids, sums
        count = min(8 * count, weights.size)


def _head(logits: Logits, count: int) -> Ids:
    """Ids of the `count` largest logits in the order (-logit, id). Sorts no more than it must."""
    if count < logits.size:
        border = np.partition(logits, logits.size - count)[logits.size - count]
        above = np.flatnonzero(logits > border)
        ties = np.flatnonzero(logits == border)[: count - above.size]
        ids = np.sort(np.concatenate((above, ties)))
    else:
        ids = np.arange(logits.size)
    return ids[np.argsort(-logits[ids], kind="stable")]


# -- the noise ------------------------------------------------------------------------------------


def _mixed(steps: Words, start: int) -> Words:
    """SplitMix64's output function of `start` plus `steps`."""
    z = steps + np.uint64(start)
    shifted = z >> np.uint64(30)
    z ^= shifted
    z *= _MIX_1
    np.right_shift(z, np.uint64(27), out=shifted)
    z ^= shifted
    z *= _MIX_2
    np.right_shift(z, np.uint64(31), out=shifted)
    z ^= shifted
    return z


def _drawn_of_all(logits: Logits, best: int, sampling: Sampling, index: int) -> int:
    """The draw where no filter cuts: computes the logarithms of few tokens.

    With v = 1 - u: -log(u) >= v, so a token's score is at most x - log(v), and one with
    w < v * exp(the best score so far) cannot win. Float32, rounded down, is enough to tell most.
    """
    largest, temperature = logits[best], sampling.temperature
    slope = np.float32(1.0 / max(temperature, 1e-30))  # flatter than the truth: leaves out less
    start = stream(sampling.seed, index)
    winner, top = best, float(gumbel(sampling.seed, index, np.array([best]))[0])
    for first in range(0, logits.size, _TABLE.size):
        part = logits[first : first + _TABLE.size]
        found = _mixed(_TABLE[: part.size], (start + first * _GAMMA) & 0xFFFFFFFFFFFFFFFF)
        least = (found >> np.uint64(32)).astype(np.float32)
        least *= np.float32(0.999 * 2.0**-32 * np.exp(top))
        weights = part - largest
        weights *= slope
        np.exp(weights, out=weights)
        places = np.flatnonzero(weights >= least)
        if not places.size:
            continue
        scores = _scaled(part[places], largest, temperature) + gumbel_of(found[places])
        leader = int(np.argmax(scores))  # the first of equals
        score, token = float(scores[leader]), first + int(places[leader])
        if score > top or (score == top and token < winner):
            winner, top = token, score
    return winner
