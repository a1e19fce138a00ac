"""How often two computations of a reply draw the same token: same text, seed and index.

The text's windows are read by the exact model on its own KV, by the exact model on KV that the edge
made and shipped, and by the edge's own graphs: the first token from its prefill, the others from
its decode, as in a turn. Each position of the scored part is drawn from all three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from segue_contract.sampling import sample
from segue_contract.sync.ops import Sampling
from segue_edge.prefill.gate import Split, through_codec
from segue_edge.prefill.kv import Floats, PastKv
from segue_edge.prefill.quality import Judge
from segue_edge.prefill.runtime import EdgeModel

TEMPERATURE = 0.8
SEEDS = range(8)  # draws of each position: one alone leaves the share 0.3 % uncertain


@dataclass(frozen=True)
class Agreement:
    """Shares of draws that equal the exact model's on its own KV. `*_possible`: the most that any
    rule could reach with these logits, 1 minus the total variation distance."""

    edge: float
    shipped: float
    edge_possible: float
    shipped_possible: float


class Readers:
    """The three that read a window."""

    def __init__(self, edge: EdgeModel, exact: Judge) -> None:
        self._codec = edge.recipe.codec
        self._edge = edge
        self._exact = exact

    def read(self, window: Sequence[int], split: Split) -> tuple[Floats, Floats, Floats]:
        """Logits `[scored, vocab]`: exact on its own KV, exact on shipped KV, the edge's."""
        first = split.context - 1  # the last token of the context predicts the first scored one
        own = self._exact.logits(window[:-1], PastKv(self._edge.geometry, len(window)), first)
        done = self._edge.prefill(window[: split.context], room=split.scored)
        shipped = through_codec(done.kv, self._codec, len(window))
        shipped.truncate(first)
        given = self._exact.logits(window[first:-1], shipped)
        edge = np.empty_like(own)
        edge[0] = done.logits
        for place, token in enumerate(window[split.context : -1], 1):
            edge[place] = self._edge.decode_step(token, done.kv)
        return own, given, edge


def agreement(readers: Readers, windows: Sequence[Sequence[int]], split: Split) -> Agreement:
    found = []
    for window in windows:
        own, shipped, edge = readers.read(window, split)
        for index, logits in enumerate(zip(own, shipped, edge, strict=True)):
            found.append(_of_position(*logits, index))
    means = np.mean(found, axis=0)
    return Agreement(*means.tolist())


def _of_position(
    own: Floats, shipped: Floats, edge: Floats, index: int
) -> tuple[float, float, float, float]:
    rules = [Sampling(temperature=TEMPERATURE, seed=seed) for seed in SEEDS]
    expected = [sample(own, rule, index) for rule in rules]
    p = _shares(own)

    def share(logits: Floats) -> float:
        same = [sample(logits, rule, index) == e for rule, e in zip(rules, expected, strict=True)]
        return float(np.mean(same))

    def possible(logits: Floats) -> float:
        return float(np.minimum(p, _shares(logits)).sum())

    return share(edge), share(shipped), possible(edge), possible(shipped)


def _shares(logits: Floats) -> Floats:
    weights = np.exp((logits - logits.max()) / np.float32(TEMPERATURE))
    return np.asarray(weights / weights.sum(), np.float32)
