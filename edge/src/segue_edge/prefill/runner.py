"""Runs one ONNX graph over a KV buffer in place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from segue_contract.errors import ModelMismatch
from segue_contract.model.manifest import ModelGeometry
from segue_edge.prefill.kv import Floats, PastKv
from segue_edge.prefill.providers import Device, session_options


class GraphRunner:
    """A graph of the model builder's form: `input_ids`, `attention_mask`, past and present KV.

    Its first output is float32 `[1, rows, columns]`: the logits of the last position, or a scorer's
    hidden states of all.
    """

    def __init__(self, session: ort.InferenceSession, geometry: ModelGeometry) -> None:
        self._session = session
        self._ones = np.ones((1, geometry.context), np.int64)
        (output,) = (o for o in session.get_outputs() if not o.name.startswith("present."))
        self._output = str(output.name)
        self._last_only = self._output == "logits"
        self._columns = geometry.vocab if self._last_only else geometry.hidden

    def run(self, ids: NDArray[np.int64], kv: PastKv) -> Floats:
        """Append `ids` to `kv`, which must have the room; the output `[rows, columns]`."""
        total = kv.length + len(ids)
        assert total <= kv.capacity
        rows = 1 if self._last_only else len(ids)
        result: Floats = np.empty((1, rows, self._columns), np.float32)
        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids[None]))
        binding.bind_cpu_input("attention_mask", self._ones[:, :total])
        binding.bind_ortvalue_output(self._output, ort.OrtValue.ortvalue_from_numpy(result))
        for name, value in kv.bound().items():
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        self._session.run_with_iobinding(binding)
        kv.length = total
        return result.reshape(rows, self._columns)


def open_session(path: Path, device: Device, threads: int) -> ort.InferenceSession:
    """Load a graph.

    Raises:
        ModelMismatch: it cannot be loaded.
    """
    try:
        return ort.InferenceSession(
            str(path), session_options(threads), providers=list(device.providers)
        )
    except Exception as error:  # onnxruntime raises classes of its own, all from Exception
        raise ModelMismatch(
            f"{path} cannot be loaded: {' '.join(str(error).split())[:300]}.",
            hint="Build the model again.",
        ) from error
