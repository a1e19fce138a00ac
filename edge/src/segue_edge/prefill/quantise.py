"""Turns the builder's float graph into the two that the edge runs.

- `w8a8`: int8 weights, one scale per output channel; 8-bit activations, one scale per token.
  Prefill: many tokens a call.
- `weight_only`: MatMulNBits, 8 bit, blocks of 32. Decode: one token a call, bound by memory.

The nodes are written here and not by `quantize_dynamic`, whose activations share one scale per
call: a few tokens (the first above all) are hundreds of times larger than the rest in down_proj's
input and take the resolution from all others. One scale per token costs little (the smoothed
default model: agreement 0.983 instead of 0.966, at the same speed) and makes a token's KV
independent of the chunk it was computed in, so equal prefixes have equal KV.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, helper
from onnxruntime.capi._pybind_state import quantize_matmul_8bits

from segue_edge.prefill.graph import Graph
from segue_edge.prefill.runner import LOGITS
from segue_edge.prefill.smooth import find_sites

MICROSOFT = "com.microsoft"
BLOCK = 32
TABLE_BLOCK = 64  # of the lookup table and the head: half the scales, a fiftieth of a graph's bytes
EMBEDDING = "model.embed_tokens.weight"
EMBEDDING_Q8, EMBEDDING_SCALE = f"{EMBEDDING}_b8", f"{EMBEDDING}_b8_scale"
_MIDDLE = 128  # what zero is as uint8
# Constants of the nodes below, by name.
_CONSTANTS: dict[str, NDArray[Any]] = {
    "w8a8.last_axis": np.array([-1], np.int64),
    "w8a8.step": np.array(1 / 127, np.float32),
    "w8a8.smallest": np.array(1e-10, np.float32),  # a row of zeros must not divide by zero
    "w8a8.middle": np.array(_MIDDLE, np.uint8),
    "w8a8.one": np.array(1.0, np.float32),
}
_ROW_ZEROS = "w8a8.row_zeros"


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


def quantise_embedding(graph: Graph) -> None:
    """Keep the table of `plain_embedding` as 8-bit blocks; a run restores the rows that it reads.

    With tied embeddings table and scales equal the head's, byte for byte, so that both can lie in
    one file (`Graph.save`). A hidden size that is no multiple of the block stays in float32.
    """
    for node in graph.nodes:
        if node.op_type != "Gather" or node.input[0] != EMBEDDING:
            continue
        vocab, hidden = graph.weights[EMBEDDING].shape
        block = table_block(hidden)
        if hidden % block:
            return
        packed, scales = quantise_blocks(np.asarray(graph.weights[EMBEDDING]).T, block)
        graph.weights |= {EMBEDDING_Q8: packed.reshape(vocab, hidden), EMBEDDING_SCALE: scales}
        gather = helper.make_node(
            "GatherBlockQuantized",
            [EMBEDDING_Q8, node.input[1], EMBEDDING_SCALE],
            list(node.output),
            node.name,
            domain=MICROSOFT,
            bits=8,
            block_size=block,
            gather_axis=0,
            quantize_axis=1,
        )
        graph.replace_nodes({node.name: [gather]})
        _declare_domain(graph)
        return


def w8a8(graph: Graph, heavier: Collection[str], *, unsigned: bool | None = None) -> None:
    """Quantise every MatMul; those named in `heavier` become MatMulNBits: those that see one token
    a call, and matrices whose activations need a scale per block instead of one per token.

    `unsigned`: weights as uint8 around 128 instead of int8: same numbers, other machine code;
    None: what this machine computes exactly.
    """
    unsigned = not has_exact_mixed_dot() if unsigned is None else unsigned
    replacement: dict[str, list[NodeProto]] = {}
    quantised: set[str] = set()
    late = _late_scales(graph, frozenset(heavier))
    unscaled = {node.name for node in late.values()}
    for node in graph.matmuls():
        if node.name in heavier:
            replacement[node.name] = [_nbits(graph, node, accuracy_level=4)]
            continue
        source = node.input[0]
        nodes = [] if source in quantised else _quantise_rows(source, late.get(source))
        quantised.add(source)
        row_scale = _part(source, "row_scale" if source in late else "scale")
        product = _w8a8_product(graph, node, unsigned, None if node.name in unscaled else row_scale)
        replacement[node.name] = [*nodes, *product]
    graph.weights |= _CONSTANTS
    first = graph.nodes[0]
    shape = helper.make_node("Shape", ["input_ids"], ["w8a8.tokens"], "w8a8/tokens", start=1)
    zeros = helper.make_node(
        "Expand", ["w8a8.middle", "w8a8.tokens"], [_ROW_ZEROS], "w8a8/row_zeros"
    )
    replacement[first.name] = [shape, zeros, *replacement.get(first.name, [first])]
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


def has_exact_mixed_dot() -> bool:
    """This CPU multiplies uint8 by int8 without saturating between (VNNI, or not an x86).

    Elsewhere x86's vpmaddubsw clips sums of two products to 16 bits, and results go wrong.
    """
    if platform.machine().lower() not in ("x86_64", "amd64", "i686"):
        return True
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return "avx512_vnni" in flags or "avx_vnni" in flags


def quantise_columns(
    weight: NDArray[np.float32],
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric int8 with one scale per column of `[inputs, outputs]`: largest magnitude = 127."""
    peak = np.abs(weight).max(axis=0)
    scale = np.where(peak > 0, peak / 127.0, 1.0).astype(np.float32)
    return np.rint(weight / scale).astype(np.int8), scale


def table_block(hidden: int) -> int:
    """Inputs that share a scale in the lookup table and the head, which may be one table."""
    return TABLE_BLOCK if hidden % TABLE_BLOCK == 0 else BLOCK


def quantise_blocks(
    weight: NDArray[np.float32], block: int = BLOCK
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """ONNX Runtime's own 8-bit blocks, symmetric: `[outputs, blocks, block]` and a scale each."""
    rows, columns = weight.shape
    blocks = -(-rows // block)
    padded = np.zeros((blocks * block, columns), np.float32)
    padded[:rows] = weight
    packed = np.zeros((columns, blocks, block), np.uint8)
    scales = np.zeros((columns, blocks), np.float32)
    zeros = np.zeros((columns, blocks), np.uint8)
    quantize_matmul_8bits(packed, padded, scales, zeros, block, columns, rows, True)
    return packed, scales


def _late_scales(graph: Graph, heavier: frozenset[str]) -> dict[str, NodeProto]:
    """Activation -> the projection among its factors whose scale per token can be left out.

    silu(gate) * up is quantised by its own largest value in each token, so a factor per token
    changes none of its 8-bit values: up_proj's is multiplied into the scale of down_proj's result,
    one number a token instead of one a channel.
    """
    by_weight = {node.input[1]: node for node in graph.matmuls()}
    readers = Counter(name for node in graph.nodes for name in node.input)
    found = {}
    for site in find_sites(graph):
        if not site.absorbs_columns:
            continue
        up = by_weight[site.absorber]
        names = {up.name, *(n.name for n in site.readers)}
        if readers[up.output[0]] == 1 and heavier.isdisjoint(names):
            found[site.activation] = up
    return found


def _part(source: str, part: str) -> str:
    """Name of a value that belongs to the quantised activation `source`."""
    return f"{source}/{part}"


def _quantise_rows(source: str, late: NodeProto | None) -> list[NodeProto]:
    """`source` `[1, tokens, channels]` -> uint8 around 128, and a scale per token `[1, tokens, 1]`.

    QuantizeLinear takes one scale per index of an axis, also one computed in the graph.
    `late`: the projection whose scale `source` lacks; then "row_scale" has both.
    """
    names = {
        part: _part(source, part)
        for part in ("abs", "peak", "raw", "scale", "flat", "q8", "row_scale")
    }
    steps: list[tuple[str, list[str], str, dict[str, Any]]] = [
        ("Abs", [source], "abs", {}),
        ("ReduceMax", [names["abs"], "w8a8.last_axis"], "peak", {"keepdims": 1}),
        ("Mul", [names["peak"], "w8a8.step"], "raw", {}),
        ("Max", [names["raw"], "w8a8.smallest"], "scale", {}),
        ("Reshape", [names["scale"], "w8a8.last_axis"], "flat", {}),
        ("QuantizeLinear", [source, names["flat"], _ROW_ZEROS], "q8", {"axis": 1}),
    ]
    if late is not None:
        factors = [names["scale"], _part(late.input[0], "scale")]
        steps.append(("Mul", factors, "row_scale", {}))
    return [
        helper.make_node(kind, inputs, [names[part]], names[part], **options)
        for kind, inputs, part, options in steps
    ]


def _w8a8_product(
    graph: Graph, node: NodeProto, unsigned: bool, row_scale: str | None
) -> list[NodeProto]:
    """`row_scale`: a factor per token of the result; None: the result stays without it."""
    source, name, output = node.input[0], node.input[1], node.output[0]
    values, scale = quantise_columns(graph.weights[name])
    weight = (values.astype(np.int16) + _MIDDLE).astype(np.uint8) if unsigned else values
    zero = np.full(scale.shape, _MIDDLE if unsigned else 0, weight.dtype)
    zero_name = f"w8a8.zero_{zero.size}"  # one for all matrices of this width
    graph.weights |= {f"{name}_q8": weight, f"{name}_scale": scale, zero_name: zero}
    inputs = [_part(source, "q8"), f"{name}_q8", "w8a8.one", f"{name}_scale", "w8a8.middle"]
    unscaled = output if row_scale is None else _part(output, "unscaled")
    product = helper.make_node(
        "MatMulIntegerToFloat",
        [*inputs, zero_name],
        [unscaled],
        f"{node.name}_w8a8",
        domain=MICROSOFT,
    )
    if row_scale is None:
        return [product]
    rescale = helper.make_node("Mul", [unscaled, row_scale], [output], f"{node.name}_rescale")
    return [product, rescale]


def _nbits(graph: Graph, node: NodeProto, accuracy_level: int) -> NodeProto:
    name = node.input[1]
    packed_name, scale_name = f"{name}_b8", f"{name}_b8_scale"
    rows, columns = graph.weights[name].shape
    block = table_block(rows) if node.output[0] == LOGITS else BLOCK
    packed, scales = quantise_blocks(np.asarray(graph.weights[name]), block)
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
        block_size=block,
        accuracy_level=accuracy_level,
    )


def _declare_domain(graph: Graph) -> None:
    if all(entry.domain != MICROSOFT for entry in graph.model.opset_import):
        graph.model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
