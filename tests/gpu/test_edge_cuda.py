"""The edge on a CUDA device: weight-only prefill, and the same next token as on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from segue_edge.prefill.providers import CPU, CUDA, Device
from segue_edge.prefill.runner import GraphRunner, open_session
from segue_edge.prefill.runtime import EdgeModel
from segue_edge.prefill.tensorrt import QDQ, QDQ_GRAPH, TENSORRT, may_use_qdq

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        CUDA not in ort.get_available_providers(),
        reason="this onnxruntime has no CUDA provider (segue[edge-gpu] brings it)",
    ),
]


def loaded(model_dir: Path) -> EdgeModel:
    on_cuda = EdgeModel.load(model_dir, providers="cuda")
    if on_cuda.device.name != "cuda":
        pytest.skip("the CUDA provider is there and no device that it can use")
    return on_cuda


def test_prefill_on_cuda_is_weight_only_and_agrees_with_the_cpu(model_dir: Path) -> None:
    on_cuda = loaded(model_dir)
    if on_cuda.recipe_name == QDQ:
        pytest.skip("TensorRT prefills here; the next test looks at it")
    assert on_cuda.recipe_name == "edge-weight-only"
    on_cpu = EdgeModel.load(model_dir, providers="cpu")
    tokens = list(range(300, 500))
    kv_cuda, kv_cpu = on_cuda.new_kv(256), on_cpu.new_kv(256)
    found = on_cuda.prefill(tokens, kv_cuda).logits
    for token in tokens[:-1]:
        on_cpu.decode_step(token, kv_cpu)
    expected = on_cpu.decode_step(tokens[-1], kv_cpu)
    assert np.corrcoef(found, expected)[0, 1] > 0.99
    assert found.argmax() == expected.argmax()


@pytest.mark.skipif(
    TENSORRT not in ort.get_available_providers(), reason="this onnxruntime has no TensorRT"
)
def test_tensorrt_prefills_in_int8_as_the_cpu_does(model_dir: Path) -> None:
    on_card = loaded(model_dir)
    if not may_use_qdq(on_card.manifest, model_dir):
        pytest.skip("the model has no graph for TensorRT: segue model tensorrt")
    if on_card.recipe_name != QDQ:
        pytest.skip("TensorRT's libraries are not installed")
    assert on_card.recipe == on_card.manifest.recipes[QDQ].recipe
    session = open_session(model_dir / QDQ_GRAPH, Device("cpu", (CPU,)), 0)
    tokens = list(range(300, 500))
    kv = on_card.new_kv(256)
    expected = GraphRunner(session, on_card.manifest.geometry).run(np.array(tokens), kv)
    found = on_card.prefill(tokens).logits
    assert np.corrcoef(found, expected.reshape(-1))[0, 1] > 0.99
