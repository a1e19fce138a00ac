"""The graph for TensorRT: constant scales around both factors, computed here by the CPU; and who
may run which INT8 graph."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from segue_contract.errors import ModelMismatch
from segue_contract.kv.layout import KvRecipe
from segue_contract.model.gate import Measured
from segue_contract.model.manifest import Manifest, Quality
from segue_edge.prefill.export import EDGE_QUANT
from segue_edge.prefill.graph import Graph
from segue_edge.prefill.providers import CPU, CUDA, forbid_dynamic_int8, prefill_graph
from segue_edge.prefill.qdq import (
    QDQ_QUANT,
    Built,
    enter,
    heavier_at,
    int8_share,
    measure_ranges,
    quantise_qdq,
    range_of,
)
from segue_edge.prefill.tensorrt import (
    QDQ,
    QDQ_GRAPH,
    TENSORRT,
    engine_cache,
    may_use_qdq,
    open_qdq,
    tensorrt_device,
)
from tests.support.tiny_edge import MANIFEST

HIDDEN, FFN, VOCAB = 64, 96, 40
SEED = 9


def small_graph() -> Graph:
    """Embedding -> up -> square -> down -> head: after the square a few tokens are far larger."""
    print("weight seed", SEED)
    random = np.random.default_rng(SEED)

    def table(rows: int, columns: int) -> np.ndarray:
        return (random.standard_normal((rows, columns)) / rows**0.5).astype(np.float32)

    weights = {
        "table": random.standard_normal((50, HIDDEN)).astype(np.float32),
        "up": table(HIDDEN, FFN),
        "down": table(FFN, HIDDEN),
        "lm_head": table(HIDDEN, VOCAB),
    }
    weights["table"][0] *= 20
    node = helper.make_node
    nodes = [
        node("Gather", ["table", "input_ids"], ["x"], "embed"),
        node("Tanh", ["x"], ["t"], "tanh"),
        node("MatMul", ["t", "up"], ["u"], UP),
        node("Mul", ["x", "x"], ["xx"], "square"),
        node("ReduceSum", ["xx", "axes"], ["size"], "size", keepdims=1),
        node("Mul", ["u", "size"], ["h"], "product"),
        node("MatMul", ["h", "down"], ["y"], DOWN),
        node("MatMul", ["y", "lm_head"], ["logits"], HEAD),
    ]
    weights["axes"] = np.array([-1], np.int64)
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, None])
    mask = helper.make_tensor_value_info("attention_mask", TensorProto.INT64, [1, None])
    out = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, None, VOCAB])
    model = helper.make_model(
        helper.make_graph(nodes, "small", [ids, mask], [out]),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    return Graph(model, weights, {})


def run(graph: Graph, path: Path, ids: list[int]) -> np.ndarray:
    graph.save(path)
    session = ort.InferenceSession(str(path), providers=[CPU])
    given = np.array([ids], np.int64)
    feeds = {"input_ids": given, "attention_mask": np.ones_like(given)}
    return np.asarray(session.run(["logits"], feeds)[0][0])


WINDOWS = [list(range(25)), list(range(25, 50))]
UP, DOWN = "/layers.0/mlp/up_proj/MatMul", "/layers.0/mlp/down_proj/MatMul"
HEAD = "/lm_head/MatMul"


def test_ranges_are_those_of_the_text(tmp_path: Path) -> None:
    graph = small_graph()
    ranges = measure_ranges(graph, WINDOWS, tmp_path, 16, 1)
    assert set(ranges) == {"t", "h", "y"}
    values = np.tanh(graph.weights["table"])
    assert ranges["t"].peak == pytest.approx(np.abs(values).max(), rel=1e-5)
    assert ranges["t"].loss < 0.05 < 0.2 < ranges["h"].loss


def test_a_token_much_smaller_than_the_largest_loses_much() -> None:
    same = range_of(np.full(4, 1.0, np.float32), np.full(4, 0.5, np.float32))
    assert same.loss == pytest.approx(1 / 127 / 12**0.5 / 0.5)
    mixed = range_of(np.array([1000.0, 1.0], np.float32), np.array([500.0, 0.5], np.float32))
    assert mixed.loss > 0.5
    assert mixed.scale == pytest.approx(1000 / 127)
    assert range_of(np.zeros(3, np.float32), np.zeros(3, np.float32)).scale > 0


def test_what_one_scale_cannot_code_stays_heavier(tmp_path: Path) -> None:
    graph = small_graph()
    ranges = measure_ranges(graph, WINDOWS, tmp_path, 16, 1)
    assert heavier_at(graph, ranges, 0.1) == {DOWN, HEAD}
    assert heavier_at(graph, ranges, 1.0) == {HEAD}
    assert int8_share(graph, {DOWN, HEAD}) == pytest.approx(0.5)


def test_the_cpu_computes_the_graph_and_stays_close(tmp_path: Path) -> None:
    exact = run(small_graph(), tmp_path / "float.onnx", WINDOWS[1])
    errors = {}
    for level in (0.1, 1.0):
        graph = small_graph()
        ranges = measure_ranges(graph, WINDOWS, tmp_path, 16, 1)
        quantise_qdq(graph, ranges, heavier_at(graph, ranges, level))
        found = run(graph, tmp_path / "qdq.onnx", WINDOWS[1])
        errors[level] = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
    assert errors[0.1] < 0.03 < errors[1.0]


def test_scales_are_constants_and_nothing_is_quantised_as_it_runs(tmp_path: Path) -> None:
    """What TensorRT asks for: symmetric int8, one scale a tensor, one a column for weights."""
    graph = small_graph()
    ranges = measure_ranges(graph, WINDOWS, tmp_path, 16, 1)
    quantise_qdq(graph, ranges, {HEAD})
    kinds = {node.op_type for node in graph.nodes}
    assert {"QuantizeLinear", "DequantizeLinear", "MatMul", "MatMulNBits"} <= kinds
    assert not kinds & {"DynamicQuantizeLinear", "MatMulInteger", "MatMulIntegerToFloat"}
    for node in graph.nodes:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale, zero = (graph.weights[name] for name in node.input[1:3])
            assert zero.dtype == np.int8
            assert not zero.any()
            assert scale.shape == zero.shape
            assert scale.ndim == (1 if node.input[0] in graph.weights else 0)
    assert graph.weights["up_qdq"].dtype == np.int8


def measured(codec: str, agreement: float) -> Measured:
    quality = Quality(agreement=agreement)
    return Measured(graph=QDQ, weight_quant=QDQ_QUANT, codec=codec, quality=quality)


def with_graph(directory: Path, *agreements: float) -> Manifest:
    (directory / "edge").mkdir(exist_ok=True)
    (directory / QDQ_GRAPH).write_bytes(b"graph")
    (directory / f"{QDQ_GRAPH}.data").write_bytes(b"weights")
    rows = [measured(c, a) for c, a in zip(("k8v8", "k8v4"), agreements, strict=True)]
    return enter(MANIFEST, Built(rows, frozenset(), 1.0), 0.03, directory)


def test_the_gate_decides_which_recipes_are_allowed(tmp_path: Path) -> None:
    manifest = with_graph(tmp_path, 0.99, 0.98)
    assert manifest.recipes[QDQ].recipe.codec == "k8v4", "the cheapest that is allowed"
    assert set(manifest.files) == {QDQ_GRAPH, f"{QDQ_GRAPH}.data"}
    manifest = with_graph(tmp_path, 0.98, 0.95)
    assert manifest.recipes[QDQ].recipe.codec == "k8v8"
    assert not manifest.recipes["edge-qdq-k8v4"].allowed
    assert manifest.recipes[QDQ].recipe.digest in manifest.allowed_recipes()
    refused = with_graph(tmp_path, 0.96, 0.95)
    assert refused.recipes[QDQ].recipe.digest not in refused.allowed_recipes()
    assert refused.recipes["edge"] == MANIFEST.recipes["edge"]


def test_tensorrt_runs_only_what_the_gate_let_pass(tmp_path: Path) -> None:
    everything = (TENSORRT, CUDA, CPU)
    manifest = with_graph(tmp_path, 0.99, 0.98)
    assert may_use_qdq(manifest, tmp_path, everything)
    assert not may_use_qdq(manifest, tmp_path, (CUDA, CPU))
    assert not may_use_qdq(MANIFEST, tmp_path, everything)
    assert not may_use_qdq(with_graph(tmp_path, 0.9, 0.9), tmp_path, everything)
    (tmp_path / QDQ_GRAPH).unlink()
    assert not may_use_qdq(manifest, tmp_path, everything)
    assert open_qdq(tmp_path, manifest, 1, 256) is None


def test_compiled_engines_belong_to_one_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    manifest = with_graph(tmp_path, 0.99, 0.98)
    cache = engine_cache(manifest)
    assert cache.is_relative_to(tmp_path / "cache")
    (tmp_path / QDQ_GRAPH).write_bytes(b"another")
    rows = [measured("k8v8", 0.99)]
    other = enter(MANIFEST, Built(rows, frozenset(), 1.0), 0.03, tmp_path)
    assert engine_cache(other) != cache
    (first, options), *rest = tensorrt_device(cache).providers
    assert (first, rest) == (TENSORRT, [CUDA, CPU])
    assert options["trt_engine_cache_path"] == str(cache)
    assert options["trt_engine_cache_enable"] == options["trt_int8_enable"] == "1"


def test_a_card_never_runs_the_graph_that_quantises_as_it_runs() -> None:
    assert prefill_graph((CUDA, CPU)) == "decode"
    assert prefill_graph((CPU,)) == "prefill"
    with pytest.raises(ModelMismatch, match="quantises as it runs"):
        forbid_dynamic_int8((CUDA, CPU), EDGE_QUANT)
    forbid_dynamic_int8((CPU,), EDGE_QUANT)
    forbid_dynamic_int8((TENSORRT, CUDA, CPU), QDQ_QUANT)
    forbid_dynamic_int8((CUDA, CPU), "none")


def test_its_kv_has_a_recipe_of_its_own() -> None:
    """Blocks of different graphs must never be taken for each other."""
    names = {EDGE_QUANT, QDQ_QUANT, "none"}
    base = KvRecipe(weights_digest="0" * 32, weight_quant="", rope="x")
    digests = {msgspec.structs.replace(base, weight_quant=name).digest for name in names}
    assert len(digests) == 3
