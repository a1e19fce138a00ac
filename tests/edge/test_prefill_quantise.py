"""The numbers behind the edge's graphs: smoothing is exact, quantisation errs within its step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from segue_edge.prefill import quantise
from segue_edge.prefill.export import shared_files
from segue_edge.prefill.graph import Graph
from segue_edge.prefill.head import split_head
from segue_edge.prefill.providers import CPU, Device
from segue_edge.prefill.quality import compare, summarise, windows_of
from segue_edge.prefill.runner import HEAD_FILE, LAST_HIDDEN, LOGITS, open_head
from segue_edge.prefill.smooth import STRENGTHS, find_sites, smooth

HIDDEN, FFN, OUT = 64, 128, 32


def mlp_graph(folder: Path) -> Graph:
    """norm -> gate, up -> silu(gate) * up -> down, with the builder's operators and layout."""
    random = np.random.default_rng(5)
    weights = {
        "norm": (1 + 0.1 * random.standard_normal(HIDDEN)).astype(np.float32),
        "gate": random.standard_normal((HIDDEN, FFN)).astype(np.float32) / 8,
        "up": random.standard_normal((HIDDEN, FFN)).astype(np.float32) / 8,
        "down": random.standard_normal((FFN, OUT)).astype(np.float32) / 11,
    }
    node = helper.make_node
    nodes = [
        node("Gather", ["table", "input_ids"], ["x"], "embed"),
        node("SimplifiedLayerNormalization", ["x", "norm"], ["n"], "ln", axis=-1, epsilon=1e-5),
        node("MatMul", ["n", "gate"], ["g"], "gate_proj"),
        node("MatMul", ["n", "up"], ["u"], "up_proj"),
        node("Sigmoid", ["g"], ["s"], "sigmoid"),
        node("Mul", ["g", "s"], ["a"], "silu"),
        node("Mul", ["a", "u"], ["h"], "product"),
        node("MatMul", ["h", "down"], ["y"], "down_proj"),
    ]
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, None])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, None, OUT])
    model = helper.make_model(
        helper.make_graph(nodes, "mlp", [ids], [out]),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    table = random.standard_normal((50, HIDDEN)).astype(np.float32)
    table[:, 3] *= 40  # a channel like those of real models
    table[0] *= 300  # and a token
    return Graph(model, {**weights, "table": table}, {})


def run(graph: Graph, folder: Path, ids: list[int]) -> np.ndarray:
    path = folder / "graph.onnx"
    graph.save(path)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["y"], {"input_ids": np.array([ids], np.int64)})[0][0])


IDS = list(range(40))


@pytest.mark.parametrize("strength", [0.3, 0.65, 1.0])
def test_smoothing_changes_no_result(tmp_path: Path, strength: float) -> None:
    graph = mlp_graph(tmp_path)
    before = run(graph, tmp_path, IDS)
    sites = find_sites(graph)
    assert [(s.activation, s.absorber) for s in sites] == [("n", "norm"), ("h", "up")]
    peaks = {
        "n": np.linspace(0.1, 50, HIDDEN).astype(np.float32),
        "h": np.linspace(0.01, 9, FFN).astype(np.float32),
    }
    smooth(graph, sites, peaks, dict.fromkeys(STRENGTHS, strength))
    np.testing.assert_allclose(run(graph, tmp_path, IDS), before, rtol=2e-4, atol=2e-4)


def mean_error(folder: Path, graph: Graph, **options: bool) -> float:
    """Of the quantised graph against the float one, relative to each token's largest output."""
    exact = run(mlp_graph(folder), folder, IDS)
    quantise.w8a8(graph, [], **options)
    assert not graph.matmuls()
    found = run(graph, folder, IDS)
    return float((np.abs(found - exact).max(axis=1) / np.abs(exact).max(axis=1)).mean())


@pytest.mark.parametrize("unsigned", [False, True])
def test_eight_bits_are_near_the_float_graph(tmp_path: Path, unsigned: bool) -> None:
    assert mean_error(tmp_path, mlp_graph(tmp_path), unsigned=unsigned) < 0.06


def test_smoothing_takes_most_of_the_error_of_large_channels(tmp_path: Path) -> None:
    graph = mlp_graph(tmp_path)
    plain = mean_error(tmp_path, mlp_graph(tmp_path))
    sites = find_sites(graph)
    peaks = {
        found.activation: peak
        for found, peak in zip(sites, activation_peaks(graph, tmp_path), strict=True)
    }
    smooth(graph, sites, peaks)
    assert mean_error(tmp_path, graph) < 0.6 * plain


def activation_peaks(graph: Graph, folder: Path) -> list[np.ndarray]:
    probe = graph.copy()
    probe.add_outputs(["n", "h"], [1, None, None])
    path = folder / "probe.onnx"
    probe.save(path)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(["n", "h"], {"input_ids": np.array([IDS], np.int64)})
    return [np.abs(value).max(axis=(0, 1)) for value in found]


def test_both_weight_types_compute_the_same(tmp_path: Path) -> None:
    if not quantise.has_exact_mixed_dot():
        pytest.skip("this CPU saturates in its mixed dot product, so the signed form is not used")
    results = []
    for unsigned in (False, True):
        graph = mlp_graph(tmp_path)
        quantise.w8a8(graph, [], unsigned=unsigned)
        results.append(run(graph, tmp_path, IDS))
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5, atol=1e-5)


def test_a_token_is_quantised_by_itself(tmp_path: Path) -> None:
    graph = mlp_graph(tmp_path)
    quantise.w8a8(graph, [])
    whole = run(graph, tmp_path, IDS)
    for part in (IDS[:1], IDS[7:20], IDS[20:]):  # with and without the huge token
        np.testing.assert_allclose(
            run(graph, tmp_path, part), whole[part[0] : part[-1] + 1], rtol=1e-5, atol=1e-5
        )


def test_a_scale_that_the_next_rounding_undoes_comes_late(tmp_path: Path) -> None:
    def rescaled(heavier: list[str]) -> set[str]:
        graph = mlp_graph(tmp_path)
        quantise.w8a8(graph, heavier)
        return {n.name.removesuffix("_rescale") for n in graph.nodes if n.name.endswith("_rescale")}

    assert rescaled([]) == {"gate_proj", "down_proj"}
    # Where down_proj reads floats, or up_proj writes them, nothing is left out.
    assert rescaled(["down_proj"]) == {"gate_proj", "up_proj"}
    assert rescaled(["up_proj"]) == {"gate_proj", "down_proj"}


def test_a_row_of_zeros_gives_zeros(tmp_path: Path) -> None:
    graph = mlp_graph(tmp_path)
    graph.weights["table"][7] = 0
    quantise.w8a8(graph, [])
    np.testing.assert_array_equal(run(graph, tmp_path, [7, 8])[0], 0)


@pytest.mark.parametrize("block", [quantise.BLOCK, quantise.TABLE_BLOCK])
def test_blocks_and_columns_err_by_half_a_step(block: int) -> None:
    weight = np.random.default_rng(2).standard_normal((64, 24)).astype(np.float32)
    values, scale = quantise.quantise_columns(weight)
    assert np.abs(values * scale - weight).max() <= scale.max() / 2 + 1e-6
    packed, scales = quantise.quantise_blocks(weight, block)
    assert packed.shape == (24, 64 // block, block)
    restored = (packed.astype(np.float32) - 128) * scales[:, :, None]
    error = np.abs(restored.reshape(24, 64).T - weight)
    assert error.max() <= np.abs(scales).max() / 2 + 1e-6


def test_saving_keeps_unchanged_weights_where_they_are(tmp_path: Path) -> None:
    graph = mlp_graph(tmp_path)
    graph.save(tmp_path / "a.onnx")
    loaded = Graph.load(tmp_path / "a.onnx")
    loaded.weights["down"] = np.asarray(loaded.weights["down"]) * 2
    loaded.save(tmp_path / "b.onnx")
    written = (tmp_path / "b.onnx.data").stat().st_size
    assert written == loaded.weights["down"].nbytes, "only what was changed"
    again = Graph.load(tmp_path / "b.onnx")
    np.testing.assert_array_equal(again.weights["down"], 2 * graph.weights["down"])
    np.testing.assert_array_equal(again.weights["up"], graph.weights["up"])


def test_quality_of_equal_and_of_different_logits() -> None:
    random = np.random.default_rng(9)
    logits = random.standard_normal((6, 11)).astype(np.float32)
    following = np.arange(6)
    same = compare(logits, logits, following)
    assert (same.agreeing, same.positions) == (6, 6)
    assert same.kl == pytest.approx(0, abs=1e-6)
    assert same.cross_entropy_change == pytest.approx(0, abs=1e-6)
    other = logits.copy()
    other[2, other[2].argmax()] -= 100
    worse = compare(logits, other, logits.argmax(axis=1))
    assert worse.agreeing == 5
    assert worse.kl > 0.1
    assert worse.cross_entropy_change > 1
    assert summarise([same, worse], "text").agreement == pytest.approx(11 / 12)


def test_windows_are_whole_and_spread() -> None:
    picked = windows_of(list(range(100)), 3, size=10)
    assert [w[0] for w in picked] == [0, 30, 60]
    assert all(len(w) == 10 for w in picked)
    assert windows_of(list(range(25)), 9, size=10) == [list(range(10)), list(range(10, 20))]


def test_the_table_of_8_bit_rows_is_near_the_float_one_and_lies_where_it_is_told(
    tmp_path: Path,
) -> None:
    graph = mlp_graph(tmp_path)
    (gather,) = (n for n in graph.nodes if n.op_type == "Gather")
    gather.input[0] = quantise.EMBEDDING
    table = graph.weights[quantise.EMBEDDING] = graph.weights.pop("table")
    quantise.quantise_embedding(graph)
    assert quantise.EMBEDDING not in graph.weights
    names = (quantise.EMBEDDING_Q8, quantise.EMBEDDING_SCALE)
    files = {name: tmp_path / f"{index}.bin" for index, name in enumerate(names)}
    exposed = graph.copy()
    exposed.add_outputs(["x"], [1, None, HIDDEN])
    exposed.save(tmp_path / "x.onnx", files)
    session = ort.InferenceSession(str(tmp_path / "x.onnx"), providers=["CPUExecutionProvider"])
    found = session.run(["x"], {"input_ids": np.array([IDS], np.int64)})[0][0]
    step = np.repeat(np.abs(graph.weights[names[1]]), quantise.table_block(HIDDEN), axis=1)[IDS]
    error = np.abs(found - table[IDS])
    assert (error <= step + 1e-6).all(), "half a step, and one at the range's shorter end"
    assert error.mean() < 0.3 * step.mean()
    assert files[names[0]].stat().st_size * 4 == table.nbytes


def test_only_equal_tables_share_a_file(tmp_path: Path) -> None:
    tied = shared_files("head", tmp_path, tied=True)
    assert tied["head_b8"] == tied[quantise.EMBEDDING_Q8]
    assert tied["head_b8_scale"] == tied[quantise.EMBEDDING_SCALE]
    own = shared_files("head", tmp_path, tied=False)
    assert len(set(own.values())) == len(own), "every array has a file of its own"
    assert tied[quantise.EMBEDDING] not in (tied["head_b8"], tied["head_b8_scale"])


def test_a_graph_and_its_head_apart_compute_what_they_do_together(tmp_path: Path) -> None:
    graph = mlp_graph(tmp_path)
    random = np.random.default_rng(6)
    graph.weights["head"] = random.standard_normal((OUT, 50)).astype(np.float32)
    node = helper.make_node
    graph.weights["last"] = np.array([-1], np.int64)
    graph.model.graph.node.extend(
        [
            node("Gather", ["y", "last"], ["picked"], "pruned", axis=1),
            node("MatMul", ["picked", "head"], [LOGITS], "lm_head"),
        ]
    )
    del graph.model.graph.output[:]
    graph.add_outputs([LOGITS], [1, 1, 50])
    ids = {"input_ids": np.array([[3, 1, 4, 1, 5]], np.int64)}
    graph.save(tmp_path / "whole.onnx")
    whole = ort.InferenceSession(str(tmp_path / "whole.onnx"), providers=[CPU])
    head = split_head(graph)
    assert "head" in head.weights
    assert "head" not in graph.weights
    graph.save(tmp_path / "rest.onnx")
    head.save(tmp_path / HEAD_FILE)
    rest = ort.InferenceSession(str(tmp_path / "rest.onnx"), providers=[CPU])
    top = open_head(tmp_path, Device("cpu", (CPU,)), 1)
    assert top is not None
    (hidden,) = rest.run([LAST_HIDDEN], ids)
    assert hidden.shape == (1, 1, OUT)
    (found,) = top.run([LOGITS], {LAST_HIDDEN: hidden})
    np.testing.assert_allclose(found, whole.run([LOGITS], ids)[0], rtol=1e-5, atol=1e-5)
