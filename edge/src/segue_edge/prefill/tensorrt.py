"""Prefill in INT8 through TensorRT, where it is present and the model has the graph for it.

On a card only TensorRT reaches the INT8 rate, and only with the QDQ graph that `segue model
tensorrt` adds. ONNX Runtime gives it the parts it knows; attention and norms stay with CUDA. It
compiles each part once per card, which takes minutes, and keeps what it compiled in a folder.
https://onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.html
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnxruntime as ort
import structlog

from segue_contract.errors import ModelMismatch
from segue_contract.model.manifest import Manifest
from segue_edge.prefill.kv import PastKv
from segue_edge.prefill.providers import CPU, CUDA, Device, Provider
from segue_edge.prefill.runner import GraphRunner, open_session

log = structlog.get_logger(__name__)

TENSORRT = "TensorrtExecutionProvider"
QDQ = "edge-qdq"  # the recipe of the graph's KV
QDQ_GRAPH = "edge/qdq.onnx"


def engine_cache(manifest: Manifest) -> Path:
    """Where compiled parts of this model's graph are kept: they fit one graph and one card."""
    base = os.environ.get("XDG_CACHE_HOME")
    root = Path(base) if base else Path.home() / ".cache"
    graph = manifest.files[QDQ_GRAPH].sha256[:16] if QDQ_GRAPH in manifest.files else "none"
    return root / "segue" / "tensorrt" / f"{manifest.weights_digest[:16]}-{graph}"


def tensorrt_device(cache: Path) -> Device:
    """TensorRT before CUDA. A QDQ graph brings its own scales: no calibration table."""
    options = {
        "trt_int8_enable": "1",
        "trt_fp16_enable": "1",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(cache),
    }
    tensorrt: Provider = (TENSORRT, options)
    return Device("cuda", (tensorrt, CUDA, CPU))


def may_use_qdq(
    manifest: Manifest, directory: Path, available: Collection[str] | None = None
) -> bool:
    """This onnxruntime has TensorRT, the model has the graph, and its gate let it pass.

    `available`: providers to look for TensorRT in; None: this onnxruntime's.
    """
    available = ort.get_available_providers() if available is None else available
    entry = manifest.recipes.get(QDQ)
    allowed = entry is not None and entry.recipe.digest in manifest.allowed_recipes()
    return TENSORRT in available and allowed and (directory / QDQ_GRAPH).is_file()


def open_qdq(
    directory: Path, manifest: Manifest, threads: int, longest: int
) -> ort.InferenceSession | None:
    """A session of the QDQ graph that TensorRT really runs, ready for runs of up to `longest`
    tokens; None where it cannot be had, and the log says why."""
    if not may_use_qdq(manifest, directory):
        return None
    cache = engine_cache(manifest)
    cache.mkdir(parents=True, exist_ok=True)
    compiled = any(cache.glob("*.engine"))
    log.info("tensorrt", cache=str(cache), note="" if compiled else "compiling once, minutes")
    try:
        session = open_session(directory / QDQ_GRAPH, tensorrt_device(cache), threads)
        if TENSORRT not in session.get_providers():
            log.warning("no_tensorrt", reason="its libraries are not installed, or do not load")
            return None
        _widen(session, manifest, longest)
    except ModelMismatch as error:
        log.warning("no_tensorrt", reason=error.message)
        return None
    except Exception as error:  # whatever it raises while it compiles: the other graph still works
        log.warning("no_tensorrt", reason=str(error)[:300])
        return None
    return session


def _widen(session: ort.InferenceSession, manifest: Manifest, longest: int) -> None:
    """Run the shortest and the longest one: an engine serves the sizes between those it saw, and
    is compiled anew, in the middle of somebody's prompt, for any other."""
    runner = GraphRunner(session, manifest.geometry, in_place=False)
    longest = min(longest, manifest.geometry.context)
    for tokens in (1, longest):
        kv = PastKv(manifest.geometry.kv, longest)
        runner.run(np.full(tokens, manifest.end_tokens[0], np.int64), kv)
