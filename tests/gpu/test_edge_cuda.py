"""The edge on a CUDA device: weight-only prefill, and the same next token as on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from segue_edge.prefill.providers import CUDA
from segue_edge.prefill.runtime import EdgeModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        CUDA not in ort.get_available_providers(),
        reason="this onnxruntime has no CUDA provider (segue[edge-gpu] brings it)",
    ),
]


def test_prefill_on_cuda_is_weight_only_and_agrees_with_the_cpu(model_dir: Path) -> None:
    on_cuda = EdgeModel.load(model_dir, providers="cuda")
    if on_cuda.device.name != "cuda":
        pytest.skip("the CUDA provider is there and no device that it can use")
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
