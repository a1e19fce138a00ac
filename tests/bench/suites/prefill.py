"""Edge prefill: speed against the same graph in float32, and what its quantisation costs.

The peer is the builder's own fp32 graph of the model, run by the same ONNX Runtime with the same
threads, in this run, in turn with ours. It is no part of the built model, so it is built once into
a folder beside the models (half a minute).
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from tokenizers import Tokenizer

from segue_contract.kv.layout import BLOCK_TOKENS
from segue_contract.model.manifest import DEFAULT_MODEL, Manifest, model_home, read_manifest
from segue_edge.prefill.builder import build_float_graph
from segue_edge.prefill.exact import SCORER, ExactModel, write_scorer
from segue_edge.prefill.graph import Graph
from segue_edge.prefill.kv import PastKv
from segue_edge.prefill.providers import CPU, Device
from segue_edge.prefill.quality import (
    held_out_text,
    score_windows,
    summarise,
    windows_of,
)
from segue_edge.prefill.runner import GraphRunner, open_session
from segue_edge.prefill.runtime import DEFAULT_CHUNK, EdgeModel
from tests.bench.harness import Report

SPEED_TARGET, AGREEMENT_TARGET, DISK_TARGET = 2.0, 0.975, 0.30


def run(report: Report, quick: bool) -> None:
    directory = model_home() / DEFAULT_MODEL
    manifest = read_manifest(directory)
    peer_graph = peer(directory, manifest)
    began = time.perf_counter()
    model = EdgeModel.load(directory, providers="cpu")
    model.warm_up()
    _disk(report, directory, peer_graph)
    report.row("load", time.perf_counter() - began, "s", note="both graphs, and once run")
    tokens = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(held_out_text()).ids
    _speed(report, model, peer_graph, tokens, quick)
    _streaming(report, model, tokens)
    if not quick:
        _long(report, model, tokens)
    _decode(report, model, tokens, 8 if quick else 48)
    _quality(report, model, peer_graph, tokens, 1 if quick else 12)


def peer(directory: Path, manifest: Manifest) -> Path:
    """The fp32 graph, built on first use into `<models>/.bench/<weights digest>/fp32`."""
    home = model_home() / ".bench" / manifest.weights_digest
    path = home / "fp32" / "model.onnx"
    if path.is_file():
        return path
    home.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=home.parent))
    try:
        built = build_float_graph(directory, work, manifest.geometry.layers, lambda *_: None)
        write_scorer(Graph.load(built), built.parent)
        work.rename(home)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return path


def _disk(report: Report, directory: Path, graph: Path) -> None:
    """What each graph has on disk, the files that it shares with the other included."""
    fp32 = disk_bytes(graph)
    both: set[Path] = set()
    for name in ("prefill", "decode"):
        path = directory / "edge" / f"{name}.onnx"
        both |= files_of(path)
        report.row(
            f"edge_{name}_disk_share",
            disk_bytes(path) / fp32,
            "share",
            DISK_TARGET,
            better="lower",
            note=f"of the float graph's {fp32 / 1e6:.0f} MB, embedding included",
        )
    total = sum(path.stat().st_size for path in both)
    report.row("edge_disk_share", total / fp32, "share", note="both graphs together")


def files_of(graph: Path) -> set[Path]:
    """A graph's file and those in which its weights lie."""
    model = onnx.load(graph, load_external_data=False)
    entries = (e for t in model.graph.initializer for e in t.external_data)
    return {graph} | {graph.parent / e.value for e in entries if e.key == "location"}


def disk_bytes(graph: Path) -> int:
    return sum(path.stat().st_size for path in files_of(graph))


def _speed(report: Report, model: EdgeModel, graph: Path, tokens: list[int], quick: bool) -> None:
    geometry = model.manifest.geometry
    fp32 = GraphRunner(open_session(graph, Device("cpu", (CPU,)), 0), geometry)

    def peer_in(chunk: int, count: int) -> Callable[[], None]:
        def call() -> None:
            kv = PastKv(geometry.kv, count)
            for start in range(0, count, chunk):
                part = tokens[start : min(start + chunk, count)]
                fp32.run(np.asarray(part, np.int64), kv)

        return call

    for count in (128, 512, 1024):
        ours = lambda n=count: model.prefill(tokens[:n])  # noqa: E731
        calls = [ours, peer_in(count, count), peer_in(DEFAULT_CHUNK, count)]
        edge_s, whole_s, chunked_s = alternating(calls, 1 if quick else 7)
        report.row(f"edge_tokens_per_s_{count}", count / edge_s, "tokens/s")
        report.row(f"fp32_tokens_per_s_{count}", count / whole_s, "tokens/s", note="in one call")
        report.row(
            f"edge_vs_ort_fp32_{count}",
            whole_s / edge_s,
            "x",
            SPEED_TARGET if count == 512 else None,
            note="against the float graph in one call",
        )
        report.row(
            f"edge_vs_ort_fp32_chunked_{count}",
            chunked_s / edge_s,
            "x",
            note=f"against the float graph in chunks of {DEFAULT_CHUNK}, as ours runs",
        )


def alternating(calls: list[Callable[[], object]], repeats: int) -> list[float]:
    """Median seconds of each call; they run in turn, so that a busy machine slows all alike."""
    seconds: list[list[float]] = [[] for _ in calls]
    for round_number in range(repeats + 1):
        for index, call in enumerate(calls):
            began = time.perf_counter()
            call()
            if round_number > 0:  # the first round warms up
                seconds[index].append(time.perf_counter() - began)
    return [statistics.median(values) for values in seconds]


def _streaming(report: Report, model: EdgeModel, tokens: list[int]) -> None:
    """What it costs to hand blocks out early, and when the first of them is there."""
    first: list[float] = []

    def tapered() -> None:
        began, seen = time.perf_counter(), []
        model.prefill(
            tokens[:512], None, lambda *_: seen.append(time.perf_counter() - began), taper=True
        )
        first.append(seen[0])

    plain_s, tapered_s = alternating([lambda: model.prefill(tokens[:512]), tapered], 3)
    report.row("first_block_512", 1e3 * statistics.median(first), "ms", note="chunks 256 128 64 64")
    report.row(
        "taper_cost_512", tapered_s / plain_s - 1, "share", note="blocks out and small chunks"
    )
    kv = model.prefill(tokens[: 2 * BLOCK_TOKENS]).kv
    copy_s = alternating([lambda: kv.block(1)], 5)[0]
    report.row("block_handed_out", 1e3 * copy_s, "ms", note="chunk done to callback, per block")


def _long(report: Report, model: EdgeModel, tokens: list[int]) -> None:
    text = (tokens * 2)[: model.context]
    for count in (4096, model.context):
        began = time.perf_counter()
        result = model.prefill(text[:count])
        seconds = time.perf_counter() - began
        report.row(f"edge_tokens_per_s_{count}", count / seconds, "tokens/s")
        report.row(f"kv_bytes_{count}", result.kv.nbytes / 2**20, "MiB", note="float32, in place")


def _decode(report: Report, model: EdgeModel, tokens: list[int], steps: int) -> None:
    result = model.prefill(tokens[:256], room=steps + 1)
    token = int(result.logits.argmax())
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        token = int(model.decode_step(token, result.kv).argmax())
        seconds.append(time.perf_counter() - began)
    report.row("decode_tokens_per_s", 1 / statistics.median(seconds), "tokens/s")
    used, begun = os.times(), time.perf_counter()
    time.sleep(0.5)  # what is measured is the silence itself
    now = os.times()
    busy = (now.user + now.system - used.user - used.system) / (time.perf_counter() - begun)
    report.row("idle_cpu", max(0.0, 100 * busy), "%", note="of one core, right after a step")


def _quality(report: Report, model: EdgeModel, graph: Path, tokens: list[int], count: int) -> None:
    geometry = model.manifest.geometry
    head = np.ascontiguousarray(_head(graph))
    judge = ExactModel(graph.with_name(SCORER), geometry, head, 0)
    text = held_out_text()
    scores = [
        found["edge"]
        for found in score_windows(
            judge,
            geometry.kv,
            {"edge": lambda part: model.prefill(part, room=len(part)).kv},
            windows_of(tokens, count),
        )
    ]
    quality = summarise(scores, text)
    report.row(
        "edge_agreement",
        quality.agreement,
        "share",
        AGREEMENT_TARGET,
        note=f"top-1, {quality.windows} windows of 512 held-out tokens, {model.recipe_name}",
    )
    report.row("edge_mean_kl", quality.mean_kl, "nats")
    report.row("edge_cross_entropy_change", quality.cross_entropy_change, "nats")


def _head(graph: Path) -> np.ndarray:
    loaded = Graph.load(graph)
    (node,) = (n for n in loaded.matmuls() if n.output[0] == "logits")
    return np.asarray(loaded.weight_of(node), np.float32)
