"""`segue model build`: whole or not at all, and a clear word either way.

Sources are random Llamas of a few hundred kilobytes; every build runs the real steps as processes.
"""

from __future__ import annotations

import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import onnx
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from segue_cloud.engine.sources.checkpoint import check_tensors, lossless_dtype
from segue_cloud.engine.sources.gguf_file import read_gguf
from segue_cloud.engine.sources.hf_folder import read_folder
from segue_contract.chat import ChatTokenizer
from segue_contract.errors import ModelError, ModelMismatch
from segue_contract.model.manifest import verify
from segue_edge.prefill.runner import HEAD_FILE
from segue_edge.prefill.runtime import EdgeModel
from tests.bench.suites.prefill import single_file
from tests.integration.models.conftest import BUILD_TIMEOUT_S, WINDOW, Built, Home
from tests.support.tiny_source import GEOMETRY, TOKENS, write_gguf, write_hf_folder


def quiet(_done: float, _what: str) -> None:
    """Progress that nobody watches."""


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


# -- what comes out -------------------------------------------------------------------------------


def test_a_built_model_computes_what_its_source_does(built: Built) -> None:
    directory = built.folder
    manifest = verify(directory)
    assert manifest.geometry == msgspec.structs.replace(GEOMETRY, sliding_window=WINDOW)
    hf = AutoModelForCausalLM.from_pretrained(directory / "cloud", dtype=torch.float32)
    edge = EdgeModel.load(directory, threads=1, providers="cpu")
    ids = [int(i) for i in np.random.default_rng(4).integers(0, 256, 130)]
    with torch.no_grad():
        expected = hf(torch.tensor([ids]), use_cache=True)
    found = edge.prefill(ids)
    for layer in range(GEOMETRY.layers):
        keys = expected.past_key_values.layers[layer].keys[0].numpy()  # of the window alone
        last = found.kv.k[layer, :, len(ids) - keys.shape[1] : len(ids)]
        error = np.abs(last - keys).mean() / np.abs(keys).mean()
        assert error < 0.06, "8-bit prefill keys are those of the source, after RoPE"
    logits = expected.logits[0, -1].numpy()
    assert np.corrcoef(found.logits, logits)[0, 1] > 0.99
    step = edge.decode_step(7, found.kv)
    with torch.no_grad():
        after = hf(torch.tensor([[*ids, 7]])).logits[0, -1].numpy()
    assert np.corrcoef(step, after)[0, 1] > 0.99
    text = ChatTokenizer.load(directory, manifest)
    assert text.decode(text.encode_conversation([], "abc")) == "user\nabc"


def test_a_window_of_the_model_reaches_edge_and_cloud(built: Built) -> None:
    directory = built.folder
    hf = AutoModelForCausalLM.from_pretrained(directory / "cloud", dtype=torch.float32)
    assert hf.config.sliding_window == WINDOW
    ids = [int(i) for i in np.random.default_rng(4).integers(0, 256, 130)]
    edge = EdgeModel.load(directory, threads=1, providers="cpu")
    found = edge.prefill(ids)
    step = edge.decode_step(7, found.kv)
    with torch.no_grad():

        def last(text: list[int]) -> np.ndarray:
            return hf(torch.tensor([text]), use_cache=False).logits[0, -1].numpy()

        logits = [last(ids), last([*ids, 7])]
        hf.config.sliding_window = GEOMETRY.context
        whole = last(ids)
    assert np.corrcoef(found.logits, logits[0])[0, 1] > 0.99
    assert np.corrcoef(step, logits[1])[0, 1] > 0.99
    assert np.corrcoef(found.logits, whole)[0, 1] < 0.9, "the window has no effect"


def test_a_model_whose_graphs_have_their_own_head_still_runs(built: Built, tmp_path: Path) -> None:
    """As they were built before the head was a graph of its own."""
    old = tmp_path / "old"
    shutil.copytree(built.folder, old)
    for name in ("prefill", "decode"):
        whole = single_file(old / "edge" / f"{name}.onnx")
        (old / "edge" / f"{name}.onnx").unlink()
        onnx.save(whole, old / "edge" / f"{name}.onnx")
    (old / "edge" / HEAD_FILE).unlink()
    tokens = list(range(100))
    found, expected = (
        EdgeModel.load(folder, threads=1, providers="cpu").prefill(tokens)
        for folder in (old, built.folder)
    )
    np.testing.assert_array_equal(found.logits, expected.logits)
    np.testing.assert_array_equal(found.kv.k[:, :, :100], expected.kv.k[:, :, :100])


def test_graphs_that_have_lost_their_head_are_refused(built: Built, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(built.folder, copy)
    (copy / "edge" / HEAD_FILE).unlink()
    with pytest.raises(ModelMismatch, match=HEAD_FILE):
        EdgeModel.load(copy, threads=1, providers="cpu")


def test_the_cloud_keeps_every_bit_of_the_source(built: Built, source: Path) -> None:
    made = load_file(built.folder / "cloud" / "model.safetensors")
    given = load_file(source / "model.safetensors")
    assert made.keys() == given.keys()
    assert all(torch.equal(made[name].float(), given[name]) for name in given)
    halves = {"a": torch.tensor([0.5, 1 / 3]).bfloat16()}
    assert lossless_dtype(halves) is torch.bfloat16
    assert lossless_dtype({"a": torch.tensor([1 / 3])}) is torch.float32
    assert lossless_dtype({"a": torch.tensor([1 / 3]).half()}) is torch.float16


def test_a_gguf_file_is_the_same_model_as_its_folder(source: Path, tmp_path: Path) -> None:
    from_file = read_gguf(write_gguf(tmp_path / "tiny.gguf"), quiet)
    from_folder = read_folder(source, quiet)
    check_tensors(from_file)
    assert from_file.geometry.kv == from_folder.geometry.kv
    assert from_file.tensors.keys() == from_folder.tensors.keys()
    for name, tensor in from_folder.tensors.items():
        assert torch.equal(from_file.tensors[name], tensor), name
    assert from_file.end_tokens == from_folder.end_tokens
    assert from_file.chat_template == from_folder.chat_template
    vocabulary = json.loads(from_file.tokenizer)["model"]["vocab"]
    assert [text for text, _ in sorted(vocabulary.items(), key=lambda e: e[1])] == TOKENS


def test_it_is_not_built_twice_unless_asked(built: Built, source: Path) -> None:
    before = (built.folder / "manifest.json").stat().st_mtime_ns
    code, out = built.home.run("build", str(source), "--name", "tiny")
    assert code == 0
    assert "built already" in out
    assert (built.folder / "manifest.json").stat().st_mtime_ns == before


def test_list_and_verify(built: Built, tmp_path: Path) -> None:
    code, out = built.home.run("list")
    assert code == 0
    assert re.search(r"tiny .*w8a8", out)
    code, out = built.home.run("verify", "tiny")
    assert code == 0, out
    code, out = Home(tmp_path).run("list")
    assert code == 0
    assert "segue model build" in out


def test_verify_refuses_a_changed_directory_by_name(built: Built, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(built.folder, copy)
    path = copy / "edge" / "embedding_b64.bin"
    data = bytearray(path.read_bytes())
    data[100] ^= 4
    path.write_bytes(data)
    code, out = built.home.run("verify", str(copy))
    assert code == 1
    assert "edge/embedding_b64.bin" in out
    path.unlink()
    code, out = built.home.run("verify", str(copy))
    assert code == 1
    assert "missing" in out
    code, out = built.home.run("verify", "no-such-model")
    assert code == 1
    assert "segue model build" in out


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("geometry", {"layers": GEOMETRY.layers + 1}, "3 layers, the graph 2"),
        ("geometry", {"kv_heads": 1}, "1 KV heads, the graph 2"),
        ("geometry", {"head_dim": 8}, "cannot run"),
        ("geometry", {"layers": "three"}, "cannot be read"),
        ("recipes", {"edge": {}}, "cannot be read"),
        ("files", None, "cannot be read"),
    ],
)
def test_a_manifest_edited_by_hand_stops_the_edge_with_a_hint(
    built: Built, tmp_path: Path, part: str, change: dict[str, object] | None, words: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(built.folder, copy)
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest[part] = None if change is None else manifest[part] | change
    path.write_text(json.dumps(manifest))
    done = subprocess.run(
        [sys.executable, "-m", "segue", "edge", "--model", str(copy), "--port", "0"],
        env=built.home.env,
        capture_output=True,
        text=True,
        timeout=BUILD_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 1, done.stdout
    assert words in done.stderr
    assert "uild the model again" in done.stderr
    assert "Traceback" not in done.stderr


# -- what a source may be wrong about -------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"architecture": "gemma"}, "family 'gemma'"),
        ({"drop": "blk.1.ffn_up.weight"}, r"model\.layers\.1\.mlp\.up_proj\.weight"),
        ({"scaling": "linear"}, "RoPE"),
        ({"pre": "unheard-of"}, "tokenizer gpt2/unheard-of"),
    ],
)
def test_gguf_files_that_cannot_be_built(
    tmp_path: Path, options: dict[str, str], words: str
) -> None:
    path = write_gguf(tmp_path / "bad.gguf", **options)
    with pytest.raises(ModelError, match=words):
        check_tensors(read_gguf(path, quiet))


def test_a_truncated_or_foreign_file(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "cut.gguf")
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ModelMismatch, match="GGUF"):
        read_gguf(path, quiet)
    path.write_bytes(b"PK\x03\x04" * 100)
    with pytest.raises(ModelMismatch, match="GGUF"):
        read_gguf(path, quiet)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "gemma3_text"}, "family 'gemma3_text'"),
        ({"attention_bias": True}, "biases"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "llama3"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"num_hidden_layers": 3}, r"lacks 9 tensors.*layers\.2"),
        ({"num_hidden_layers": 1}, "has not"),
        ({"intermediate_size": 64}, "shape"),
        ({"hidden_size": None}, "config.json"),
    ],
)
def test_folders_that_cannot_be_built(
    tmp_path: Path, config: dict[str, object], words: str
) -> None:
    with pytest.raises(ModelError, match=words):
        check_tensors(read_folder(write_hf_folder(tmp_path / "f", **config), quiet))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_without_one_of_its_files(tmp_path: Path, name: str) -> None:
    folder = write_hf_folder(tmp_path / "f")
    (folder / name).unlink()
    with pytest.raises(ModelMismatch, match=re.escape(name.removeprefix("model"))):
        read_folder(folder, quiet)


def test_weights_that_are_not_numbers(tmp_path: Path) -> None:
    folder = write_hf_folder(tmp_path / "f")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelMismatch, match=r"model\.norm\.weight.*finite"):
        check_tensors(read_folder(folder, quiet))


def test_the_command_says_what_is_wrong(home: Home, tmp_path: Path) -> None:
    gguf = write_gguf(tmp_path / "g.gguf", architecture="gemma")
    for arguments, words in (
        ((str(gguf), "--name", "m"), "family 'gemma'"),
        ((str(tmp_path / "nothing"), "--name", "m"), "no file or folder"),
        ((str(gguf),), "--name"),
        ((str(gguf), "--name", "../m"), "not allowed"),
    ):
        code, out = home.run("build", *arguments)
        assert code == 1
        assert words in out
        assert "Traceback" not in out
        assert home.left() == []


def test_the_command_refuses_weights_that_are_none(home: Home, tmp_path: Path) -> None:
    folder = write_hf_folder(tmp_path / "f")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    code, out = home.run("build", str(folder), "--name", "m")
    assert code == 1
    assert "not finite" in out
    assert "hint:" in out
    assert "Traceback" not in out
    assert home.left() == []


# -- what the machine may do ----------------------------------------------------------------------


def small_files(size: int) -> Callable[[], None]:
    """No file may grow beyond `size` bytes: what a full disk does, for one process tree."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


# The cloud's weights are as large as the source's; the float graph has its RoPE tables on top.
@pytest.mark.parametrize("share", [0.1, 1.01])
def test_a_full_disk_leaves_nothing_and_is_named(home: Home, source: Path, share: float) -> None:
    limit = int(share * (source / "model.safetensors").stat().st_size)
    code, out = home.run("build", str(source), "--name", "m", limit=small_files(limit))
    assert code == 1, out
    assert "disk is full" in out, out
    assert "Traceback" not in out
    assert home.left() == []


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + BUILD_TIMEOUT_S
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def under(folder: Path) -> Iterator[psutil.Process]:
    """Processes that work on the folder."""
    for process in psutil.process_iter(["cmdline"]):
        if str(folder) in " ".join(process.info["cmdline"] or []):
            yield process


@pytest.mark.parametrize(
    ("number", "file"),
    [
        (signal.SIGINT, "artifact/cloud/config.json"),
        (signal.SIGTERM, "work/hf/tokenizer.json"),
    ],
)
def test_an_interrupt_leaves_nothing_and_nobody(
    home: Home, source: Path, number: signal.Signals, file: str
) -> None:
    process = home.start("build", str(source), "--name", "m")
    wait_until(lambda: any(home.folder.glob(f".build-m-*/{file}")), process)
    process.send_signal(number)
    out, _ = process.communicate(timeout=BUILD_TIMEOUT_S)
    assert process.returncode == 1
    assert "interrupted" in out
    assert home.left() == []
    assert list(under(home.folder)) == []


def test_what_a_killed_build_left_is_removed_by_the_next(home: Home, source: Path) -> None:
    process = home.start("build", str(source), "--name", "m")
    wait_until(lambda: any(home.folder.glob(".build-m-*/artifact/cloud")), process)
    process.kill()
    process.wait()
    for child in under(home.folder):  # they end by themselves when they next report
        child.wait(timeout=BUILD_TIMEOUT_S)
    assert home.left() != []
    code, out = home.run("build", str(source), "--name", "m", limit=small_files(1000))
    assert code == 1, out  # the shortest build that goes so far
    assert home.left() == []


def test_a_failed_rebuild_keeps_the_old_model(built: Built, home: Home, source: Path) -> None:
    shutil.copytree(built.folder, home.folder / "tiny")
    again = ("build", str(source), "--name", "tiny", "--force")
    code, out = home.run(*again, limit=small_files(300_000))
    assert code == 1, out
    verify(home.folder / "tiny")
    assert home.left() == ["tiny"]
