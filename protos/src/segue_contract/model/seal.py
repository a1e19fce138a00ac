"""Last step of a build: hash what lies in the artifact and write its manifest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from segue_contract.errors import ModelMismatch
from segue_contract.kv.layout import KvRecipe
from segue_contract.model.gate import Measured, choose, entries
from segue_contract.model.manifest import (
    MANIFEST_NAME,
    Manifest,
    ModelGeometry,
    Quality,
    RecipeEntry,
    hash_file,
    write_manifest,
)

REQUIRED = (
    "tokenizer.json",
    "chat_template.jinja",
    "cloud/config.json",
    "cloud/model.safetensors",
    "edge/decode.onnx",
)


class SourceFacts(msgspec.Struct, kw_only=True):
    """What the first step (`segue_cloud.engine.convert`) found out."""

    source: str
    licence: str
    weights_digest: str
    geometry: ModelGeometry
    end_tokens: tuple[int, ...]
    bos_token: str
    eos_token: str
    built_with: dict[str, str]


class GateFacts(msgspec.Struct, kw_only=True):
    """What the third step (`segue_edge.prefill.ladder`) measured, and against which budget."""

    measured: list[Measured]
    max_agreement_loss: float


class EdgeFacts(msgspec.Struct, kw_only=True):
    """What the second step (`segue_edge.prefill.export`) made: names of quantisations, quality."""

    edge_quant: str
    decode_quant: str
    quality: Quality | None = None
    heavier: tuple[str, ...] = ()
    built_with: dict[str, str] = {}


def seal(artifact: Path, work: Path, name: str, progress: Callable[[int], None]) -> Manifest:
    """Write the manifest; `progress` is told the bytes hashed since its last call.

    Raises:
        ModelMismatch: an earlier step left something out.
    """
    for required in REQUIRED:
        _require(artifact, required)
    source = _read(work / "facts.json", SourceFacts)
    edge = _read(work / "edge.json", EdgeFacts)
    gate = _read(work / "gate.json", GateFacts)
    chosen = recipes(source, gate)
    if chosen["edge"].recipe.weight_quant != edge.decode_quant:
        _require(artifact, "edge/prefill.onnx")
    manifest = Manifest(
        name=name,
        source=source.source,
        licence=source.licence,
        weights_digest=source.weights_digest,
        geometry=source.geometry,
        end_tokens=source.end_tokens,
        bos_token=source.bos_token,
        eos_token=source.eos_token,
        edge_quant=chosen["edge"].recipe.weight_quant,
        edge_heavier=edge.heavier,
        recipes=chosen,
        files={
            path.relative_to(artifact).as_posix(): hash_file(path, progress)
            for path in sorted(artifact.rglob("*"))
            if path.is_file() and path.name != MANIFEST_NAME
        },
        built_with=source.built_with | edge.built_with,
        max_agreement_loss=gate.max_agreement_loss,
    )
    write_manifest(artifact, manifest)
    return manifest


def recipes(source: SourceFacts, gate: GateFacts) -> dict[str, RecipeEntry]:
    """All measured recipes by name, and those that the budget chooses (`model.gate`)."""
    rope = f"base={source.geometry.rope_base:g}"
    base = KvRecipe(weights_digest=source.weights_digest, weight_quant="", rope=rope)
    choice = choose(gate.measured, source.geometry.kv, gate.max_agreement_loss)
    return entries(gate.measured, choice, base)


def _require(artifact: Path, name: str) -> None:
    if not (artifact / name).is_file():
        raise ModelMismatch(f"The build did not make {name}.", hint="Build it again.")


def _read(path: Path, kind: type[Any]) -> Any:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError) as error:
        raise ModelMismatch(f"The build step that writes {path.name} failed: {error}.") from error
