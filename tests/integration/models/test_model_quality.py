"""The quality gate end to end: a build that falls back, `segue model quality`, what it stores.

The model is a random Llama: in 8 bits it loses more than the default budget allows.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from segue_contract.model.gate import CODECS, WEIGHT_ONLY, codecs_of
from segue_contract.model.manifest import read_manifest, verify, write_manifest
from segue_edge.prefill.runtime import EdgeModel
from tests.integration.models.conftest import Built, build_tiny

TIMEOUT_S = 280


def segue_model(home: Path, *arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output, standard error."""
    env = {**os.environ, "SEGUE_MODEL_HOME": str(home), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-m", "segue", "model", *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def fallen(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A build under the usual budget, which no INT8 graph of random weights meets."""
    return build_tiny(tmp_path_factory.mktemp("fallen"), source)


def test_a_model_that_int8_harms_falls_back_and_says_so(fallen: Built) -> None:
    home, said = fallen.home.folder, fallen.said
    assert "Every INT8 recipe" in said
    assert "segue model quality tiny" in said
    manifest = verify(home / "tiny")
    assert manifest.max_agreement_loss == 0.03
    for codec in CODECS:
        entry = manifest.recipes[f"edge-{codec}"]
        assert not entry.allowed
        assert entry.quality is not None
        assert entry.quality.agreement < 0.97
    edge = manifest.recipes["edge"]
    assert edge.allowed
    assert edge.quality is not None
    assert edge.quality.agreement >= 0.97
    assert edge.recipe.weight_quant == manifest.edge_quant
    assert edge.recipe.digest in manifest.allowed_recipes()
    assert manifest.recipes["edge-k8v8"].recipe.digest not in manifest.allowed_recipes()


def test_the_node_runs_the_graph_of_its_recipe(fallen: Built) -> None:
    home = fallen.home.folder
    model = EdgeModel.load(home / "tiny", threads=1, providers="cpu")
    tokens = list(range(100))
    first = model.prefill(tokens)
    assert model.recipe == model.manifest.edge_recipe
    whole = model.prefill(tokens[:50])
    again = model.prefill(tokens, whole.kv)
    np.testing.assert_allclose(again.kv.k[:, :, :100], first.kv.k[:, :, :100], atol=1e-4)


def test_quality_on_a_users_text_is_stored_with_its_digest(fallen: Built, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(fallen.home.folder, home)
    before = read_manifest(home / "tiny")
    text = tmp_path / "mine.txt"
    text.write_text("Something else entirely, in words of my own. " * 40)
    code, out, err = segue_model(
        home, "quality", "tiny", "--text", str(text), "--windows", "3", "-o", "json"
    )
    assert code == 0, err
    report = json.loads(out)
    digest = hashlib.sha256(text.read_bytes()).hexdigest()
    assert report["windows"] == 3
    assert {row["text_sha256"] for row in report["rows"]} == {digest}
    assert all(row["positions"] == 3 * report["scored"] for row in report["rows"])
    assert all(0 <= row["first_token_agreement"] <= 1 for row in report["rows"])
    after = verify(home / "tiny")
    found = after.recipes["edge"].quality
    assert found is not None
    assert (found.windows, found.text_sha256) == (3, digest)
    assert found == after.recipes[report["edge"]].quality
    for name, entry in before.recipes.items():  # measuring changes no decision
        assert after.recipes[name].allowed == entry.allowed
        assert after.recipes[name].recipe == entry.recipe


def test_a_new_budget_chooses_again(fallen: Built, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(fallen.home.folder, home)
    arguments = ("quality", "tiny", "--windows", "2", "--max-agreement-loss", "0.9")
    code, out, err = segue_model(home, *arguments)
    assert code == 0, err
    assert "k4v4" in out
    manifest = read_manifest(home / "tiny")
    assert manifest.max_agreement_loss == 0.9
    assert manifest.edge_recipe.codec == codecs_of(WEIGHT_ONLY)[-1], "the cheapest that is left"
    assert manifest.edge_recipe.digest in manifest.allowed_recipes()
    EdgeModel.load(home / "tiny", threads=1, providers="cpu").check_runs()


def test_texts_that_are_empty_or_too_short(fallen: Built, tmp_path: Path) -> None:
    home = fallen.home.folder
    empty, short = tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.write_text("")
    short.write_text("Too short. " * 40)
    manifest = (home / "tiny" / "manifest.json").read_bytes()
    for path, words in ((empty, "is empty"), (short, "20 windows of 320 + 160 tokens take 3,520")):
        code, out, err = segue_model(home, "quality", "tiny", "--text", str(path))
        assert code == 1
        assert words in " ".join((out + err).split())
        assert "Traceback" not in err
    assert (home / "tiny" / "manifest.json").read_bytes() == manifest


def test_a_manifest_of_before_the_gate_gains_the_ladder(fallen: Built, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(fallen.home.folder, home)
    manifest = read_manifest(home / "tiny")
    old = {name: manifest.recipes[name] for name in ("edge", "edge-weight-only", "exact")}
    write_manifest(
        home / "tiny",
        msgspec.structs.replace(manifest, recipes=old, max_agreement_loss=None),
    )
    code, _, err = segue_model(home, "quality", "tiny", "--windows", "1")
    assert code == 0, err
    after = read_manifest(home / "tiny")
    assert after.edge_recipe == manifest.edge_recipe
    measured = {f"{WEIGHT_ONLY}-{codec}" for codec in codecs_of(WEIGHT_ONLY)}
    assert measured <= set(after.recipes)
