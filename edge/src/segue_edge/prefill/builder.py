"""Runs the onnxruntime-genai model builder as a process of its own: safetensors -> float graph."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from segue_contract.errors import MissingExtra, ModelBuildFailed

_MODULE = "onnxruntime_genai.models.builder"
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
    command += ["--extra_options", "prune_lm_head=true"]
    # Everything is on this disk: a library that wants the network has misread the folder.
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    words = _watch(command, env, layers, progress)
    path = target / "model.onnx"
    if not path.is_file():
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
) -> str:
    """Run the builder, turn its lines into progress; returns its last line."""
    process = subprocess.Popen(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    last = ""
    try:
        assert process.stdout is not None
        for line in process.stdout:
            text = line.strip()
            last = text.rpartition("\r")[2][-400:] or last
            if text.startswith("Reading layer "):
                number = int(text.split()[2]) + 1
                progress(number / (layers + 8), f"Building the graph: layer {number} of {layers}")
            elif text.startswith("Saving ONNX"):
                progress((layers + 2) / (layers + 8), "Building the graph: writing it")
        process.wait(timeout=_TIMEOUT_S)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    return last
