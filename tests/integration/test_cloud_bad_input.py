"""`segue cloud` with a model or an option that cannot work: a short word, a hint, an exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from segue_contract.model.manifest import MANIFEST_NAME
from tests.support.tiny_llama import WEIGHTS, build_tiny_llama
from tests.support.tiny_source import GEOMETRY, TEMPLATE, write_hf_folder

Refused = Callable[..., str]

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A whole model directory, as far as the cloud reads it."""
    directory = tmp_path / "home" / "tiny"
    build_tiny_llama(directory, geometry=GEOMETRY)
    source = write_hf_folder(tmp_path / "source")
    (directory / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


@pytest.fixture(scope="module")
def forks() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.cli_forks"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def refused(forks: subprocess.Popen[str], model: Path) -> Refused:
    """What `segue cloud` says on the terminal when it will not start."""

    def ask(*arguments: str) -> str:
        command = ["cloud", "--port", "0", "--model", model.name, *arguments]
        env = {"SEGUE_MODEL_HOME": str(model.parent), "COLUMNS": "300"}
        assert forks.stdin is not None
        assert forks.stdout is not None
        forks.stdin.write(json.dumps({"arguments": command, "env": env}) + "\n")
        forks.stdin.flush()
        answer = json.loads(forks.stdout.readline())
        assert answer["code"] > 0, answer  # less: killed by a signal
        assert "Traceback" not in answer["said"], answer["said"]
        return str(answer["said"])

    return ask


def change_tensors(model: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(model / WEIGHTS)
    change(tensors)
    save_file(tensors, model / WEIGHTS)


def change_manifest(model: Path, change: Callable[[dict[str, object]], None]) -> None:
    path = model / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def missing(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[NAME]


def another_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[NAME] = tensors[NAME][:-1].contiguous()


def not_a_number(tensors: dict[str, torch.Tensor]) -> None:
    tensors[NAME][3, 5] = float("nan")


def another_family(tensors: dict[str, torch.Tensor]) -> None:
    """GPT-2's names."""
    names = sorted(tensors)
    for index, name in enumerate(names):
        tensors[f"transformer.h.{index}.weight"] = tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (missing, ["has no tensor", NAME]),
        (another_shape, [NAME, "[127, 64]", "[128, 64]"]),
        (not_a_number, [NAME, "not finite"]),
        (another_family, ["has no tensor", "Llama family"]),
    ],
)
def test_weights_that_do_not_fit(
    model: Path,
    refused: Refused,
    change: Callable[[dict[str, torch.Tensor]], None],
    words: list[str],
) -> None:
    change_tensors(model, change)
    said = refused()
    assert all(word in said for word in words), said
    assert "Build the model again" in said


def other_geometry(manifest: dict[str, object]) -> None:
    manifest["geometry"]["kv_heads"] = 4  # type: ignore[index]


def other_digest(manifest: dict[str, object]) -> None:
    manifest["weights_digest"] = "0" * 32


def no_number(manifest: dict[str, object]) -> None:
    manifest["geometry"]["layers"] = "three"  # type: ignore[index]


def other_weights_size(manifest: dict[str, object]) -> None:
    manifest["files"][str(WEIGHTS)]["bytes"] += 1  # type: ignore[index]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_geometry, ["the manifest says"]),
        (other_digest, ["is of other weights"]),
        (no_number, ["cannot be read"]),
        (other_weights_size, ["bytes", "segue model verify"]),
    ],
)
def test_a_manifest_that_was_edited_by_hand(
    model: Path,
    refused: Refused,
    change: Callable[[dict[str, object]], None],
    words: list[str],
) -> None:
    change_manifest(model, change)
    said = refused()
    assert all(word in said for word in words), said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--pool-mb", "9000000"), ["9000000 MiB", "--pool-mb"]),
        (("--host-mb", "9000000"), ["9000000 MiB", "--host-mb"]),
        (("--host-mb", "-1"), ["host_mb", "segue cloud --help"]),
    ],
)
def test_memory_that_is_not_there(
    refused: Refused, arguments: tuple[str, ...], words: list[str]
) -> None:
    said = refused(*arguments)
    assert all(word in said for word in words), said


def test_a_pool_too_small_says_how_much_is_needed(model: Path, refused: Refused) -> None:
    """A model whose smallest pool is more than the one MiB that is asked for."""
    wide = msgspec.structs.replace(GEOMETRY, layers=40)
    build_tiny_llama(model, geometry=wide)
    said = refused("--pool-mb", "1", "--dtype", "fp32")
    assert "too small; this model needs 6 MiB" in said, said
    assert "--pool-mb 6" in said
