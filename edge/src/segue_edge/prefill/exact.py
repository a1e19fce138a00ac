"""The unquantised graph as a judge: hidden states, and so logits, at every position."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from segue_contract.model.manifest import ModelGeometry
from segue_edge.prefill.graph import Graph
from segue_edge.prefill.kv import Floats, PastKv
from segue_edge.prefill.providers import CPU, Device
from segue_edge.prefill.runner import GraphRunner, open_session

SCORER = "scorer.onnx"


def write_scorer(graph: Graph, folder: Path) -> Path:
    """The same graph with the final norm's output in place of the logits; shares its weights.

    `folder` is where the float graph lies. Returns the path written.
    """
    scorer = graph.copy()
    head = next(n for n in scorer.nodes if n.output[0] == "logits")
    before = {name: node for node in scorer.nodes for name in node.output}
    node = before[head.input[0]]
    while node.op_type in ("Gather", "Unsqueeze"):  # the builder's choice of the last position
        source = node.input[0]
        node = before[source]
    (output,) = (o for o in scorer.model.graph.output if o.name == "logits")
    scorer.model.graph.output.remove(output)
    scorer.add_outputs([source], [None, None, None])
    path = folder / SCORER
    scorer.save(path)
    return path


class ExactModel:
    """Logits of every position: hidden states by the graph, then one product with the head."""

    def __init__(self, scorer: Path, geometry: ModelGeometry, head: Floats, threads: int) -> None:
        """`head`: float32 `[hidden, vocab]`. Raises ModelMismatch if `scorer` does not load."""
        self._head = head
        self._runner = GraphRunner(open_session(scorer, Device("cpu", (CPU,)), threads), geometry)

    def logits(self, tokens: Sequence[int], kv: PastKv, first: int = 0) -> Floats:
        """Append `tokens` to `kv`; `[len(tokens) - first, vocab]` logits after each of them from
        number `first` on: the head costs a third of the whole, so nobody should pay for rows that
        are not read."""
        kv.reserve(kv.length + len(tokens))
        hidden = self._runner.run(np.asarray(tokens, np.int64), kv)
        return np.asarray(hidden[first:] @ self._head, np.float32)
