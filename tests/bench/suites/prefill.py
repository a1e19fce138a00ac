"""Edge prefill: speed against the same graph in float32, and what its quantisation costs.

The peer is the builder's own fp32 graph of the model, run by the same ONNX Runtime with the same
threads, in this run, in turn with ours. It is no part of the built model, so it is built once into
a folder beside the models (half a minute).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from tokenizers import Tokenizer

from segue_contract.kv.layout import BLOCK_TOKENS
from segue_contract.model.manifest import DEFAULT_MODEL, Manifest, model_home, read_manifest
from segue_edge.prefill.chunks import LARGE_CHUNK, SMALL_CHUNK
from segue_edge.prefill.exact import SCORER, ExactModel
from segue_edge.prefill.float_graph import float_graph
from segue_edge.prefill.graph import Graph
from segue_edge.prefill.kv import PastKv
from segue_edge.prefill.providers import CPU, Device
from segue_edge.prefill.quality import (
    held_out_text,
    score_windows,
    summarise,
    windows_of,
)
from segue_edge.prefill.runner import HEAD_FILE, LAST_HIDDEN, GraphRunner, open_session
from segue_edge.prefill.runtime import EdgeModel
from tests.bench.harness import Report

SPEED_TARGET, AGREEMENT_TARGET, DISK_TARGET = 2.0, 0.975, 0.30
DECODE_TARGET, LOAD_TARGET = 2.0, 0.60
CHUNKS = (SMALL_CHUNK, LARGE_CHUNK, 512, 1024)


def run(report: Report, quick: bool) -> None:
    directory = model_home() / DEFAULT_MODEL
    manifest = read_manifest(directory)
    peer_graph = peer(directory, manifest)
    began = time.perf_counter()
    model = EdgeModel.load(directory, providers="cpu")
    model.check_runs()
    report.row("load", time.perf_counter() - began, "s", note="both graphs, and once run")
    _disk(report, directory, peer_graph)
    _load_peak(report, directory)
    tokens = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(held_out_text()).ids
    _speed(report, model, peer_graph, tokens, quick)
    _streaming(report, model, tokens)
    if not quick:
        _long(report, directory, model.context)
    _decode(report, model, peer_graph, tokens, 8 if quick else 48)
    _quality(report, model, peer_graph, tokens, 1 if quick else 12)


def peer(directory: Path, manifest: Manifest) -> Path:
    """The fp32 graph, built on first use into `<models>/.bench/<weights digest>/fp32`."""
    return float_graph(directory, manifest, lambda *_: None)


def _disk(report: Report, directory: Path, graph: Path) -> None:
    """What each graph has on disk, the files that it shares with the other included."""
    fp32 = size_of(files_of(graph))
    head_graph = directory / "edge" / HEAD_FILE
    head = files_of(head_graph) if head_graph.is_file() else set()
    both: set[Path] = set()
    for name in ("prefill", "decode"):
        own = files_of(directory / "edge" / f"{name}.onnx") | head
        both |= own
        report.row(
            f"edge_{name}_disk_share",
            size_of(own) / fp32,
            "share",
            DISK_TARGET,
            better="lower",
            note=f"of the float graph's {fp32 / 1e6:.0f} MB, embedding and head included",
        )
    report.row("edge_disk_share", size_of(both) / fp32, "share", note="both graphs together")


def files_of(graph: Path) -> set[Path]:
    """A graph's file and those in which its weights lie."""
    model = onnx.load(graph, load_external_data=False)
    entries = (e for t in model.graph.initializer for e in t.external_data)
    return {graph} | {graph.parent / e.value for e in entries if e.key == "location"}


def size_of(files: set[Path]) -> int:
    return sum(path.stat().st_size for path in files)


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
        calls = [ours, peer_in(count, count), peer_in(LARGE_CHUNK, count)]
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
            note=f"against the float graph in chunks of {LARGE_CHUNK}, as ours runs",
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

    def streamed() -> None:
        began, seen = time.perf_counter(), []
        model.prefill(
            tokens[:512],
            None,
            lambda *_: seen.append(time.perf_counter() - began),
            chunk=SMALL_CHUNK,
        )
        first.append(seen[0])

    plain_s, streamed_s = alternating([lambda: model.prefill(tokens[:512]), streamed], 3)
    report.row(
        "first_block_512", 1e3 * statistics.median(first), "ms", note="chunks for a slow link"
    )
    report.row(
        "streaming_cost_512", streamed_s / plain_s - 1, "share", note="blocks out and small chunks"
    )
    kv = model.prefill(tokens[: 2 * BLOCK_TOKENS]).kv
    copy_s = alternating([lambda: kv.block(1)], 5)[0]
    report.row("block_handed_out", 1e3 * copy_s, "ms", note="chunk done to callback, per block")


def _load_peak(report: Report, directory: Path) -> None:
    """Peak memory while both graphs load, against the same graphs as ONNX's tools write them by
    default: one file each, all its weights inside, read whole before the first is unpacked."""
    names = ("decode", "prefill")
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            onnx.save(
                single_file(directory / "edge" / f"{name}.onnx"), Path(folder) / f"{name}.onnx"
            )
        naive = int(child("_load_peak", folder, *names))
    ours = int(child("_load_peak", str(directory)))
    report.row("load_peak", ours / 2**20, "MiB", note="over the process before it")
    report.row(
        "load_peak_share",
        ours / naive,
        "share",
        LOAD_TARGET,
        "lower",
        note=f"of {naive / 2**20:.0f} MiB for the same graphs, each in one file with its head",
    )


def single_file(path: Path) -> onnx.ModelProto:
    """A graph with its weights, and the head where that is a graph of its own, in one value."""
    model = onnx.load(path)
    outputs = {output.name: output for output in model.graph.output}
    if LAST_HIDDEN in outputs:
        head = onnx.load(path.with_name(HEAD_FILE)).graph
        model.graph.node.extend(head.node)
        model.graph.initializer.extend(head.initializer)
        model.graph.output.remove(outputs[LAST_HIDDEN])
        model.graph.output.extend(head.output)
    return model


def child(module: str, *arguments: str) -> str:
    """What `python -m tests.bench.suites.MODULE` prints."""
    command = [sys.executable, "-m", f"tests.bench.suites.{module}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return done.stdout.strip().splitlines()[-1]


def _long(report: Report, directory: Path, context: int) -> None:
    """Long prompts in chunks; the table shows what another chunk would have cost."""
    for count in (4096, context):
        for chunk in CHUNKS if count == 4096 else (LARGE_CHUNK,):
            found = json.loads(child("_long_prompt", str(directory), str(count), str(chunk)))
            rate = count / found["seconds"]
            if chunk == LARGE_CHUNK:
                report.row(f"edge_tokens_per_s_{count}", rate, "tokens/s")
                report.row(f"edge_ms_per_token_{count}", 1e3 / rate, "ms", better="lower")
                report.row(
                    f"edge_peak_{count}",
                    found["peak"] / 2**20,
                    "MiB",
                    better="lower",
                    note="over the loaded model; most of it is the KV in float32",
                )
            if count == 4096:
                report.row(f"edge_tokens_per_s_4096_chunk_{chunk}", rate, "tokens/s")


def _decode(report: Report, model: EdgeModel, graph: Path, tokens: list[int], steps: int) -> None:
    """Both graphs decode the same token after the same prompt, in turn."""
    geometry = model.manifest.geometry
    fp32 = GraphRunner(open_session(graph, Device("cpu", (CPU,)), 0), geometry)
    kv = model.prefill(tokens[:256], room=1).kv
    token = np.asarray(tokens[256:257], np.int64)

    def step(decode: Callable[[], object]) -> Callable[[], None]:
        def call() -> None:
            kv.truncate(256)
            decode()

        return call

    ours_s, fp32_s = alternating(
        [step(lambda: model.decode_step(int(token[0]), kv)), step(lambda: fp32.run(token, kv))],
        steps,
    )
    report.row("decode_tokens_per_s", 1 / ours_s, "tokens/s", note="weight-only 8 bit, batch 1")
    report.row("fp32_decode_tokens_per_s", 1 / fp32_s, "tokens/s")
    report.row(
        "edge_decode_vs_ort_fp32",
        fp32_s / ours_s,
        "x",
        DECODE_TARGET,
        note="against the float graph over the same KV",
    )
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
