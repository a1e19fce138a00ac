"""`manifest.json`: what a model directory holds, and how to tell that it still does.

<home>/<name>/manifest.json          this file's `Manifest`
              tokenizer.json         Hugging Face tokenizers format
              chat_template.jinja    rendered in a sandbox
              cloud/model.safetensors  bfloat16 or float32 weights, Hugging Face Llama names
              cloud/config.json      Hugging Face's, so that its libraries can load the weights
              edge/prefill.onnx      W8A8, hidden state of the last position, KV out
              edge/decode.onnx       weight-only 8 bit, batch 1, the same outputs
              edge/head.onnx         that hidden state -> logits (an older build's graphs end in
                                     logits themselves, and it has no such file)
              edge/*.data, *.bin     the weights; .bin files are shared by the graphs (with tied
                                     embeddings the lookup and the head are one table)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import msgspec

from segue_contract.errors import UNREADABLE, BadVersion, ModelMismatch, ModelMissing
from segue_contract.kv.layout import KvGeometry, KvRecipe
from segue_contract.kv.steps import codec_named
from segue_contract.model.home import (
    DEFAULT_MODEL,
    FORMAT,
    MANIFEST_NAME,
    is_built,
    model_directory,
    model_home,
)

__all__ = [
    "DEFAULT_MODEL",
    "FORMAT",
    "MANIFEST_NAME",
    "FileEntry",
    "Manifest",
    "ModelGeometry",
    "Quality",
    "RecipeEntry",
    "hash_file",
    "is_built",
    "model_directory",
    "model_home",
    "read_manifest",
    "verify",
    "write_manifest",
]

_HASH_CHUNK = 1 << 20


class ModelGeometry(msgspec.Struct, frozen=True, kw_only=True):
    """The Llama family's sizes. Context in tokens.

    `sliding_window`: a token sees that many tokens, itself among them; 0: all before it.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    context: int
    rope_base: float
    norm_eps: float
    tied_embeddings: bool = True
    sliding_window: int = 0

    @property
    def kv(self) -> KvGeometry:
        return KvGeometry(layers=self.layers, kv_heads=self.kv_heads, head_dim=self.head_dim)


class FileEntry(msgspec.Struct, frozen=True, kw_only=True):
    bytes: int
    sha256: str


class Quality(msgspec.Struct, frozen=True, kw_only=True):
    """Measured loss of the cloud model decoding on KV of a recipe, against its own prefill."""

    agreement: float
    mean_kl: float = 0.0
    cross_entropy_change: float = 0.0
    windows: int = 0
    text_sha256: str = ""
    positions: int = 0
    # None: measured by a version that did not ask
    first_token_agreement: float | None = None
    relative_accuracy: float | None = None


class RecipeEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A KV recipe that a decoder of this model may consume."""

    recipe: KvRecipe
    allowed: bool = True
    quality: Quality | None = None


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    family: str = "llama"
    format: int = FORMAT
    source: str
    licence: str = ""
    weights_digest: str
    geometry: ModelGeometry
    # token ids that end a reply, first the canonical one
    end_tokens: tuple[int, ...]
    bos_token: str = ""
    eos_token: str = ""
    edge_quant: str
    # groups of matrices that the prefill graph keeps heavier, for their loss was over the target
    edge_heavier: tuple[str, ...] = ()
    # recipes by name; "edge" is the one under which the edge's KV ships by default
    recipes: dict[str, RecipeEntry]
    files: dict[str, FileEntry]
    built_with: dict[str, str] = {}
    # the budget under which the recipes were chosen; None: built before there was one
    max_agreement_loss: float | None = None

    @property
    def edge_recipe(self) -> KvRecipe:
        return self.recipes["edge"].recipe

    def allowed_recipes(self) -> frozenset[str]:
        """Digests of the recipes that a decoder may consume."""
        return frozenset(self.allowed_codecs())

    def allowed_codecs(self) -> dict[str, str]:
        """The codec of each recipe that a decoder may consume, by the recipe's digest.

        Two names may stand for one recipe; where one of them is not allowed, it is not.
        """
        entries = self.recipes.values()
        refused = {entry.recipe.digest for entry in entries if not entry.allowed}
        allowed = {entry.recipe.digest: entry.recipe.codec for entry in entries if entry.allowed}
        return {digest: codec for digest, codec in allowed.items() if digest not in refused}


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a model directory, its form checked, its files not yet (`verify`).

    Raises:
        ModelMissing: no such directory or no manifest in it.
        ModelMismatch: the manifest cannot be read or is of another format.
    """
    path = directory / MANIFEST_NAME
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelMissing(
            f"There is no built model in {directory}.",
            hint="Build one with `segue model build`.",
        ) from error
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except UNREADABLE as error:
        raise ModelMismatch(
            f"{path} cannot be read: {error}.", hint="Build the model again."
        ) from error
    if manifest.format != FORMAT:
        raise ModelMismatch(
            f"{path} has format {manifest.format}; this version reads {FORMAT}.",
            hint="Build the model again with this version.",
        )
    if "edge" not in manifest.recipes:
        raise ModelMismatch(f"{path} names no edge recipe.", hint="Build the model again.")
    _check_geometry(path, manifest.geometry)
    if not manifest.end_tokens or not all(
        0 <= token < manifest.geometry.vocab for token in manifest.end_tokens
    ):
        raise ModelMismatch(
            f"{path}: the end tokens {list(manifest.end_tokens)} are not of its vocabulary of "
            f"{manifest.geometry.vocab}.",
            hint="Build the model again.",
        )
    _check_recipes(path, manifest)
    return manifest


def _check_geometry(path: Path, geometry: ModelGeometry) -> None:
    sizes = msgspec.structs.asdict(geometry)
    for name, value in sizes.items():
        may_be_zero = name in ("tied_embeddings", "sliding_window")
        if value < 0 or (value == 0 and not may_be_zero) or value != value:
            raise ModelMismatch(f"{path}: {name} is {value}.", hint="Build the model again.")
    if geometry.heads % geometry.kv_heads:
        raise ModelMismatch(
            f"{path}: {geometry.heads} heads do not share {geometry.kv_heads} KV heads evenly.",
            hint="Build the model again.",
        )


def _check_recipes(path: Path, manifest: Manifest) -> None:
    """A manifest edited by hand: what would only show when the first block arrives."""
    for name, entry in manifest.recipes.items():
        wrong = ""
        if entry.recipe.weights_digest != manifest.weights_digest:
            wrong = "is of other weights than the model"
        elif entry.quality is not None and not 0.0 <= entry.quality.agreement <= 1.0:
            wrong = f"has an agreement of {entry.quality.agreement}, not from 0 to 1"
        else:
            try:
                codec_named(entry.recipe.codec)
            except BadVersion as error:
                wrong = f"has a codec unknown here: {error.message}"
        if wrong:
            raise ModelMismatch(
                f"{path}: the recipe {name!r} {wrong}.", hint="Build the model again."
            )


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `manifest.json` in one step: readers see the old one or the new one."""
    data = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    temporary = directory / (MANIFEST_NAME + ".tmp")
    temporary.write_bytes(data)
    temporary.replace(directory / MANIFEST_NAME)


def hash_file(path: Path, progress: Callable[[int], None] | None = None) -> FileEntry:
    """Size and SHA-256 of a file; `progress` is told the bytes read since its last call."""
    state = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK):
            state.update(chunk)
            size += len(chunk)
            if progress is not None:
                progress(len(chunk))
    return FileEntry(bytes=size, sha256=state.hexdigest())


def verify(directory: Path, progress: Callable[[int], None] | None = None) -> Manifest:
    """Read the manifest and re-hash every file it lists.

    Raises:
        ModelMissing, ModelMismatch: naming the first file that is missing or differs.
    """
    manifest = read_manifest(directory)
    for name, entry in sorted(manifest.files.items()):
        path = directory / name
        if not path.resolve().is_relative_to(directory.resolve()):
            raise ModelMismatch(f"The manifest lists {name!r}, outside the model directory.")
        if not path.is_file():
            raise ModelMismatch(
                f"{name} is listed in the manifest and missing.", hint="Build the model again."
            )
        found = hash_file(path, progress)
        if found != entry:
            raise ModelMismatch(
                f"{name} is not the file that was built (its SHA-256 differs).",
                hint="Somebody changed it. Build the model again.",
                file=name,
            )
    return manifest
