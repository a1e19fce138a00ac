"""A prompt's last layer, for the last position only: of the others only its keys and values count.

Behind the last attention nothing mixes positions any more and only the last position's logits are
asked for, so the choice of that position moves from the end of the graph to right behind it. No
number changes; of the default model's 30 layers it saves most of one.
"""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, helper

from segue_edge.prefill.graph import Graph

_INDEX = "last_layer.index"
# What computes each position by itself, and the builder's choice of the last one.
_BY_POSITION = frozenset(
    {
        "Add",
        "Gather",
        "MatMul",
        "Mul",
        "QuickGelu",
        "Sigmoid",
        "SimplifiedLayerNormalization",
        "SkipSimplifiedLayerNormalization",
        "Unsqueeze",
    }
)


def prune_last_layer(graph: Graph) -> frozenset[str]:
    """Let `graph`, which makes the logits of the last position, drop the other positions behind its
    last GroupQueryAttention, in place.

    Returns the names of the MatMul nodes that see one position a call from now on; none, and the
    graph unchanged, where something behind the attention is not known to keep positions apart.
    """
    attention = [n for n in graph.nodes if n.op_type == "GroupQueryAttention"]
    if not attention:
        return frozenset()
    behind = _behind(graph, attention[-1].output[0])
    if any(node.op_type not in _BY_POSITION for node in behind):
        return frozenset()
    inside = {name for node in behind for name in node.output}
    constants = {n.output[0] for n in graph.nodes if n.op_type == "Constant"} | graph.weights.keys()
    outside = dict.fromkeys(
        name
        for node in behind
        for name in node.input
        if name and name not in inside and name not in constants
    )
    graph.weights[_INDEX] = np.array([-1], np.int64)
    for node in behind:
        node.input[:] = [_last(n) if n in outside else n for n in node.input]
    choices = [
        helper.make_node("Gather", [name, _INDEX], [_last(name)], _last(name), axis=1)
        for name in outside
    ]
    graph.replace_nodes({behind[0].name: [*choices, behind[0]]})
    tail = {node.name for node in behind}
    return frozenset(n.name for n in graph.matmuls() if n.name in tail)


def _behind(graph: Graph, name: str) -> list[NodeProto]:
    """All nodes that need the value `name`, in graph order."""
    needed, found = {name}, []
    for node in graph.nodes:
        if not needed.isdisjoint(node.input):
            found.append(node)
            needed |= {output for output in node.output if output}
    return found


def _last(name: str) -> str:
    return f"{name}/last"
