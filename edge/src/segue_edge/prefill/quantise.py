"""Turns the builder's float graph into the two that the edge runs.

- `w8a8`: weights int8 with one scale per output channel, activations uint8 with one scale per
  call (ONNX Runtime's DynamicQuantizeLinear + MatMulIntegerToFloat). Prefill: many tokens a call.
- `weight_only`: MatMulNBits, 8 bit, blocks of 32. Decode: one token a call, bound by memory.

The nodes are written here and not by `quantize_dynamic`: q, k, v share one activation
quantisation, as do gate and up; nothing passes through temporary files.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, helper
from onnxruntime.capi._pybind_state import quantize_matmul_8bits

from segue_edge.prefill.graph import Graph

MICROSOFT = "com.microsoft"
BLOCK = 32
EMBEDDING = "model.embed_tokens.weight"


def plain_embedding(graph: Graph) -> None:
    """Give tied embeddings a table of their own instead of a transposed view of the head.

    The builder writes Transpose(lm_head) -> Gather; the transpose is computed at every start.
    """
    transposes = {n.output[0]: n for n in graph.nodes if n.op_type == "Transpose"}
    for node in graph.nodes:
        source = transposes.get(node.input[0]) if node.op_type == "Gather" else None
        if source is None or source.input[0] not in graph.weights:
            continue
        graph.weights[EMBEDDING] = np.ascontiguousarray(graph.weights[source.input[0]].T)
        gather = helper.make_node(
            "Gather", [EMBEDDING, node.input[1]], list(node.output), node.name
        )
        graph.replace_nodes({node.name: [gather], source.name: []})
        return


def w8a8(graph: Graph, skip: Collection[str], weight_only_skip: Collection[str] = ()) -> None:
    """Quantise every MatMul but those named in `skip`; `weight_only_skip` become MatMulNBits."""
    replacement: dict[str, list[NodeProto]] = {}
    quantised: set[str] = set()
    for node in graph.matmuls():
        if node.name in weight_only_skip:
            replacement[node.name] = [_nbits(graph, node, accuracy_level=0)]
        elif node.name not in skip:
            replacement[node.name] = _w8a8_nodes(graph, node, quantised)
    graph.replace_nodes(replacement)
    graph.drop_value_info()
    _declare_domain(graph)


def weight_only(graph: Graph, accuracy_level: int) -> None:
    """Every MatMul becomes MatMulNBits; level 4 computes in int8, level 0 in float32."""
    graph.replace_nodes(
        {node.name: [_nbits(graph, node, accuracy_level)] for node in graph.matmuls()}
    )
    graph.drop_value_info()
    _declare_domain(graph)


def quantise_columns(
    weight: NDArray[np.float32],
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric int8 with one scale per column of `[inputs, outputs]`: largest magnitude = 127."""
    peak = np.abs(weight).max(axis=0)
    scale = np.where(peak > 0, peak / 127.0, 1.0).astype(np.float32)
    return np.rint(weight / scale).astype(np.int8), scale


def _w8a8_nodes(graph: Graph, node: NodeProto, quantised: set[str]) -> list[NodeProto]:
    source, name = node.input[0], node.input[1]
    values, scale = quantise_columns(graph.weights[name])
    graph.weights |= {
        f"{name}_q8": values,
        f"{name}_scale": scale,
        f"{name}_zero": np.zeros(scale.shape, np.int8),
    }
    x, x_scale, x_zero = (f"{source}_{part}" for part in ("q8", "scale", "zero"))
    nodes = []
    if source not in quantised:
        quantised.add(source)
        nodes.append(
            helper.make_node(
                "DynamicQuantizeLinear", [source], [x, x_scale, x_zero], f"{source}/Quantise"
            )
        )
    nodes.append(
        helper.make_node(
            "MatMulIntegerToFloat",
            [x, f"{name}_q8", x_scale, f"{name}_scale", x_zero, f"{name}_zero"],
            list(node.output),
            f"{node.name}_w8a8",
            domain=MICROSOFT,
        )
    )
    return nodes


def _nbits(graph: Graph, node: NodeProto, accuracy_level: int) -> NodeProto:
    name = node.input[1]
    packed_name, scale_name = f"{name}_b8", f"{name}_b8_scale"
    rows, columns = graph.weights[name].shape
    if packed_name not in graph.weights:
        packed, scales = quantise_blocks(np.asarray(graph.weights[name]))
        graph.weights |= {packed_name: packed, scale_name: scales}
    return helper.make_node(
        "MatMulNBits",
        [node.input[0], packed_name, scale_name],
        list(node.output),
        f"{node.name}_b8",
        domain=MICROSOFT,
        K=rows,
        N=columns,
        bits=8,
        block_size=BLOCK,
        accuracy_level=accuracy_level,
    )


def quantise_blocks(
    weight: NDArray[np.float32],
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """ONNX Runtime's own 8-bit blocks, symmetric: `[outputs, blocks, 32]` and one scale each."""
    rows, columns = weight.shape
    blocks = -(-rows // BLOCK)
    padded = np.zeros((blocks * BLOCK, columns), np.float32)
    padded[:rows] = weight
    packed = np.zeros((columns, blocks, BLOCK), np.uint8)
    scales = np.zeros((columns, blocks), np.float32)
    zeros = np.zeros((columns, blocks), np.uint8)
    quantize_matmul_8bits(packed, padded, scales, zeros, BLOCK, columns, rows, True)
    return packed, scales


def _declare_domain(graph: Graph) -> None:
    if all(entry.domain != MICROSOFT for entry in graph.model.opset_import):
        graph.model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
