"""Manifest and `verify`: a model directory is what was built, or it is refused by name."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from segue_contract.errors import ModelMismatch, ModelMissing
from segue_contract.kv.layout import KvRecipe
from segue_contract.model.home import is_built, model_directory, model_home
from segue_contract.model.manifest import (
    MANIFEST_NAME,
    Manifest,
    ModelGeometry,
    Quality,
    RecipeEntry,
    hash_file,
    read_manifest,
    verify,
    write_manifest,
)

GEOMETRY = ModelGeometry(
    layers=2, hidden=8, heads=2, kv_heads=1, head_dim=4, ffn=16, vocab=32, context=64,
    rope_base=10000.0, norm_eps=1e-5,
)  # fmt: skip
RECIPE = KvRecipe(weights_digest="ab" * 16, weight_quant="none", rope="base=10000")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "edge").mkdir()
    (tmp_path / "edge" / "prefill.onnx").write_bytes(b"graph" * 1000)
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    files = ("edge/prefill.onnx", "tokenizer.json")
    write_manifest(
        tmp_path,
        Manifest(
            name="m",
            source="s",
            weights_digest="ab" * 16,
            geometry=GEOMETRY,
            end_tokens=(2, 0),
            edge_quant="q",
            recipes={"edge": RecipeEntry(recipe=RECIPE)},
            files={name: hash_file(tmp_path / name) for name in files},
        ),
    )
    return tmp_path


def test_what_was_written_is_read_back_and_verifies(directory: Path) -> None:
    seen: list[int] = []
    manifest = verify(directory, seen.append)
    assert manifest == read_manifest(directory)
    assert sum(seen) == sum(entry.bytes for entry in manifest.files.values())
    assert manifest.edge_recipe.digest in manifest.allowed_recipes()


def test_one_changed_byte_is_found_and_named(directory: Path) -> None:
    path = directory / "edge" / "prefill.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelMismatch, match=r"edge/prefill\.onnx") as caught:
        verify(directory)
    assert caught.value.fields["file"] == "edge/prefill.onnx"


def test_a_missing_file_is_named(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    with pytest.raises(ModelMismatch, match=r"tokenizer\.json"):
        verify(directory)


def test_a_manifest_may_not_reach_outside(directory: Path) -> None:
    manifest = read_manifest(directory)
    outside = directory.parent / "outside"
    outside.write_bytes(b"x")
    files = {"../outside": hash_file(outside)}
    write_manifest(directory, msgspec.structs.replace(manifest, files=files))
    with pytest.raises(ModelMismatch, match="outside"):
        verify(directory)


def test_directories_that_hold_no_model(tmp_path: Path, directory: Path) -> None:
    with pytest.raises(ModelMissing, match="segue model build"):
        read_manifest(tmp_path / "nothing")
    (directory / MANIFEST_NAME).write_text("{")
    with pytest.raises(ModelMismatch, match="cannot be read"):
        read_manifest(directory)


def test_another_format_and_a_manifest_without_the_edge(directory: Path) -> None:
    manifest = read_manifest(directory)
    write_manifest(directory, msgspec.structs.replace(manifest, format=99))
    with pytest.raises(ModelMismatch, match="99"):
        read_manifest(directory)
    assert not is_built(directory), "set-up builds it again"
    write_manifest(directory, msgspec.structs.replace(manifest, recipes={}))
    with pytest.raises(ModelMismatch, match="edge recipe"):
        read_manifest(directory)


def test_recipes_that_are_not_allowed_are_not_offered(directory: Path) -> None:
    manifest = read_manifest(directory)
    entry = RecipeEntry(recipe=RECIPE, allowed=False)
    assert not msgspec.structs.replace(manifest, recipes={"edge": entry}).allowed_recipes()


def test_one_name_that_disallows_a_recipe_is_enough(directory: Path) -> None:
    manifest = read_manifest(directory)
    entries = {
        "edge": RecipeEntry(recipe=RECIPE),
        "edge-k8v8": RecipeEntry(recipe=RECIPE, allowed=False),
    }
    assert not msgspec.structs.replace(manifest, recipes=entries).allowed_recipes()


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (
            RecipeEntry(recipe=msgspec.structs.replace(RECIPE, weights_digest="cd" * 16)),
            "other weights",
        ),
        (RecipeEntry(recipe=msgspec.structs.replace(RECIPE, codec="k2v2")), "k2v2"),
        (RecipeEntry(recipe=RECIPE, quality=Quality(agreement=1.5)), "1.5"),
    ],
)
def test_a_manifest_edited_by_hand_is_refused_by_name(
    directory: Path, entry: RecipeEntry, words: str
) -> None:
    manifest = read_manifest(directory)
    recipes = {"edge": RecipeEntry(recipe=RECIPE), "edge-x": entry}
    write_manifest(directory, msgspec.structs.replace(manifest, recipes=recipes))
    with pytest.raises(ModelMismatch, match=words) as caught:
        read_manifest(directory)
    assert "edge-x" in caught.value.message


@pytest.mark.parametrize(
    "change", [{"layers": 0}, {"rope_base": -1.0}, {"heads": 3, "kv_heads": 2}]
)
def test_sizes_that_no_model_has(directory: Path, change: dict[str, float]) -> None:
    manifest = read_manifest(directory)
    geometry = msgspec.structs.replace(manifest.geometry, **change)
    write_manifest(directory, msgspec.structs.replace(manifest, geometry=geometry))
    with pytest.raises(ModelMismatch, match=next(iter(change))):
        read_manifest(directory)


@pytest.mark.parametrize("tokens", [(), (2, 32), (-1,)])
def test_end_tokens_that_the_vocabulary_lacks(directory: Path, tokens: tuple[int, ...]) -> None:
    manifest = read_manifest(directory)
    write_manifest(directory, msgspec.structs.replace(manifest, end_tokens=tokens))
    with pytest.raises(ModelMismatch, match="end tokens"):
        read_manifest(directory)


def test_a_manifest_of_before_the_quality_gate_is_still_read(directory: Path) -> None:
    path = directory / MANIFEST_NAME
    raw = msgspec.json.decode(path.read_bytes())
    del raw["max_agreement_loss"]
    raw["recipes"]["edge"]["quality"] = {"agreement": 0.98, "windows": 4, "text_sha256": "ab"}
    path.write_bytes(msgspec.json.encode(raw))
    quality = read_manifest(directory).recipes["edge"].quality
    assert quality is not None
    assert quality.first_token_agreement is None
    assert read_manifest(directory).max_agreement_loss is None


def test_home_and_names(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGUE_MODEL_HOME", str(tmp_path / "home"))
    assert model_home() == tmp_path / "home"
    assert model_directory("some-model") == tmp_path / "home" / "some-model"
    assert model_directory(str(directory)) == directory
    assert is_built(directory)
    assert not is_built(tmp_path / "home")
    monkeypatch.delenv("SEGUE_MODEL_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert model_home() == tmp_path / "segue" / "models"
