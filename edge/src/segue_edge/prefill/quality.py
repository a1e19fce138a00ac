"""What the edge's quantisation costs the reply: its KV, read by the unquantised model.

A window is split in two. The edge prefills the first half; the exact model scores the second half
on that KV, and once more on its own. The measures compare the two, position by position:

    agreement            share of positions where both would choose the same token
    mean_kl              mean over positions of KL(own || with the edge's KV), nats
    cross_entropy_change mean of -log p(the text's next token), with the edge's KV minus own
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from segue_contract.kv.layout import KvGeometry
from segue_contract.model.manifest import Quality
from segue_edge.prefill.kv import Floats, PastKv

WINDOW = 512  # tokens; the first half is context, the second is scored
_PROSE = ("assignment", "compound", "dynamic-features", "exceptions", "formatstrings", "imports")
_CODE = ("textwrap", "statistics", "graphlib", "calendar", "fractions", "shlex")


class Judge(Protocol):
    def logits(self, tokens: Sequence[int], kv: PastKv, first: int = 0) -> Floats: ...


# KV of some tokens, as the side under test makes it
Prefill = Callable[[Sequence[int]], PastKv]


@dataclass(frozen=True)
class WindowScore:
    """Of one window; `positions` are scored."""

    positions: int
    agreeing: int
    kl: float
    cross_entropy_change: float


def held_out_text() -> str:
    """Prose and code that nothing here was calibrated on and every Python carries.

    Chapters of the language reference (`pydoc_data`) and sources of the standard library, in turn,
    so that a small number of windows has both.
    """
    try:
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions leave it out; the code remains
        topics = {}
    parts = []
    for topic, module in zip(_PROSE, _CODE, strict=True):
        parts.append(str(topics.get(topic, ""))[:4000])
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.origin is not None:
            parts.append(Path(spec.origin).read_text(encoding="utf-8")[:4000])
    return "\n\n".join(parts)


def windows_of(tokens: Sequence[int], count: int, size: int = WINDOW) -> list[list[int]]:
    """Up to `count` whole windows, spread evenly over the text."""
    available = len(tokens) // size
    count = min(count, available)
    picked = [index * available // count for index in range(count)]
    return [list(tokens[i * size : (i + 1) * size]) for i in picked]


def score_windows(
    judge: Judge,
    geometry: KvGeometry,
    sides: Mapping[str, Prefill],
    windows: Sequence[Sequence[int]],
) -> Iterator[dict[str, WindowScore]]:
    """For each window the scores of all `sides`, which are ways to make KV."""
    for window in windows:
        half = len(window) // 2
        expected = judge.logits(window, PastKv(geometry, len(window)), half - 1)[:-1]
        scores = {}
        for name, prefill in sides.items():
            # The first scored position is predicted from the last token of the first half, so the
            # judge sees that token itself and gets the KV of those before it.
            given = prefill(window[:half])
            given.truncate(half - 1)
            found = judge.logits(window[half - 1 : -1], given)
            scores[name] = compare(expected, found, np.asarray(window[half:]))
        yield scores


def compare(expected: Floats, found: Floats, following: NDArray[np.integer]) -> WindowScore:
    """`expected`, `found`: `[positions, vocab]` logits; `following`: the text's own next tokens."""
    own, other = _log_softmax(expected), _log_softmax(found)
    rows = np.arange(len(following))
    return WindowScore(
        positions=len(following),
        agreeing=int((expected.argmax(axis=1) == found.argmax(axis=1)).sum()),
        kl=float((np.exp(own) * (own - other)).sum(axis=1).mean()),
        cross_entropy_change=float((own[rows, following] - other[rows, following]).mean()),
    )


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)), np.float32)


def summarise(scores: Sequence[WindowScore], text: str) -> Quality:
    """The scores of all windows as the manifest keeps them."""
    positions = sum(score.positions for score in scores)
    return Quality(
        agreement=sum(score.agreeing for score in scores) / positions,
        mean_kl=sum(score.kl for score in scores) / len(scores),
        cross_entropy_change=sum(score.cross_entropy_change for score in scores) / len(scores),
        windows=len(scores),
        text_sha256=hashlib.sha256(text.encode()).hexdigest(),
    )
