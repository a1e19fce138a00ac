"""`segue model tensorrt` on a built model: a random Llama, under a budget that it meets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from segue_contract.model.manifest import read_manifest, verify, write_manifest
from segue_edge.prefill.kv import PastKv
from segue_edge.prefill.providers import CPU, CUDA, Device
from segue_edge.prefill.runner import GraphRunner, open_session
from segue_edge.prefill.runtime import EdgeModel
from segue_edge.prefill.tensorrt import QDQ, QDQ_GRAPH, TENSORRT, may_use_qdq
from tests.support.tiny_source import write_hf_folder


def segue_model(home: Path, *arguments: str) -> str:
    env = {**os.environ, "SEGUE_MODEL_HOME": str(home), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-m", "segue", "model", *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tensorrt")
    source = write_hf_folder(folder / "source")
    segue_model(folder, "build", str(source), "--name", "tiny", "--max-agreement-loss", "0.9")
    return folder


def test_the_graph_is_added_measured_and_sealed(home: Path) -> None:
    before = read_manifest(home / "tiny")
    said = segue_model(home, "tensorrt", "tiny")
    assert "has a graph for TensorRT" in said
    manifest = verify(home / "tiny")
    assert manifest.recipes["edge"] == before.recipes["edge"]
    assert QDQ_GRAPH in manifest.files
    assert may_use_qdq(manifest, home / "tiny", (TENSORRT, CUDA, CPU))
    assert not may_use_qdq(manifest, home / "tiny", (CUDA, CPU))
    session = open_session(home / "tiny" / QDQ_GRAPH, Device("cpu", (CPU,)), 1)
    kv = PastKv(manifest.geometry.kv, 128)
    found = GraphRunner(session, manifest.geometry).run(np.arange(100), kv).reshape(-1)
    model = EdgeModel.load(home / "tiny", threads=1, providers="cpu")
    assert model.recipe_name == "edge", "without TensorRT nothing changes"
    expected = model.prefill(range(100)).logits
    assert np.corrcoef(found, expected)[0, 1] > 0.9


def test_a_report_measures_it_with_the_others(home: Path) -> None:
    before = read_manifest(home / "tiny")
    text = home / "own.txt"
    text.write_text("A text of one's own, long enough to be cut in windows. " * 80)
    said = segue_model(home, "quality", "tiny", "--text", str(text), "--windows", "1")
    assert QDQ in said
    manifest = read_manifest(home / "tiny")
    names = [name for name in manifest.recipes if name.startswith(QDQ)]
    assert len(names) > 1
    for name in names:
        old, new = before.recipes[name], manifest.recipes[name]
        assert old.quality is not None
        assert new.quality is not None
        assert new.quality.text_sha256 != old.quality.text_sha256
        assert (new.recipe, new.allowed) == (old.recipe, old.allowed)


def test_a_graph_that_loses_too_much_is_said_and_not_kept(home: Path) -> None:
    strict = msgspec.structs.replace(read_manifest(home / "tiny"), max_agreement_loss=0.0)
    write_manifest(home / "tiny", strict)
    said = segue_model(home, "tensorrt", "tiny")
    assert "No INT8 graph for TensorRT is within" in said
    manifest = verify(home / "tiny")
    assert QDQ_GRAPH not in manifest.files
    assert not (home / "tiny" / QDQ_GRAPH).exists()
    assert not manifest.recipes[QDQ].allowed
    assert not may_use_qdq(manifest, home / "tiny", (TENSORRT, CUDA, CPU))
