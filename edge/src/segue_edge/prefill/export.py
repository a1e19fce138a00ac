"""Second step of `segue model build`: the cloud's weights -> the edge's two ONNX graphs.

    python -m segue_edge.prefill.export --artifact DIR --work DIR

Writes `edge/prefill.onnx` (W8A8, smoothed), `edge/decode.onnx` (weight-only 8 bit) and what both
share into the artifact, and `edge.json`, the manifest's part about them, into the work folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import resources
from importlib.metadata import version
from pathlib import Path

import msgspec
import numpy as np
from tokenizers import Tokenizer

from segue_contract.model.manifest import ModelGeometry, Quality
from segue_contract.model.progress import run_step, tell
from segue_contract.model.seal import EdgeFacts
from segue_edge.prefill import quantise
from segue_edge.prefill.builder import build_float_graph
from segue_edge.prefill.exact import ExactModel, write_scorer
from segue_edge.prefill.graph import Graph
from segue_edge.prefill.kv import PastKv
from segue_edge.prefill.providers import CPU, Device
from segue_edge.prefill.quality import (
    Prefill,
    held_out_text,
    score_windows,
    summarise,
    windows_of,
)
from segue_edge.prefill.runner import GraphRunner, open_session
from segue_edge.prefill.smooth import STRENGTH, Floats, find_sites, measure_peaks, smooth

EDGE_QUANT = "w8a8-rows-smooth065"
DECODE_QUANT = "w8-block32"
CALIBRATION_WINDOW = 512  # tokens
_BUILT, _CALIBRATED, _QUANTISED = 0.3, 0.45, 0.55  # where on this step's bar each part ends
QUALITY_WINDOWS = 4  # at every build; the benchmark takes more


def export(artifact: Path, work: Path, threads: int) -> None:
    """Write the edge's part of the artifact; raises ModelError, OSError."""
    geometry = read_geometry(work)
    source = build_float_graph(
        artifact, work, geometry.layers, lambda done, what: tell(_BUILT * done, what)
    )
    graph = Graph.load(source)
    scorer = write_scorer(graph, source.parent)
    quantise.plain_embedding(graph)
    edge = artifact / "edge"
    edge.mkdir(exist_ok=True)
    head = head_names(graph)
    shared = {quantise.EMBEDDING: edge / "embedding.bin"}
    shared |= {f"{n.input[1]}_b8": edge / "head.bin" for n in graph.matmuls() if n.name in head}
    tell(_BUILT, "Measuring activations")
    sites = find_sites(graph)
    peaks = _peaks(artifact, work, graph, geometry.head_dim, threads)
    (head_name,) = {n.input[1] for n in graph.matmuls() if n.name in head}
    head_weight = np.asarray(graph.weights[head_name])
    decode = graph.copy()
    smooth(graph, sites, peaks, STRENGTH)
    tell(_CALIBRATED, "Quantising the prefill graph")
    quantise.w8a8(graph, head)
    graph.save(edge / "prefill.onnx", shared)
    tell(_QUANTISED, "Quantising the decode graph")
    quantise.weight_only(decode, accuracy_level=4)
    decode.save(edge / "decode.onnx", shared)
    judge = ExactModel(scorer, geometry, head_weight, threads)
    quality = _quality(artifact, geometry, judge, threads)
    facts = EdgeFacts(
        edge_quant=EDGE_QUANT,
        decode_quant=DECODE_QUANT,
        quality=quality["prefill"],
        decode_quality=quality["decode"],
        built_with={n: version(n) for n in ("onnxruntime", "onnxruntime-genai")},
    )
    (work / "edge.json").write_bytes(msgspec.json.encode(facts))
    tell(1.0, "The edge's graphs are ready")


def read_geometry(work: Path) -> ModelGeometry:
    """The sizes that the first step found."""
    raw = msgspec.json.decode((work / "facts.json").read_bytes())
    return msgspec.convert(raw["geometry"], ModelGeometry)


def head_names(graph: Graph) -> list[str]:
    """The MatMul that makes the logits."""
    return [n.name for n in graph.matmuls() if n.output[0] == "logits"]


def calibration_windows(tokenizer: Path) -> list[list[int]]:
    """The package's own text in token windows of `CALIBRATION_WINDOW`; the last may be shorter."""
    text = resources.files("segue_edge.prefill").joinpath("calibration.txt").read_text("utf-8")
    ids = Tokenizer.from_file(str(tokenizer)).encode(text, add_special_tokens=False).ids
    return [ids[i : i + CALIBRATION_WINDOW] for i in range(0, len(ids), CALIBRATION_WINDOW)]


def _peaks(
    artifact: Path, work: Path, graph: Graph, head_dim: int, threads: int
) -> dict[str, Floats]:
    windows = calibration_windows(artifact / "tokenizer.json")
    sites = find_sites(graph)
    peaks: dict[str, Floats] = {}
    for index, found in enumerate(measure_peaks(graph, sites, windows, work, head_dim, threads)):
        share = (index + 1) / len(windows)
        tell(_BUILT + (_CALIBRATED - _BUILT) * share, "Measuring activations")
        peaks = {n: np.maximum(v, peaks[n]) if n in peaks else v for n, v in found.items()}
    return peaks


def _quality(
    artifact: Path, geometry: ModelGeometry, judge: ExactModel, threads: int
) -> dict[str, Quality]:
    """What the KV of either graph costs, measured on text that nothing was calibrated on."""
    text = held_out_text()
    tokens = Tokenizer.from_file(str(artifact / "tokenizer.json")).encode(text).ids
    windows = windows_of(tokens, QUALITY_WINDOWS)
    sides = {
        name: prefill_with(artifact / "edge" / f"{name}.onnx", geometry, threads)
        for name in ("prefill", "decode")
    }
    scores = []
    for index, found in enumerate(score_windows(judge, geometry.kv, sides, windows)):
        share = (index + 1) / len(windows)
        tell(_QUANTISED + (1 - _QUANTISED) * share, "Measuring the quality of the edge's KV")
        scores.append(found)
    return {name: summarise([score[name] for score in scores], text) for name in sides}


def prefill_with(path: Path, geometry: ModelGeometry, threads: int) -> Prefill:
    """KV of some tokens by the graph at `path`."""
    runner = GraphRunner(open_session(path, Device("cpu", (CPU,)), threads), geometry)

    def prefill(tokens: Sequence[int]) -> PastKv:
        kv = PastKv(geometry.kv, 2 * len(tokens))
        runner.run(np.asarray(tokens, np.int64), kv)
        return kv

    return prefill


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as there are cores")
    args = parser.parse_args()
    return run_step(lambda: export(args.artifact, args.work, args.threads))


if __name__ == "__main__":
    sys.exit(main())
