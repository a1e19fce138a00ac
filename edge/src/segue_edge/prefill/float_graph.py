"""A built model's float graph: the judge of its quality and the benchmark's peer, kept beside it.

It is no part of the model (nothing of the product runs it), so it is built from the cloud's weights
when it is first asked for, half a minute for the default model, and kept under the weights' digest.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from segue_contract.model.manifest import Manifest
from segue_edge.prefill.builder import build_float_graph
from segue_edge.prefill.exact import write_scorer
from segue_edge.prefill.graph import Graph

KEPT = ".bench"  # folder beside the models


def float_graph(
    directory: Path, manifest: Manifest, progress: Callable[[float, str], None]
) -> Path:
    """Path of the graph; the scorer lies beside it.

    Raises:
        MissingExtra, ModelBuildFailed: as `build_float_graph`.
    """
    home = directory.resolve().parent / KEPT / manifest.weights_digest
    path = home / "fp32" / "model.onnx"
    if path.is_file():
        return path
    home.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=home.parent))
    try:
        built = build_float_graph(directory, work, manifest.geometry.layers, progress)
        write_scorer(Graph.load(built), built.parent)
        if not path.is_file():  # another process may have been faster
            work.rename(home)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return path
