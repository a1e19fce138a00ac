"""The sampling rule against a plain reading of it, its random numbers, and its distribution."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from segue_contract.errors import BadSampling, Internal
from segue_contract.limits import MAX_NEW_TOKENS, MAX_TEMPERATURE, MAX_TOP_K
from segue_contract.sampling import check_sampling, philox, sample, uniform
from segue_contract.sync.ops import Sampling

ONES = 0xFFFFFFFF


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


def test_uniform_numbers_are_uniform_and_depend_on_seed_and_index_alone() -> None:
    assert uniform(0, 0) == ((0x6627E8D5 >> 5) * 2**26 + (0xE169C58D >> 6)) / 2**53
    numbers = np.array([uniform(seed, index) for seed in (0, 1, 2**63) for index in range(4000)])
    assert numbers.min() >= 0.0
    assert numbers.max() < 1.0
    assert len(np.unique(numbers)) == numbers.size
    share = np.histogram(numbers, bins=20, range=(0, 1))[0] / numbers.size
    assert np.abs(share - 0.05).max() < 0.01  # four standard deviations
    assert uniform(7, 2**32) != uniform(7, 0)
    assert uniform(2**32, 5) != uniform(0, 5)


def plainly(logits: NDArray[np.float32], sampling: Sampling, index: int) -> int:
    """The rule as its text says it, with every token sorted."""
    if sampling.temperature == 0:
        return int(np.argmax(logits))
    weights = np.exp((logits.astype(np.float64) - float(logits.max())) / sampling.temperature)
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    order = order[: sampling.top_k] if sampling.top_k else order
    total = sum(weights[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        kept.append(i)
        mass += weights[i]
        if sampling.top_p < 1.0 and mass >= sampling.top_p * total:
            break
    kept = [i for i in kept if weights[i] >= sampling.min_p]
    target = uniform(sampling.seed, index) * sum(weights[i] for i in kept)
    running = 0.0
    for i in kept:
        running += weights[i]
        if running > target:
            return i
    return kept[-1]


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
    order = np.argsort(-weights, kind="stable")
    kept = order[: sampling.top_k] if sampling.top_k else order
    shares = np.cumsum(weights[kept]) / weights[kept].sum()
    kept = kept[: int(np.searchsorted(shares, sampling.top_p)) + 1]
    kept = kept[weights[kept] >= sampling.min_p]
    expected = np.zeros(logits.size)
    expected[kept] = weights[kept] / weights[kept].sum()
    assert set(np.flatnonzero(counts)) <= set(kept.tolist())
    # 4.5 standard deviations of a binomial, and half a draw where few are expected
    bound = 4.5 * np.sqrt(expected * (1 - expected) / draws) + 0.5 / draws
    assert (np.abs(counts / draws - expected) <= bound).all()


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
        check_sampling(Sampling(**{field: value}), 10)
    assert caught.value.hint


@pytest.mark.parametrize("max_tokens", [0, -1, MAX_NEW_TOKENS + 1])
def test_max_tokens_out_of_range_is_refused(max_tokens: int) -> None:
    with pytest.raises(BadSampling, match="max_tokens"):
        check_sampling(Sampling(), max_tokens)


def test_the_whole_allowed_range_is_accepted() -> None:
    check_sampling(Sampling(), 1)
    check_sampling(
        Sampling(
            temperature=MAX_TEMPERATURE, top_p=1e-9, top_k=MAX_TOP_K, min_p=1.0, seed=2**64 - 1
        ),
        MAX_NEW_TOKENS,
    )
