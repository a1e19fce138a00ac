"""Runs the onnxruntime-genai model builder as a process of its own: safetensors -> float graph."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from segue_contract.errors import MissingExtra, ModelBuildFailed
from segue_contract.model.progress import disk_full, names_full_disk

_MODULE = "onnxruntime_genai.models.builder"
_LAYER = re.compile(r"Reading layer (\d+)")
_TIMEOUT_S = 900.0  # a 7B model takes minutes; beyond this something hangs


def build_float_graph(
    artifact: Path,
    work: Path,
    layers: int,
    progress: Callable[[float, str], None],
) -> Path:
    """`artifact/cloud` as an fp32 graph in `work`: GroupQueryAttention, last position's logits.

    Returns the path of the .onnx file.

    Raises:
        MissingExtra: the builder is not installed.
        ModelBuildFailed: it stopped; the message has its last words.
    """
    if importlib.util.find_spec("onnxruntime_genai") is None:
        raise MissingExtra(
            "The ONNX graph builder is not installed.",
            hint="Install it: pip install 'segue[convert]'",
        )
    folder, target, cache = work / "hf", work / "fp32", work / "cache"
    folder.mkdir(parents=True)
    _link_source(artifact, folder)
    command = [sys.executable, "-m", _MODULE, "-i", str(folder), "-o", str(target)]
    command += ["-p", "fp32", "-e", "cpu", "-c", str(cache)]
    # KV of all tokens goes out, also where a model's window no longer reads it.
    command += ["--extra_options", "prune_lm_head=true", "windowed_kv_cache=false"]
    # Everything is on this disk: a library that wants the network has misread the folder.
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    status, words = _watch(command, env, layers, progress)
    path = target / "model.onnx"
    if status != 0 or not path.is_file():
        if names_full_disk(words):
            raise disk_full(words)
        raise ModelBuildFailed(
            f"The graph builder stopped: {words or 'it said nothing'}.",
            hint="Nothing was left half-built.",
        )
    return path


def _link_source(artifact: Path, folder: Path) -> None:
    for source in (artifact / "cloud").iterdir():
        (folder / source.name).symlink_to(source.resolve())
    (folder / "tokenizer.json").symlink_to((artifact / "tokenizer.json").resolve())
    # The builder insists on a tokenizer that it can load; only its end token matters there.
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}), encoding="utf-8"
    )


def _watch(
    command: list[str], env: dict[str, str], layers: int, progress: Callable[[float, str], None]
) -> tuple[int, str]:
    """Run the builder, turn its lines into progress; returns its exit status and last line."""
    process = subprocess.Popen(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    deadline = threading.Timer(_TIMEOUT_S, process.kill)
    deadline.daemon = True
    deadline.start()
    last = ""
    try:
        assert process.stdout is not None
        for line in process.stdout:
            last = line.strip().rpartition("\r")[2][-400:] or last
            layer = _LAYER.match(line)
            if layer is not None:
                number = int(layer[1]) + 1
                progress(number / (layers + 8), f"Building the graph: layer {number} of {layers}")
            elif line.startswith("Saving ONNX"):
                progress((layers + 2) / (layers + 8), "Building the graph: writing it")
        return process.wait(), last
    finally:
        deadline.cancel()
        if process.poll() is None:
            process.kill()
            process.wait()
