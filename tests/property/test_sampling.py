"""The sampling rule against a plain reading of it, its random numbers, and its distribution."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from segue_contract.checks import check_sampling_values
from segue_contract.errors import BadSampling, Internal
from segue_contract.limits import MAX_NEW_TOKENS, MAX_TEMPERATURE, MAX_TOP_K
from segue_contract.sampling import gumbel, gumbel_of, philox, sample, stream, words
from segue_contract.sync.ops import Sampling

ONES = 0xFFFFFFFF
WORD = 2**64 - 1


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    """The vectors of Random123's kat_vectors for philox4x32, 10 rounds."""
    assert philox(counter, key) == words


def split_mix(state: int, count: int) -> list[int]:
    """The next numbers of SplitMix64, one after another, as its paper has them."""
    numbers = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & WORD
        z = state
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & WORD
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & WORD
        numbers.append(z ^ z >> 31)
    return numbers


def test_words_are_the_split_mix_stream_of_seed_and_index() -> None:
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert split_mix(1234567, 3) == known  # published with its C code
    assert stream(0, 0) == 0xE169C58D_6627E8D5
    for seed, index in [(0, 0), (7, 41), (2**64 - 1, MAX_NEW_TOKENS), (3, 2**32)]:
        plain = split_mix(stream(seed, index), 300)
        assert words(seed, index, np.arange(300)).tolist() == plain
        assert words(seed, index, np.array([299, 4])).tolist() == [plain[299], plain[4]]
    # What another build, machine or language must find too.
    assert [hex(word) for word in words(5, 9, np.array([0, 1, 49_151, 128_255])).tolist()] == [
        "0x42982588e903e6c9",
        "0x586f4907a5af2f80",
        "0x5ffec67fe5417598",
        "0xa2a909a6e9eeddef",
    ]


def test_streams_differ_in_seed_and_index() -> None:
    starts = {stream(s, i) for s in (0, 1, 2**32, 2**63, 2**64 - 1) for i in (0, 1, 7, 2**32)}
    assert len(starts) == 20


def chi_square(counts: NDArray[np.integer], expected: NDArray[np.float64] | float) -> float:
    """In standard deviations from what it is on average, about normal for many cells."""
    cells = counts.size - 1
    value = float(((counts - expected) ** 2 / expected).sum())
    return (value - cells) / np.sqrt(2 * cells)


@pytest.mark.parametrize("along", ["id", "index", "seed"])
def test_noise_is_uniform_and_independent_along_each_argument(along: str) -> None:
    seed, count = 20261127, 40_000
    print(f"seed {seed}")
    if along == "id":
        found = words(seed, 3, np.arange(count))
    elif along == "index":
        found = np.concatenate([words(seed, i, np.arange(10)) for i in range(count // 10)])
        found = found.reshape(-1, 10).T.ravel()  # ten runs of neighbouring indexes
    else:
        found = np.concatenate([words(seed + i, 3, np.arange(10)) for i in range(count // 10)])
        found = found.reshape(-1, 10).T.ravel()
    assert len(np.unique(found)) == count
    for shift in (0, 26, 52, 58):  # low, middle and high bits, and pairs of neighbours in them
        bits = (found >> np.uint64(shift)).astype(np.int64) & 63
        assert abs(chi_square(np.bincount(bits, minlength=64), count / 64)) < 5
        pairs = (bits[:-1] >> 1) * 32 + (bits[1:] >> 1)
        assert abs(chi_square(np.bincount(pairs, minlength=1024), (count - 1) / 1024)) < 5
    flips = np.unpackbits((found[:-1] ^ found[1:]).view(np.uint8))  # half of the bits
    assert abs(flips.mean() - 0.5) < 5 * 0.5 / np.sqrt(64 * count)


def test_noise_has_the_gumbel_distribution() -> None:
    seed, count = 77, 50_000
    print(f"seed {seed}")
    noise = gumbel(seed, 0, np.arange(count))
    assert np.isfinite(noise).all()
    shares = np.exp(-np.exp(-noise))  # of its distribution: uniform
    assert abs(chi_square(np.bincount((shares * 100).astype(int), minlength=100), count / 100)) < 5
    assert abs(noise.mean() - np.euler_gamma) < 5 * np.pi / np.sqrt(6 * count)


def test_the_noise_is_finite_at_the_ends_of_its_words() -> None:
    ends = np.array([0, 2**64 - 1, 2**63, 2**12 - 1], np.uint64)
    noise = gumbel_of(ends)
    assert np.isfinite(noise).all()
    assert noise[0] == noise[3] == pytest.approx(53 * np.log(2))
    assert noise[1] == pytest.approx(-np.log(53 * np.log(2)))
    assert noise[2] == pytest.approx(-np.log(np.log(2)))


def kept_by(logits: NDArray[np.float32], sampling: Sampling) -> list[int]:
    """The filters as their text says them, with every token sorted."""
    weights = np.exp((logits.astype(np.float64) - float(logits.max())) / sampling.temperature)
    order = sorted(range(len(weights)), key=lambda i: (-logits[i], i))
    order = order[: sampling.top_k] if sampling.top_k else order
    total = sum(weights[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        kept.append(i)
        mass += weights[i]
        if sampling.top_p < 1.0 and mass >= sampling.top_p * total:
            break
    return [i for i in kept if weights[i] >= sampling.min_p]


def plainly(logits: NDArray[np.float32], sampling: Sampling, index: int) -> int:
    """The rule as its text says it: noise for every token."""
    if sampling.temperature == 0:
        return int(np.argmax(logits))
    noise = gumbel(sampling.seed, index, np.arange(logits.size))
    x = (logits.astype(np.float64) - float(logits.max())) / sampling.temperature
    return max(kept_by(logits, sampling), key=lambda i: (x[i] + noise[i], -i))


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5, 40.0]),
    top_p=st.sampled_from([0.013, 0.2, 0.77, 0.96, 1.0]),
    top_k=st.sampled_from([0, 1, 2, 17, 700, 10**6]),
    min_p=st.sampled_from([0.0, 0.011, 0.3, 1.0]),
    seed=st.integers(0, 2**64 - 1),
)


@settings(max_examples=150, deadline=None)
@given(
    sampling=samplings,
    vocab=st.sampled_from([1, 2, 5, 300, 5000]),
    grid=st.booleans(),
    content=st.integers(0, 2**32),
    index=st.integers(0, MAX_NEW_TOKENS),
)
def test_sample_follows_the_rule(
    sampling: Sampling, vocab: int, grid: bool, content: int, index: int
) -> None:
    random = np.random.default_rng(content)
    logits = (3 * random.standard_normal(vocab)).astype(np.float32)
    if grid:  # many equal logits: order among them is by id
        logits = np.round(logits)
    assert sample(logits, sampling, index) == plainly(logits, sampling, index)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    temperature=st.sampled_from([1e-300, 1e-3, 0.5, 0.8, 5.0, MAX_TEMPERATURE]),
    spread=st.sampled_from([0.0, 1.0, 4.0, 60.0]),
    vocab=st.sampled_from([16_383, 16_384, 16_385, 49_152]),
)
def test_a_large_vocabulary_without_filters_draws_the_best_score(
    seed: int, temperature: float, spread: float, vocab: int
) -> None:
    """Leaving out what cannot win leaves out nothing that wins."""
    random = np.random.default_rng(seed)
    logits = (spread * random.standard_normal(vocab)).astype(np.float32)
    logits[random.integers(0, vocab, 5)] = -np.inf
    sampling = Sampling(temperature=temperature, seed=seed)
    with np.errstate(over="ignore"):
        x = (logits.astype(np.float64) - float(logits.max())) / temperature
    for index in range(4):
        scores = x + gumbel(seed, index, np.arange(vocab))
        assert sample(logits, sampling, index) == int(np.argmax(scores))


def test_greedy_takes_the_lowest_id_of_equal_logits() -> None:
    logits = np.array([1, 5, -2, 5, 5], np.float32)
    assert sample(logits, Sampling(seed=3), 9) == 1
    assert sample(logits, Sampling(temperature=1e-300), 9) in (1, 3, 4)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, seed=11),
        Sampling(temperature=0.7, top_p=0.9, seed=12),
        Sampling(temperature=1.3, top_k=7, seed=13),
        Sampling(temperature=1.0, min_p=0.1, seed=14),
    ],
)
def test_draws_follow_the_distribution(sampling: Sampling) -> None:
    logits = (2 * np.random.default_rng(5).standard_normal(40)).astype(np.float32)
    draws = 6000
    counts = np.bincount(
        [sample(logits, sampling, index) for index in range(draws)], minlength=logits.size
    )
    weights = np.exp((logits.astype(np.float64) - float(logits.max())) / sampling.temperature)
    kept = np.array(kept_by(logits, sampling))
    expected = weights[kept] / weights[kept].sum()
    print(f"seed {sampling.seed}")
    assert counts.sum() == counts[kept].sum() == draws
    many = expected * draws >= 5  # the others as one cell
    seen = np.append(counts[kept][many], counts[kept][~many].sum())
    wanted = np.append(expected[many], expected[~many].sum()) * draws
    wanted[-1] = max(wanted[-1], 1e-9)
    assert chi_square(seen, wanted) < 5


def test_neighbouring_indexes_draw_independently() -> None:
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1])).astype(np.float32)
    sampling, draws = Sampling(temperature=1.0, seed=29), 8_000
    print(f"seed {sampling.seed}")
    tokens = np.array([sample(logits, sampling, index) for index in range(draws)])
    p = np.exp(logits.astype(np.float64))
    pairs = np.bincount(tokens[:-1] * 4 + tokens[1:], minlength=16)
    assert chi_square(pairs, np.outer(p, p).ravel() * (draws - 1)) < 5


@given(samplings, st.integers(0, 2**32), st.integers(0, MAX_NEW_TOKENS), st.integers(-50, 50))
@settings(max_examples=100, deadline=None)
def test_a_constant_added_to_all_logits_changes_nothing(
    sampling: Sampling, content: int, index: int, more: int
) -> None:
    random = np.random.default_rng(content)
    logits = (random.integers(-(2**12), 2**12, 400) / 2**8).astype(np.float32)  # sums stay exact
    assert sample(logits + np.float32(more), sampling, index) == sample(logits, sampling, index)


def test_nearly_equal_logits_draw_the_same_token_nearly_always() -> None:
    """What the rule is for: beside the same weights drawn by one uniform number and their running
    sum over the sorted tokens, where a small change near the head moves everything behind it."""
    random = np.random.default_rng(3)
    sampling, positions, changed, moved = Sampling(temperature=0.8, seed=31), 1500, 0, 0
    print(f"seed {sampling.seed}")
    for index in range(positions):
        logits = (2.5 * random.standard_normal(1000)).astype(np.float32)
        near = logits + (0.03 * random.standard_normal(1000)).astype(np.float32)
        changed += sample(logits, sampling, index) != sample(near, sampling, index)
        chance = random.random()
        moved += inverse_cdf(logits, 0.8, chance) != inverse_cdf(near, 0.8, chance)
    assert changed < 0.06 * positions
    assert changed < moved / 3


def inverse_cdf(logits: NDArray[np.float32], temperature: float, chance: float) -> int:
    weights = np.exp((logits.astype(np.float64) - float(logits.max())) / temperature)
    order = np.argsort(-weights, kind="stable")
    sums = np.cumsum(weights[order])
    return int(order[np.searchsorted(sums, chance * sums[-1], side="right")])


def test_excluded_tokens_are_never_drawn() -> None:
    logits = np.full(1000, -np.inf, np.float32)
    logits[[17, 900]] = 0.0
    drawn = {sample(logits, Sampling(temperature=9.0, seed=1), index) for index in range(200)}
    assert drawn == {17, 900}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("bad", [np.nan, np.inf, None])
def test_broken_logits_are_an_error(temperature: float, bad: float | None) -> None:
    logits = np.zeros(50, np.float32)
    if bad is None:
        logits[:] = -np.inf
    else:
        logits[20] = bad
    with pytest.raises(Internal, match="not finite"):
        sample(logits, Sampling(temperature=temperature), 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", -0.1),
        ("temperature", MAX_TEMPERATURE * 1.01),
        ("top_p", 0.0),
        ("top_p", 1.0001),
        ("top_p", float("nan")),
        ("top_k", -1),
        ("top_k", MAX_TOP_K + 1),
        ("min_p", -0.01),
        ("min_p", 1.01),
        ("min_p", float("nan")),
        ("seed", -1),
        ("seed", 2**64),
    ],
)
def test_values_out_of_range_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(BadSampling, match=field) as caught:
        check_sampling_values(Sampling(**{field: value}), 10)
    assert caught.value.hint


@pytest.mark.parametrize("max_tokens", [0, -1, MAX_NEW_TOKENS + 1])
def test_max_tokens_out_of_range_is_refused(max_tokens: int) -> None:
    with pytest.raises(BadSampling, match="max_tokens"):
        check_sampling_values(Sampling(), max_tokens)


def test_the_whole_allowed_range_is_accepted() -> None:
    check_sampling_values(Sampling(), 1)
    check_sampling_values(
        Sampling(
            temperature=MAX_TEMPERATURE, top_p=1e-9, top_k=MAX_TOP_K, min_p=1.0, seed=2**64 - 1
        ),
        MAX_NEW_TOKENS,
    )
