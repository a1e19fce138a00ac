"""The INT8 prefill graph for TensorRT: `segue model tensorrt`, on a model that is built.

    python -m segue_edge.prefill.qdq DIRECTORY [--windows N] [--threads N]

TensorRT multiplies in INT8 where it finds QuantizeLinear and DequantizeLinear around both factors,
with scales that are constants: one per tensor for activations, one per column for weights. The
per-token scales of the CPU's graph are out of its reach, so a tensor whose tokens differ much in
size cannot be coded well. How badly is measured on the calibration text, tensor by tensor; matrices
behind the worst ones stay 8-bit weights only, and as many of them as the quality gate wants.

ONNX Runtime's CPU provider computes the same graph, so the gate measures it without a card.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime as ort
from onnx import NodeProto, helper

from segue_contract.model.gate import MAX_AGREEMENT_LOSS, Measured, recipe_entry, representative
from segue_contract.model.manifest import (
    Manifest,
    RecipeEntry,
    hash_file,
    read_manifest,
    write_manifest,
)
from segue_contract.model.progress import Progress, run_step, tell
from segue_edge.prefill import quantise
from segue_edge.prefill.export import calibration_windows, shared_files
from segue_edge.prefill.float_graph import float_graph
from segue_edge.prefill.gate import BUILD_WINDOWS, package_text
from segue_edge.prefill.graph import Graph
from segue_edge.prefill.ladder import Bench
from segue_edge.prefill.sensitivity import suffix
from segue_edge.prefill.smooth import STRENGTHS, Floats, feeds, find_sites, measure_peaks, smooth
from segue_edge.prefill.tensorrt import QDQ, QDQ_GRAPH

QDQ_QUANT = "qdq8-smooth065-embed8b64"
_STRENGTHS = dict.fromkeys(STRENGTHS, 0.65)  # with one scale per tensor no site asks for its own
# Matrices are kept heavier whose input loses more than this, relative to each token's size: tried
# in order until the gate is content. The default model, 1,024 positions, in k8v8: at 0.2 the head
# and 3 down_proj are heavier and the agreement is 0.963; at 0.1 6 of them, 0.973; at 0.05 31
# matrices, 0.978.
LEVELS = (0.1, 0.05, 0.03, 0.02)
_ZERO = "qdq.zero"


@dataclass(frozen=True)
class Range:
    """One activation on the calibration text. `peak`: its largest magnitude. `loss`: the mean over
    tokens of rounding error / token size, both as root mean squares, with one scale for all."""

    peak: float
    loss: float

    @property
    def scale(self) -> float:
        return max(self.peak, 1e-8) / 127.0


def measure_ranges(
    graph: Graph, windows: list[list[int]], folder: Path, head_dim: int, threads: int
) -> dict[str, Range]:
    """What each matrix of `graph` reads, by the name of that activation."""
    names = list(dict.fromkeys(node.input[0] for node in graph.matmuls()))
    probe = graph.copy()
    for index, name in enumerate(names):
        probe.model.graph.node.extend(_probe_nodes(name, index))
    probe.weights["probe.last"] = np.array([-1], np.int64)
    del probe.model.graph.output[:]
    outputs = [f"probe.{index}.{part}" for index in range(len(names)) for part in ("peak", "size")]
    probe.add_outputs(outputs, [None, None])
    path = folder / "probe-qdq.onnx"
    probe.save(path)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    rows: dict[str, list[Floats]] = {output: [] for output in outputs}
    for window in windows:
        for output, values in zip(
            outputs, session.run(outputs, feeds(session, window, head_dim)), strict=True
        ):
            rows[output].append(values.reshape(-1))
    return {
        name: range_of(
            np.concatenate(rows[f"probe.{index}.peak"]), np.concatenate(rows[f"probe.{index}.size"])
        )
        for index, name in enumerate(names)
    }


def range_of(peaks: Floats, sizes: Floats) -> Range:
    """`peaks`, `sizes`: of each token, largest magnitude and root mean square."""
    peak = float(peaks.max())
    step = max(peak, 1e-8) / 127.0
    loss = step / np.sqrt(12.0) / np.maximum(sizes, 1e-8)  # rounding is uniform over one step
    return Range(peak, float(np.minimum(loss, 1.0).mean()))


def _probe_nodes(name: str, index: int) -> Iterator[NodeProto]:
    at = f"probe.{index}"
    yield helper.make_node("Abs", [name], [f"{at}.abs"], f"{at}.abs")
    yield helper.make_node(
        "ReduceMax", [f"{at}.abs", "probe.last"], [f"{at}.peak"], f"{at}.peak", keepdims=0
    )
    yield helper.make_node("Mul", [name, name], [f"{at}.squared"], f"{at}.squared")
    yield helper.make_node(
        "ReduceMean", [f"{at}.squared", "probe.last"], [f"{at}.mean"], f"{at}.mean", keepdims=0
    )
    yield helper.make_node("Sqrt", [f"{at}.mean"], [f"{at}.size"], f"{at}.size")


def heavier_at(graph: Graph, ranges: dict[str, Range], level: float) -> frozenset[str]:
    """Names of the matrices whose input loses more than `level`, and of the head, which sees one
    token a call."""
    return frozenset(
        node.name
        for node in graph.matmuls()
        if node.output[0] == "logits" or ranges[node.input[0]].loss > level
    )


def quantise_qdq(graph: Graph, ranges: dict[str, Range], heavier: Collection[str]) -> None:
    """Put QuantizeLinear and DequantizeLinear around both factors of each MatMul, in place; those
    named in `heavier` become MatMulNBits."""
    replacement: dict[str, list[NodeProto]] = {}
    coded: set[str] = set()
    for node in graph.matmuls():
        if node.name in heavier:
            continue
        source, weight = node.input[0], node.input[1]
        nodes = [] if source in coded else _code(graph, source, ranges[source].scale)
        coded.add(source)
        replacement[node.name] = [*nodes, *_product(graph, node, weight)]
    graph.weights[_ZERO] = np.array(0, np.int8)
    graph.replace_nodes(replacement)
    quantise.weight_only(graph, accuracy_level=4)  # what is left


def _code(graph: Graph, source: str, scale: float) -> list[NodeProto]:
    name = f"{source}/scale8"
    graph.weights[name] = np.array(scale, np.float32)
    coded, back = f"{source}/qdq.q", f"{source}/qdq"
    return [
        helper.make_node("QuantizeLinear", [source, name, _ZERO], [coded], coded),
        helper.make_node("DequantizeLinear", [coded, name, _ZERO], [back], back),
    ]


def _product(graph: Graph, node: NodeProto, weight: str) -> list[NodeProto]:
    values, scale = quantise.quantise_columns(np.asarray(graph.weights[weight]))
    names = [f"{weight}_qdq", f"{weight}_qdq_scale", f"{weight}_qdq_zero"]
    zeros = np.zeros(scale.shape, np.int8)
    graph.weights |= dict(zip(names, (values, scale, zeros), strict=True))
    back = f"{weight}/qdq"
    return [
        helper.make_node("DequantizeLinear", names, [back], back, axis=1),
        helper.make_node(
            "MatMul", [f"{node.input[0]}/qdq", back], list(node.output), f"{node.name}_qdq"
        ),
    ]


def int8_share(graph: Graph, heavier: Collection[str]) -> float:
    """Share of the multiplications of one token that are in INT8; the head left out."""
    counts = {
        node.name: graph.weight_of(node).size
        for node in graph.matmuls()
        if node.output[0] != "logits"
    }
    kept = sum(count for name, count in counts.items() if name in heavier)
    return 1.0 - kept / max(sum(counts.values()), 1)


@dataclass(frozen=True)
class Built:
    """`measured`: in each codec; `share`: of multiplications in INT8."""

    measured: list[Measured]
    heavier: frozenset[str]
    share: float

    def within(self, max_loss: float) -> bool:
        return any(one.within(max_loss) for one in self.measured)


def add(directory: Path, windows: int, threads: int) -> tuple[Built, Manifest]:
    """Make `edge/qdq.onnx`, measure it and enter it in the manifest.

    A graph of which no recipe is in the model's budget is entered as not allowed, without its file.
    """
    manifest = read_manifest(directory)
    source = float_graph(directory, manifest, _part(0.0, 0.2))
    bench = Bench(directory, source, manifest.geometry, package_text(), windows, threads)
    graph = Graph.load(source)
    quantise.plain_embedding(graph)
    tell(0.2, "Measuring activations")
    head_dim, texts = manifest.geometry.head_dim, calibration_windows(directory / "tokenizer.json")
    _smooth(graph, texts, source.parent, head_dim, threads)
    ranges = measure_ranges(graph, texts, source.parent, head_dim, threads)
    quantise.quantise_embedding(graph)
    budget = manifest.max_agreement_loss
    max_loss = MAX_AGREEMENT_LOSS if budget is None else budget
    built = _search(graph, ranges, bench, directory, manifest, max_loss)
    if not built.within(max_loss):
        for path in (directory / QDQ_GRAPH).parent.glob(f"{Path(QDQ_GRAPH).name}*"):
            path.unlink()
    updated = enter(manifest, built, max_loss, directory)
    write_manifest(directory, updated)
    return built, updated


def _smooth(
    graph: Graph, texts: list[list[int]], folder: Path, head_dim: int, threads: int
) -> None:
    sites = find_sites(graph)
    peaks: dict[str, Floats] = {}
    for found in measure_peaks(graph, sites, texts, folder, head_dim, threads):
        peaks = {n: np.maximum(v, peaks[n]) if n in peaks else v for n, v in found.items()}
    smooth(graph, sites, peaks, _STRENGTHS)


def _search(
    graph: Graph,
    ranges: dict[str, Range],
    bench: Bench,
    directory: Path,
    manifest: Manifest,
    max_loss: float,
) -> Built:
    """The first of `LEVELS` that the gate lets pass; else the last."""
    (head,) = {n.input[1] for n in graph.matmuls() if n.output[0] == "logits"}
    path = directory / QDQ_GRAPH
    shared = shared_files(head, path.parent, tied=manifest.geometry.tied_embeddings)
    tried: frozenset[str] | None = None
    built = Built([], frozenset(), 0.0)
    for index, level in enumerate(LEVELS):
        heavier = heavier_at(graph, ranges, level)
        if heavier == tried:
            continue
        tried = heavier
        candidate = graph.copy()
        quantise_qdq(candidate, ranges, heavier)
        candidate.save(path, shared)
        low = 0.3 + 0.7 * index / len(LEVELS)
        side = {QDQ: (QDQ_QUANT + suffix(heavier), path)}
        measured = bench.run(side, _part(low, low + 0.7 / len(LEVELS)))
        built = Built(measured, heavier, int8_share(graph, heavier))
        if built.within(max_loss):
            break
    return built


def enter(manifest: Manifest, built: Built, max_loss: float, directory: Path) -> Manifest:
    """The manifest with the graph's recipes and files, in place of an earlier one's.

    `edge-qdq` stands for the cheapest allowed codec; where there is none, for the best, refused.
    """
    base = manifest.edge_recipe

    def entry(one: Measured) -> RecipeEntry:
        return recipe_entry(one, base, max_loss)

    chosen = representative(built.measured, manifest.geometry.kv, max_loss)
    recipes = {n: e for n, e in manifest.recipes.items() if not n.startswith(QDQ)}
    recipes |= {one.name: entry(one) for one in built.measured} | {QDQ: entry(chosen)}
    name = Path(QDQ_GRAPH)
    files = {n: e for n, e in manifest.files.items() if not n.startswith(QDQ_GRAPH)}
    for path in sorted((directory / name).parent.glob(f"{name.name}*")):
        files[path.relative_to(directory).as_posix()] = hash_file(path)
    return msgspec.structs.replace(manifest, recipes=recipes, files=files)


def _part(low: float, high: float) -> Progress:
    return lambda done, what: tell(low + (high - low) * done, what)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--windows", type=int, default=BUILD_WINDOWS)
    parser.add_argument("--threads", type=int, default=0, help="0: one per core")
    args = parser.parse_args()

    def step() -> None:
        built, manifest = add(args.directory, args.windows, args.threads)
        entry = manifest.recipes[QDQ]
        assert entry.quality is not None
        line = {
            "event": "qdq",
            "allowed": entry.allowed,
            "recipe": f"{QDQ}-{entry.recipe.codec}",
            "int8_share": round(built.share, 3),
            "rows": [
                {"recipe": one.name, "agreement": round(one.quality.agreement, 4)}
                for one in built.measured
            ],
        }
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()

    return run_step(step)


if __name__ == "__main__":
    sys.exit(main())
