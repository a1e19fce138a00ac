"""Peers in environments of their own: what is missing or breaks is said, and the suite goes on."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.torch import load_file

from segue_contract.model.manifest import read_manifest
from tests.bench.harness import ROOT, Report
from tests.bench.suites import _peer_process
from tests.bench.suites._gguf_file import write_gguf
from tests.bench.suites._peer_process import (
    PeerMissing,
    hugging_face_folder,
    peer_python,
    running_peer,
)
from tests.bench.suites.decode import _engine_rows
from tests.support.tiny_llama import build_tiny_llama

ECHO = """
import json, sys
print(json.dumps({"ready": 0.5, "said": sys.argv[1:]}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if request.get("die"):
        sys.exit("out of pages")
    print(json.dumps({"seconds": len(request["prompts"])}), flush=True)
"""


@pytest.fixture
def peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `.peers` with a peer called `echo`, which is this Python, and its script."""
    home = tmp_path / "peers"
    (home / "echo" / "bin").mkdir(parents=True)
    (home / "echo" / "bin" / "python").symlink_to(sys.executable)
    (home / "echo" / ".segue-peer").write_text("echo==1")
    (home / "echo.py").write_text(ECHO)
    monkeypatch.setenv("SEGUE_PEERS", str(home))
    return home


def test_a_peer_answers_request_by_request_and_ends_with_its_block(peers: Path) -> None:
    with running_peer("echo", str(peers / "echo.py"), ["bf16"]) as peer:
        assert peer.ready == {"ready": 0.5, "said": ["bf16"]}
        assert peer.ask({"prompts": [[1, 2], [3]]}) == {"seconds": 2}
        assert peer.ask({"prompts": [[1]]}) == {"seconds": 1}
        pid = peer.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_peer_that_ends_leaves_its_last_words(peers: Path) -> None:
    with (
        running_peer("echo", str(peers / "echo.py"), []) as peer,
        pytest.raises(PeerMissing, match="out of pages"),
    ):
        peer.ask({"die": True})


def test_a_peer_that_hangs_is_given_up(peers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_peer_process, "LOAD_TIMEOUT_S", 0.2)
    (peers / "hangs.py").write_text("import sys; sys.stdin.read()")
    with (
        pytest.raises(PeerMissing, match="did not answer"),
        running_peer("echo", str(peers / "hangs.py"), []),
    ):
        pass


def test_a_build_that_did_not_finish_is_no_peer(peers: Path) -> None:
    (peers / "echo" / ".segue-peer").unlink()
    with pytest.raises(PeerMissing, match="scripts/peers echo"):
        peer_python("echo")


def test_without_peers_the_decode_suite_says_how_to_get_them_and_goes_on(
    peers: Path, tmp_path: Path
) -> None:
    build_tiny_llama(tmp_path / "tiny")
    report = Report("decode", {"cores": 2})
    at_32 = asyncio.run(_engine_rows(report, tmp_path / "tiny", 4, True))
    assert at_32 > 0
    assert not any("vllm" in row.name or "llama_cpp" in row.name for row in report.rows)
    left_out = {one["rows"]: one["reason"] for one in report.as_json()["left_out"]}
    assert "scripts/peers vllm" in left_out["vllm"]
    assert "scripts/peers llama-cpp" in left_out["llama-cpp"]


def test_the_folder_for_peers_has_config_weights_and_tokenizer(model_dir: Path) -> None:
    with hugging_face_folder(model_dir) as folder:
        weights = folder / "model.safetensors"
        expected = read_manifest(model_dir).files["cloud/model.safetensors"].bytes
        assert weights.stat().st_size == expected
        names = {path.name for path in folder.iterdir()}
        assert {"config.json", "tokenizer.json"} <= names
    assert not folder.exists()
    assert (model_dir / "cloud" / "model.safetensors").exists()


def test_the_gguf_file_has_every_weight_of_the_model(tmp_path: Path) -> None:
    manifest = build_tiny_llama(tmp_path)
    write_gguf(tmp_path, tmp_path / "tiny.gguf", "fp32")
    written = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors}
    weights = load_file(tmp_path / "cloud" / "model.safetensors")
    assert len(written) == len(weights)
    g = manifest.geometry
    for layer in range(g.layers):
        theirs = written[f"blk.{layer}.attn_k.weight"].data
        ours = weights[f"model.layers.{layer}.self_attn.k_proj.weight"].numpy()
        for head in range(g.kv_heads):
            rows = slice(head * g.head_dim, (head + 1) * g.head_dim)
            half = g.head_dim // 2
            np.testing.assert_array_equal(theirs[rows][0::2], ours[rows][:half])
            np.testing.assert_array_equal(theirs[rows][1::2], ours[rows][half:])
        theirs = written[f"blk.{layer}.ffn_down.weight"].data
        ours = weights[f"model.layers.{layer}.mlp.down_proj.weight"].numpy()
        np.testing.assert_array_equal(theirs, ours)


def test_scripts_peers_refuses_a_name_it_does_not_know() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "peers", "nobody"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "vllm" in done.stderr
