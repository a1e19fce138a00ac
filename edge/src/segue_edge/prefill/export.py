"""Second step of `segue model build`: the cloud's weights -> the edge's ONNX graphs.

    python -m segue_edge.prefill.export --artifact DIR --work DIR

Writes `edge/prefill.onnx` (W8A8, smoothed), `edge/decode.onnx` (weight-only), `edge/head.onnx`
for both and the files that they share into the artifact, and `edge.json`, the manifest's part about
them, into the work folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
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
from segue_edge.prefill.head import split_head
from segue_edge.prefill.kv import PastKv
from segue_edge.prefill.last_layer import prune_last_layer
from segue_edge.prefill.providers import CPU, Device
from segue_edge.prefill.quality import (
    Prefill,
    held_out_text,
    score_windows,
    summarise,
    windows_of,
)
from segue_edge.prefill.runner import HEAD_FILE, GraphRunner, open_session
from segue_edge.prefill.sensitivity import groups_of, search, suffix
from segue_edge.prefill.smooth import Floats, find_sites, measure_peaks, smooth

EDGE_QUANT = "w8a8-rows-smooth85-65-60-embed8b64"
DECODE_QUANT = "w8-block32-embed8b64"
CALIBRATION_WINDOW = 512  # tokens
TARGET_AGREEMENT = 0.97
# where on this step's bar each part ends
_BUILT, _CALIBRATED, _QUANTISED = 0.4, 0.6, 0.7
QUALITY_WINDOWS = 4  # for the search; what is reported is measured by the next step


def export(artifact: Path, work: Path, threads: int, target: float = TARGET_AGREEMENT) -> None:
    """Write the edge's part of the artifact; raises ModelError, OSError.

    `target`: the agreement under which sensitive matrices are searched and kept heavier.
    """
    geometry = read_geometry(work)
    source = build_float_graph(
        artifact, work, geometry.layers, lambda done, what: tell(_BUILT * done, what)
    )
    graph = Graph.load(source)
    scorer = write_scorer(graph, source.parent)
    quantise.plain_embedding(graph)
    edge = artifact / "edge"
    edge.mkdir(exist_ok=True)
    (head,) = head_names(graph)
    (head_name,) = {n.input[1] for n in graph.matmuls() if n.name == head}
    judge = ExactModel(scorer, geometry, np.asarray(graph.weights[head_name]), threads)
    tell(_BUILT, "Measuring activations")
    sites = find_sites(graph)
    peaks = _peaks(artifact, work, graph, geometry.head_dim, threads)
    quantise.quantise_embedding(graph)
    shared = shared_files(head_name, edge, tied=geometry.tied_embeddings)
    decode = graph.copy()
    prune_last_layer(decode)
    smooth(graph, sites, peaks)
    one_token = {head, *prune_last_layer(graph)}
    tell(_CALIBRATED, "Quantising the decode graph")
    quantise.weight_only(decode, accuracy_level=4)
    split_head(decode).save(edge / HEAD_FILE, shared)
    decode.save(edge / "decode.onnx", shared)
    scale = Scale.of(artifact, judge, geometry, threads)

    def measure(heavier: frozenset[str]) -> Quality:
        candidate = graph.copy()
        quantise.w8a8(candidate, one_token | heavier)
        split_head(candidate)  # the same as the decode graph's
        candidate.save(edge / "prefill.onnx", shared)
        return scale.measure(edge / "prefill.onnx")

    tell(_QUANTISED, "Quantising the prefill graph and measuring its KV")
    groups = groups_of({n.name for n in graph.matmuls()} - one_token, geometry.layers)
    found = search(groups, measure, target)
    if found.measured > 1:
        measure(found.heavier)  # the last one tried need not be the best
    facts = EdgeFacts(
        edge_quant=EDGE_QUANT + suffix(found.heavier),
        decode_quant=DECODE_QUANT,
        quality=found.quality,
        heavier=found.titles,
        built_with={n: version(n) for n in ("onnxruntime", "onnxruntime-genai")},
    )
    (work / "edge.json").write_bytes(msgspec.json.encode(facts))
    tell(1.0, "The edge's graphs are ready")


def shared_files(head: str, edge: Path, *, tied: bool) -> dict[str, Path]:
    """Where the arrays lie that both graphs read: name -> file. `head`: its weight's name.

    Tied embeddings are one table: the lookup and the head read the same bytes. The names say the
    block, for a graph that is added to an older build must not take that build's table for its own.
    """
    table = f"embedding_b{quantise.TABLE_BLOCK}"
    own = table if tied else f"head_b{quantise.TABLE_BLOCK}"
    return {
        quantise.EMBEDDING: edge / "embedding_f32.bin",  # where it cannot be cut in blocks
        quantise.EMBEDDING_Q8: edge / f"{table}.bin",
        quantise.EMBEDDING_SCALE: edge / f"{table}_scale.bin",
        f"{head}_b8": edge / f"{own}.bin",
        f"{head}_b8_scale": edge / f"{own}_scale.bin",
    }


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


@dataclass(frozen=True)
class Scale:
    """Measures what a graph's KV costs, on text that nothing was calibrated on."""

    judge: ExactModel
    geometry: ModelGeometry
    threads: int
    text: str
    windows: list[list[int]]

    @classmethod
    def of(cls, artifact: Path, judge: ExactModel, geometry: ModelGeometry, threads: int) -> Scale:
        text = held_out_text()
        tokens = Tokenizer.from_file(str(artifact / "tokenizer.json")).encode(text).ids
        return cls(judge, geometry, threads, text, windows_of(tokens, QUALITY_WINDOWS))

    def measure(self, path: Path) -> Quality:
        side = {"it": prefill_with(path, self.geometry, self.threads)}
        scores = score_windows(self.judge, self.geometry.kv, side, self.windows)
        return summarise([score["it"] for score in scores], self.text)


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
    parser.add_argument(
        "--target-agreement",
        type=float,
        default=TARGET_AGREEMENT,
        help="under it, the matrices that lose most are searched and kept heavier",
    )
    args = parser.parse_args()
    return run_step(lambda: export(args.artifact, args.work, args.threads, args.target_agreement))


if __name__ == "__main__":
    sys.exit(main())
