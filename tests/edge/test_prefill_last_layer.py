"""Behind the last attention only the last position is computed, and its logits stay the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from segue_edge.prefill import quantise
from segue_edge.prefill.graph import Graph
from segue_edge.prefill.last_layer import prune_last_layer

HEADS, HEAD_DIM, HIDDEN, VOCAB = 2, 8, 16, 40


def one_layer(middle: str = "SimplifiedLayerNormalization") -> Graph:
    """embedding -> attention -> o_proj, residual, `middle` -> last position -> head."""
    random = np.random.default_rng(3)
    weights = {
        "table": random.standard_normal((VOCAB, HIDDEN)),
        "qkv": random.standard_normal((HIDDEN, 3 * HIDDEN)) / 4,
        "o": random.standard_normal((HIDDEN, HIDDEN)) / 4,
        "norm": 1 + 0.1 * random.standard_normal(HIDDEN),
        "head": random.standard_normal((HIDDEN, VOCAB)) / 4,
    }
    arrays = {name: value.astype(np.float32) for name, value in weights.items()}
    node = helper.make_node
    between = {
        "SimplifiedLayerNormalization": node(
            "SimplifiedLayerNormalization", ["sum", "norm"], ["n"], "norm", axis=-1, epsilon=1e-5
        ),
        "Softmax": node("Softmax", ["sum"], ["n"], "over positions", axis=1),
    }
    nodes = [
        node("Gather", ["table", "input_ids"], ["x"], "embed"),
        node("MatMul", ["x", "qkv"], ["packed"], "qkv_proj"),
        node(
            "GroupQueryAttention",
            ["packed", "", "", "past.key", "past.value", "before", "total"],
            ["attended", "present.key", "present.value"],
            "attention",
            domain=quantise.MICROSOFT,
            num_heads=HEADS,
            kv_num_heads=HEADS,
        ),
        node("MatMul", ["attended", "o"], ["out"], "o_proj"),
        node("Add", ["x", "out"], ["sum"], "residual"),
        between[middle],
        node("Constant", [], ["minus_one"], "minus_one", value_int=-1),
        node("Gather", ["n", "minus_one"], ["picked"], "pick", axis=1),
        node("MatMul", ["picked", "head"], ["logits"], "lm_head"),
    ]
    value, past = helper.make_tensor_value_info, [1, HEADS, None, HEAD_DIM]
    inputs = [value("input_ids", TensorProto.INT64, [1, None])]
    inputs += [value(f"past.{side}", TensorProto.FLOAT, past) for side in ("key", "value")]
    inputs += [value("before", TensorProto.INT32, [1]), value("total", TensorProto.INT32, [])]
    outputs = [value("logits", TensorProto.FLOAT, [1, VOCAB])]
    outputs += [value(f"present.{side}", TensorProto.FLOAT, past) for side in ("key", "value")]
    model = helper.make_model(
        helper.make_graph(nodes, "layer", inputs, outputs),
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid(quantise.MICROSOFT, 1)],
        ir_version=10,
    )
    return Graph(model, arrays, {})


def run(graph: Graph, folder: Path, tokens: int) -> list[np.ndarray]:
    graph.save(folder / "graph.onnx")
    session = ort.InferenceSession(str(folder / "graph.onnx"), providers=["CPUExecutionProvider"])
    empty = np.zeros((1, HEADS, 0, HEAD_DIM), np.float32)
    found = session.run(
        None,
        {
            "input_ids": np.arange(tokens)[None],
            "past.key": empty,
            "past.value": empty,
            "before": np.array([tokens - 1], np.int32),
            "total": np.array(tokens, np.int32),
        },
    )
    return [np.asarray(value) for value in found]


def test_logits_and_kv_stay_and_the_rest_is_one_position(tmp_path: Path) -> None:
    for tokens in (1, 7):
        graph = one_layer()
        before = run(graph, tmp_path, tokens)
        assert prune_last_layer(graph) == {"o_proj", "lm_head"}
        for found, expected in zip(run(graph, tmp_path, tokens), before, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
        graph.add_outputs(["out"], [1, None, HIDDEN])
        assert run(graph, tmp_path, tokens)[-1].shape == (1, 1, HIDDEN)


def test_a_graph_that_mixes_positions_later_is_left_alone(tmp_path: Path) -> None:
    graph = one_layer("Softmax")
    before = run(graph, tmp_path, 5)
    assert prune_last_layer(graph) == frozenset()
    np.testing.assert_array_equal(run(graph, tmp_path, 5)[0], before[0])
