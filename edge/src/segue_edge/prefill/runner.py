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

LOGITS, LAST_HIDDEN = "logits", "last_hidden"
HEAD_FILE = "head.onnx"


class GraphRunner:
    """A graph of the model builder's form: `input_ids`, `attention_mask`, past and present KV.

    Its first output is float32 `[1, rows, columns]`: the logits of the last position, its hidden
    state where the head is a graph of its own, or a scorer's hidden states of all.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        geometry: ModelGeometry,
        in_place: bool = True,
        head: ort.InferenceSession | None = None,
    ) -> None:
        """`in_place`: the graph runs where the buffer lies. On another device the past is copied
        there and what was added is copied back. `head`: for a graph that ends before it.

        Raises:
            ModelMismatch: the graph is one of other sizes.
        """
        check_sizes(session, geometry)
        self._session = session
        self._in_place = in_place
        self._head = head
        self._ones = np.ones((1, 1024), np.int64)
        (output,) = (o for o in session.get_outputs() if not o.name.startswith("present."))
        self._output = str(output.name)
        self._last_only = self._output in (LOGITS, LAST_HIDDEN)
        self._columns = geometry.vocab if self._output == LOGITS else geometry.hidden

    @property
    def lacks_head(self) -> bool:
        """The graph ends before the head, and there is none."""
        return self._output == LAST_HIDDEN and self._head is None

    def run(self, ids: NDArray[np.int64], kv: PastKv) -> Floats:
        """Append `ids` to `kv`, which must have the room; the output `[rows, columns]`."""
        total = kv.length + len(ids)
        assert total <= kv.capacity
        if not self._in_place:
            return self._run_by_copy(ids, kv)
        rows = 1 if self._last_only else len(ids)
        result: Floats = np.empty((1, rows, self._columns), np.float32)
        binding = kv.binding(self._session)
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids[None]))
        binding.bind_cpu_input("attention_mask", self._mask(total))
        binding.bind_ortvalue_output(self._output, ort.OrtValue.ortvalue_from_numpy(result))
        self._session.run_with_iobinding(binding)
        kv.length = total
        return result.reshape(rows, self._columns)

    def _mask(self, tokens: int) -> NDArray[np.int64]:
        """`[1, tokens]` ones: no token is masked."""
        if self._ones.shape[1] < tokens:
            self._ones = np.ones((1, 2 * tokens), np.int64)
        return self._ones[:, :tokens]

    def logits(self, output: Floats) -> Floats:
        """Float32 `[vocab]` from what `run` returned.

        `lacks_head` must be false.
        """
        if self._output == LOGITS:
            return output.reshape(-1)
        assert self._output == LAST_HIDDEN
        assert self._head is not None
        (logits,) = self._head.run([LOGITS], {LAST_HIDDEN: output[None]})
        return np.asarray(logits, np.float32).reshape(-1)

    def _run_by_copy(self, ids: NDArray[np.int64], kv: PastKv) -> Floats:
        start, total = kv.length, kv.length + len(ids)
        feeds: dict[str, NDArray[np.generic]] = {
            "input_ids": np.ascontiguousarray(ids[None]),
            "attention_mask": self._mask(total),
        }
        names = [self._output]
        for layer in range(kv.geometry.layers):
            for side, values in (("key", kv.k), ("value", kv.v)):
                past = np.ascontiguousarray(values[layer : layer + 1, :, :start])
                feeds[f"past_key_values.{layer}.{side}"] = past
                names.append(f"present.{layer}.{side}")
        output, *present = self._session.run(names, feeds)
        for index, value in enumerate(present):
            target = kv.v if index % 2 else kv.k
            target[index // 2, :, start:total] = value[0, :, start:total]
        kv.length = total
        return np.asarray(output, np.float32).reshape(-1, self._columns)


def check_sizes(session: ort.InferenceSession, geometry: ModelGeometry) -> None:
    """Compare a graph's form with the sizes that the manifest says.

    Raises:
        ModelMismatch: they differ; somebody edited the manifest or put another graph there.
    """
    past = {i.name: i.shape for i in session.get_inputs() if i.name.startswith("past_key_values.")}
    # The builder names sizes that it leaves open.
    heads = {shape[1] for shape in past.values() if isinstance(shape[1], int)}
    dims = {shape[3] for shape in past.values() if isinstance(shape[3], int)}
    (columns,) = [o.shape[-1] for o in session.get_outputs() if o.name == LOGITS] or [None]
    wrong = ""
    if len(past) != 2 * geometry.layers:
        wrong = f"{geometry.layers} layers, the graph {len(past) // 2}"
    elif heads - {geometry.kv_heads}:
        wrong = f"{geometry.kv_heads} KV heads, the graph {min(heads)}"
    elif dims - {geometry.head_dim}:
        wrong = f"heads of {geometry.head_dim}, the graph of {min(dims)}"
    elif isinstance(columns, int) and columns != geometry.vocab:
        wrong = f"a vocabulary of {geometry.vocab}, the graph {columns}"
    if wrong:
        raise ModelMismatch(
            f"The manifest and an edge graph do not fit: the manifest has {wrong}.",
            hint="One of them was changed: build the model again.",
        )


def open_head(folder: Path, device: Device, threads: int) -> ort.InferenceSession | None:
    """The head beside a folder's graphs; None where they have their own. Load it before them: its
    table is the largest tensor, so that its unpacked form is gone before they fill the memory.

    Raises:
        ModelMismatch: it cannot be loaded.
    """
    path = folder / HEAD_FILE
    return open_session(path, device, threads) if path.is_file() else None


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
