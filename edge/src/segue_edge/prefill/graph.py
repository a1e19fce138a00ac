"""An ONNX graph with its weights beside it: load, replace nodes, save with external data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

Array = NDArray[Any]
_INLINE_BYTES = 1024  # smaller tensors stay in the .onnx file
_ALIGN, _SMALL_ALIGN = 4096, 64  # whole pages let the runtime map a large tensor without a copy
_LARGE_BYTES = 65536


@dataclass(frozen=True)
class Loaded:
    """Where a weight came from, so that an unchanged one need not be written again."""

    folder: Path
    tensor: TensorProto
    value: Array


class Graph:
    """One model. `weights`: all initializers by name; nodes refer to them by that name."""

    def __init__(
        self, model: onnx.ModelProto, weights: dict[str, Array], loaded: dict[str, Loaded]
    ) -> None:
        self.model = model
        self.weights = weights
        self._loaded = loaded

    @property
    def nodes(self) -> list[NodeProto]:
        return list(self.model.graph.node)

    @classmethod
    def load(cls, path: Path) -> Graph:
        """Read a graph; weights in external files are mapped, not read."""
        model = onnx.load(path, load_external_data=False)
        weights = {t.name: _read(t, path.parent) for t in model.graph.initializer}
        loaded = {
            t.name: Loaded(path.parent, t, weights[t.name])
            for t in model.graph.initializer
            if t.data_location == TensorProto.EXTERNAL
        }
        del model.graph.initializer[:]
        return cls(model, weights, loaded)

    def copy(self) -> Graph:
        """A graph of its own whose weights are shared until they are replaced."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        return Graph(model, dict(self.weights), self._loaded)

    def weight_of(self, node: NodeProto) -> Array:
        return self.weights[node.input[1]]

    def matmuls(self) -> list[NodeProto]:
        """MatMul nodes with a constant second factor, `[inputs, outputs]`, in graph order."""
        return [n for n in self.nodes if n.op_type == "MatMul" and n.input[1] in self.weights]

    def replace_nodes(self, replacement: dict[str, list[NodeProto]]) -> None:
        """Put other nodes in the place of those named; unused weights are dropped."""
        nodes = [new for old in self.model.graph.node for new in replacement.get(old.name, [old])]
        del self.model.graph.node[:]
        self.model.graph.node.extend(nodes)
        used = {name for node in nodes for name in node.input}
        self.weights = {n: w for n, w in self.weights.items() if n in used}

    def add_outputs(self, names: Iterable[str], shape: list[Any]) -> None:
        for name in names:
            info = helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            self.model.graph.output.append(info)

    def drop_value_info(self) -> None:
        """Shape hints of replaced nodes would contradict the new ones; the runtime infers them."""
        del self.model.graph.value_info[:]

    def save(self, path: Path, shared: dict[str, Path] | None = None) -> None:
        """Write `path`, and its weights to `path` + ".data". Weights that were loaded from `path`'s
        folder and are unchanged stay where they are.

        `shared` names weights that lie in another file already or shall lie there: name -> file
        in the same folder; each such file holds one tensor from offset 0.
        """
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        # The builder lists operator sets in no fixed order; sorted, equal builds are equal files.
        operators = sorted(model.opset_import, key=lambda entry: entry.domain)
        del model.opset_import[:]
        model.opset_import.extend(operators)
        data_path = path.with_name(path.name + ".data")
        data_path.unlink(missing_ok=True)  # a session may still have the old file mapped
        with data_path.open("wb") as data:
            for name, weight in self.weights.items():
                place = (shared or {}).get(name)
                loaded = self._loaded.get(name)
                if loaded and loaded.value is weight and loaded.folder == path.parent:
                    tensor = loaded.tensor
                elif place is not None:
                    if not place.exists():
                        place.write_bytes(np.ascontiguousarray(weight).tobytes())
                    tensor = _external(name, weight, place.name, 0)
                elif weight.nbytes <= _INLINE_BYTES:
                    tensor = numpy_helper.from_array(np.ascontiguousarray(weight), name)
                else:
                    align = _ALIGN if weight.nbytes >= _LARGE_BYTES else _SMALL_ALIGN
                    data.write(b"\0" * (-data.tell() % align))
                    tensor = _external(name, weight, data_path.name, data.tell())
                    data.write(np.ascontiguousarray(weight).tobytes())
                model.graph.initializer.append(tensor)
        if data_path.stat().st_size == 0:
            data_path.unlink()
        path.write_bytes(model.SerializeToString())


def _read(tensor: TensorProto, folder: Path) -> Array:
    if tensor.data_location != TensorProto.EXTERNAL:
        return numpy_helper.to_array(tensor)
    entry = {e.key: e.value for e in tensor.external_data}
    return np.memmap(
        folder / entry["location"],
        dtype=helper.tensor_dtype_to_np_dtype(tensor.data_type),
        mode="r",
        offset=int(entry.get("offset", 0)),
        shape=tuple(tensor.dims),
    )


def _external(name: str, weight: Array, location: str, offset: int) -> TensorProto:
    tensor = TensorProto()
    tensor.name = name
    tensor.data_type = helper.np_dtype_to_tensor_dtype(weight.dtype)
    tensor.dims.extend(weight.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", weight.nbytes)):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)
    return tensor
