"""`segue model tensorrt` on a built model: a random Llama, under a budget that it meets."""

from __future__ import annotations

import shutil

import msgspec
import numpy as np
import pytest

from segue_contract.model.manifest import read_manifest, verify, write_manifest
from segue_edge.prefill.kv import PastKv
from segue_edge.prefill.providers import CPU, CUDA, Device
from segue_edge.prefill.runner import GraphRunner, open_session
from segue_edge.prefill.runtime import EdgeModel
from segue_edge.prefill.tensorrt import QDQ, QDQ_GRAPH, TENSORRT, may_use_qdq
from tests.integration.models.conftest import Built, Home


@pytest.fixture(scope="module")
def home(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Home:
    home = Home(tmp_path_factory.mktemp("tensorrt") / "home")
    shutil.copytree(built.folder, home.folder / "tiny")
    return home


def segue_model(home: Home, *arguments: str) -> str:
    code, said = home.run(*arguments)
    assert code == 0, said
    return said


def test_the_graph_is_added_measured_and_sealed(home: Home) -> None:
    before = read_manifest(home.folder / "tiny")
    said = segue_model(home, "tensorrt", "tiny")
    assert "has a graph for TensorRT" in said
    manifest = verify(home.folder / "tiny")
    assert manifest.recipes["edge"] == before.recipes["edge"]
    assert QDQ_GRAPH in manifest.files
    assert may_use_qdq(manifest, home.folder / "tiny", (TENSORRT, CUDA, CPU))
    assert not may_use_qdq(manifest, home.folder / "tiny", (CUDA, CPU))
    session = open_session(home.folder / "tiny" / QDQ_GRAPH, Device("cpu", (CPU,)), 1)
    kv = PastKv(manifest.geometry.kv, 128)
    found = GraphRunner(session, manifest.geometry).run(np.arange(100), kv).reshape(-1)
    model = EdgeModel.load(home.folder / "tiny", threads=1, providers="cpu")
    assert model.recipe_name == "edge", "without TensorRT nothing changes"
    expected = model.prefill(range(100)).logits
    assert np.corrcoef(found, expected)[0, 1] > 0.9


def test_a_report_measures_it_with_the_others(home: Home) -> None:
    before = read_manifest(home.folder / "tiny")
    text = home.folder / "own.txt"
    text.write_text("A text of one's own, long enough to be cut in windows. " * 80)
    said = segue_model(home, "quality", "tiny", "--text", str(text), "--windows", "1")
    assert QDQ in said
    manifest = read_manifest(home.folder / "tiny")
    names = [name for name in manifest.recipes if name.startswith(QDQ)]
    assert len(names) > 1
    for name in names:
        old, new = before.recipes[name], manifest.recipes[name]
        assert old.quality is not None
        assert new.quality is not None
        assert new.quality.text_sha256 != old.quality.text_sha256
        assert (new.recipe, new.allowed) == (old.recipe, old.allowed)


def test_a_graph_that_loses_too_much_is_said_and_not_kept(home: Home) -> None:
    strict = msgspec.structs.replace(read_manifest(home.folder / "tiny"), max_agreement_loss=0.0)
    write_manifest(home.folder / "tiny", strict)
    said = segue_model(home, "tensorrt", "tiny")
    assert "No INT8 graph for TensorRT is within" in said
    manifest = verify(home.folder / "tiny")
    assert QDQ_GRAPH not in manifest.files
    assert not (home.folder / "tiny" / QDQ_GRAPH).exists()
    assert not manifest.recipes[QDQ].allowed
    assert not may_use_qdq(manifest, home.folder / "tiny", (TENSORRT, CUDA, CPU))
