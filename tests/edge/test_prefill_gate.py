"""The quality gate's arithmetic, on models whose every logit is known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from segue_contract.errors import BadVersion, InvalidArgument
from segue_contract.kv.layout import KvGeometry
from segue_edge.prefill import gate
from segue_edge.prefill.gate import Score, Split, cut_windows, split_for, through_codec
from segue_edge.prefill.kv import Floats, PastKv

SIZES = KvGeometry(layers=2, kv_heads=1, head_dim=4)
VOCAB = 16
SPLIT = Split(128, 32)


def kv_of(tokens: Sequence[int], capacity: int, noise: float = 0.0) -> PastKv:
    kv = PastKv(SIZES, capacity)
    random = np.random.default_rng(1)
    values = np.asarray(tokens, np.float32)[None, None, :, None] + np.zeros((2, 1, 1, 4))
    kv.k[:, :, : len(tokens)] = values + noise * random.standard_normal(values.shape)
    kv.v[:, :, : len(tokens)] = values
    kv.length = len(tokens)
    return kv


class Sums:
    """Next token = the sum of all tokens seen, read from the keys that it was given."""

    def logits(self, tokens: Sequence[int], kv: PastKv, first: int = 0) -> Floats:
        seen = float(kv.k[0, 0, : kv.length, 0].sum())
        rows = np.full((len(tokens), VOCAB), 0.0, np.float32)
        for row, token in enumerate(tokens):
            seen += token
            rows[row, round(seen) % VOCAB] = 5.0
        kv.length += len(tokens)
        return rows[first:]


def side(noise: float, first: int | None = None) -> gate.Side:
    def prefill(tokens: Sequence[int]) -> tuple[Floats, PastKv]:
        logits = np.zeros(VOCAB, np.float32)
        logits[sum(tokens) % VOCAB if first is None else first] = 1.0
        return logits, kv_of(tokens, len(tokens), noise)

    return prefill


def score(noise: float, codec: str = "k8v8", first: int | None = None) -> Score:
    random = np.random.default_rng(3)
    window = [int(token) for token in random.integers(0, 2, SPLIT.context + SPLIT.scored)]
    sides = {"it": side(noise, first)}
    return gate.score_window(Sums(), SIZES, sides, {"it": [codec]}, window, SPLIT)["it", codec]


def test_right_kv_loses_nothing_and_wrong_kv_all() -> None:
    same = score(0.0)
    assert (same.positions, same.agreeing, same.first_agrees) == (32, 32, True)
    assert same.right == same.own_right
    assert same.kl == pytest.approx(0, abs=1e-6)
    wrong = score(30.0)
    assert wrong.agreeing == 0  # the sum is off by one number for all positions
    assert wrong.kl > 1
    assert wrong.positions == 32


def test_the_first_token_is_the_graphs_own() -> None:
    right = sum(np.random.default_rng(3).integers(0, 2, 160)[:128]) % VOCAB
    assert score(0.0, first=int(right)).first_agrees
    assert not score(0.0, first=int(right + 1) % VOCAB).first_agrees


def test_a_summary_weighs_positions() -> None:
    scores = [
        Score(10, 10, 5, 5, 0.0, 0.0, True),
        Score(10, 6, 4, 5, 0.2, 0.1, False),
    ]
    quality = gate.summarise(scores, "text")
    assert quality.agreement == pytest.approx(0.8)
    assert quality.mean_kl == pytest.approx(0.1)
    assert quality.cross_entropy_change == pytest.approx(0.05)
    assert quality.relative_accuracy == pytest.approx(0.9)
    assert quality.first_token_agreement == pytest.approx(0.5)
    assert (quality.windows, quality.positions) == (2, 20)
    never_right = gate.summarise([Score(4, 4, 0, 0, 0.0, 0.0, True)], "")
    assert never_right.relative_accuracy == 1.0


def test_kv_goes_through_the_codec_and_sinks_through_none() -> None:
    kv = PastKv(SIZES, 128)
    random = np.random.default_rng(5)
    kv.k[...] = random.standard_normal(kv.k.shape)
    kv.v[...] = random.standard_normal(kv.v.shape)
    kv.length = 128
    errors = {}
    for codec in ("k8v8", "k8v4", "k4v4", "k4v4-sink4"):
        back = through_codec(kv, codec, 160)
        assert back.length == 128
        pairs = ((back.k, kv.k), (back.v, kv.v))
        errors[codec] = sum(np.abs(a[:, :, :128] - b[:, :, :128]) for a, b in pairs)
    assert 0 < errors["k8v8"].mean() < errors["k8v4"].mean() < errors["k4v4"].mean()
    half = errors["k4v4-sink4"][:, :, :4].max()
    assert half < 0.002 < errors["k4v4"][:, :, :4].max(), "the first four tokens stay float16"
    assert errors["k4v4-sink4"][:, :, 64:68].max() > 0.01, "of the first block only"
    with pytest.raises(BadVersion):
        through_codec(kv, "k2v2", 160)


def test_windows_score_no_position_twice() -> None:
    tokens = list(range(Split(512, 256).needed(20)))
    windows = cut_windows(tokens, 20, Split(512, 256))
    assert len(windows) == 20
    scored = [token for window in windows for token in window[512:]]
    assert len(scored) == len(set(scored)) == 20 * 256
    assert all(window == list(range(window[0], window[0] + 768)) for window in windows)
    assert cut_windows(tokens[:768], 1, Split(512, 256)) == [tokens[:768]]


def test_a_text_that_is_too_short_says_how_many_tokens_are_needed() -> None:
    with pytest.raises(InvalidArgument, match="5,632") as caught:
        cut_windows(list(range(3000)), 20, Split(512, 256))
    assert caught.value.fields["needed"] == 5632
    assert "--windows 9" in caught.value.hint
    with pytest.raises(InvalidArgument, match="768") as caught:
        cut_windows([1, 2, 3], 1, Split(512, 256))
    assert "--windows" not in caught.value.hint


def test_a_short_context_has_smaller_windows() -> None:
    assert split_for(8192) == split_for(768) == Split(512, 256)
    assert split_for(512) == Split(320, 160)
    with pytest.raises(InvalidArgument, match="context"):
        split_for(64)


def test_texts_that_cannot_be_used(tmp_path: Path) -> None:
    for name, data, words in (
        ("empty", b"", "empty"),
        ("blank", b" \n\t", "empty"),
        ("bytes", b"\xff\xfe\x00", "cannot be read"),
    ):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(InvalidArgument, match=words):
            gate.read_text(path)
    with pytest.raises(InvalidArgument, match="cannot be read"):
        gate.read_text(tmp_path / "missing")
    assert len(gate.package_text().split()) > 4000
