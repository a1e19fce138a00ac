"""The head as a graph of its own, `edge/head.onnx`: hidden state -> logits, for both edge graphs.

The head is the largest matrix of a small model, and ONNX Runtime packs a matrix once in every
session that has it. So neither graph has it: both end in the hidden state of the last position, and
one session, which is loaded first, makes the logits.
"""

from __future__ import annotations

from onnx import TensorProto, helper

from segue_edge.prefill.graph import Graph
from segue_edge.prefill.runner import LAST_HIDDEN, LOGITS


def split_head(graph: Graph) -> Graph:
    """Take the node that makes the logits out of `graph`, which then ends in `LAST_HIDDEN`.

    `graph` makes the logits of the last position only. Returns a graph of that node alone:
    float32 `LAST_HIDDEN` `[1, 1, hidden]` -> `LOGITS` `[1, 1, vocab]`.
    """
    head = graph.copy()
    (node,) = (n for n in head.nodes if n.output[0] == LOGITS)
    source = node.input[0]
    hidden = helper.make_tensor_value_info(LAST_HIDDEN, TensorProto.FLOAT, [1, 1, None])

    graph.replace_nodes({node.name: []})
    for other in graph.nodes:
        for names in (other.input, other.output):
            names[:] = [LAST_HIDDEN if name == source else name for name in names]
    rest = [output for output in graph.model.graph.output if output.name != LOGITS]
    del graph.model.graph.output[:]
    graph.model.graph.output.extend([hidden, *rest])

    node.input[0] = LAST_HIDDEN
    head.replace_nodes({n.name: [] for n in head.nodes if n.output[0] != LOGITS})
    (logits,) = (output for output in head.model.graph.output if output.name == LOGITS)
    for part, kept in ((head.model.graph.input, hidden), (head.model.graph.output, logits)):
        del part[:]
        part.append(kept)
    head.drop_value_info()
    return head
