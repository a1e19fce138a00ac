"""First step of `segue model build`: source -> cloud weights, tokenizer, chat template.

    python -m segue_cloud.engine.convert --source FILE_OR_FOLDER --artifact DIR --work DIR

Writes into the artifact `cloud/{config.json,model.safetensors}`, `tokenizer.json` and
`chat_template.jinja`; into the work folder `facts.json`, the part of the manifest known so far.
Weights keep every bit: the file's dtype is the smallest that holds all of them exactly.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save_file

from segue_cloud.engine.prepare import prepare_kernels
from segue_cloud.engine.sources.checkpoint import Checkpoint, check_tensors, lossless_dtype
from segue_cloud.engine.sources.gguf_file import read_gguf
from segue_cloud.engine.sources.hf_folder import read_folder
from segue_contract.chat import ChatTemplate, ChatTokenizer
from segue_contract.errors import ModelBuildFailed, ModelMismatch, ModelMissing
from segue_contract.model.manifest import hash_file
from segue_contract.model.progress import run_step, tell

_EDGE_BYTES_PER_WEIGHT = 3  # two 8-bit graphs and a float32 embedding, rounded up
_READ, _CHECK, _WRITE, _COMPILE = 0.3, 0.4, 0.6, 0.65  # where on this step's bar each part ends


def convert(source: Path, artifact: Path, work: Path) -> None:
    """Read `source` and write the cloud's part of the artifact; raises ModelError, OSError."""
    checkpoint = read_source(source)
    tell(_READ, "Checking the weights")
    check_tensors(checkpoint)
    check_chat(checkpoint)
    dtype = lossless_dtype(checkpoint.tensors)
    check_room(work, sum(t.numel() for t in checkpoint.tensors.values()), dtype)
    tell(_CHECK, "Writing the cloud's weights")
    cloud = artifact / "cloud"
    cloud.mkdir(parents=True, exist_ok=True)
    tensors = {n: t.to(dtype).contiguous() for n, t in sorted(checkpoint.tensors.items())}
    save_file(tensors, cloud / "model.safetensors", metadata={"format": "pt"})
    (cloud / "model.safetensors").chmod(0o644)  # safetensors hides it from other users
    _write_json(cloud / "config.json", hf_config(checkpoint, dtype))
    (artifact / "tokenizer.json").write_text(checkpoint.tokenizer, encoding="utf-8")
    (artifact / "chat_template.jinja").write_text(checkpoint.chat_template, encoding="utf-8")
    tell(_WRITE, "Hashing the cloud's weights")
    digest = hash_file(cloud / "model.safetensors").sha256
    _write_json(work / "facts.json", _facts(checkpoint, dtype, digest))
    tell(_COMPILE, "Compiling the cloud's kernels")
    prepare_kernels(checkpoint.geometry)  # so that the first `segue cloud` starts at once
    tell(1.0, "The cloud's weights are ready")


def read_source(source: Path) -> Checkpoint:
    """A GGUF file or a Hugging Face folder."""

    def progress(done: float, what: str) -> None:
        tell(_READ * done, what)

    if source.is_dir():
        return read_folder(source, progress)
    if source.is_file():
        return read_gguf(source, progress)
    raise ModelMissing(
        f"There is no file or folder {source}.",
        hint="Name a .gguf file or a Hugging Face folder.",
    )


def check_chat(checkpoint: Checkpoint) -> None:
    """The tokenizer and the chat template work for a first message.

    Raises:
        ModelError: saying which of them does not.
    """
    if not checkpoint.chat_template.strip():
        raise ModelMismatch(
            f"{checkpoint.source} has no chat template.",
            hint="Use a model made for chat, or put a chat_template.jinja into its folder.",
        )
    template = ChatTemplate(
        checkpoint.chat_template, bos_token=checkpoint.bos_token, eos_token=checkpoint.eos_token
    )
    tokenizer = ChatTokenizer(checkpoint.tokenizer, template, checkpoint.end_tokens)
    ids = tokenizer.encode_conversation([], "Hello")
    if max(ids) >= checkpoint.geometry.vocab:
        raise ModelMismatch(
            f"{checkpoint.source}: the tokenizer has more tokens than the embedding has rows.",
            hint="The tokenizer belongs to another model.",
        )


def check_room(folder: Path, weights: int, dtype: torch.dtype) -> None:
    """Refuse before the disk is full: weights, the float graph, and the edge's two graphs.

    Raises:
        ModelBuildFailed: not that much is free.
    """
    need = weights * (dtype.itemsize + 4 + _EDGE_BYTES_PER_WEIGHT)
    free = shutil.disk_usage(folder).free
    if free < need:
        raise ModelBuildFailed(
            f"The disk is full: the build needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free.",
            hint="Free some space, or set SEGUE_MODEL_HOME to a folder on a larger disk.",
        )


def hf_config(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Any]:
    """The `config.json` with which Hugging Face and the graph builder load the weights."""
    g = checkpoint.geometry
    # The same model; only Mistral's code and graphs know a window.
    name = "Mistral" if g.sliding_window else "Llama"
    window: dict[str, Any] = {}
    if g.sliding_window:
        # The graph builder wants to be told for each layer.
        window = {
            "sliding_window": g.sliding_window,
            "layer_types": ["sliding_attention"] * g.layers,
        }
    return window | {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": name.lower(),
        "hidden_act": "silu",
        "hidden_size": g.hidden,
        "intermediate_size": g.ffn,
        "num_hidden_layers": g.layers,
        "num_attention_heads": g.heads,
        "num_key_value_heads": g.kv_heads,
        "head_dim": g.head_dim,
        "vocab_size": g.vocab,
        "max_position_embeddings": g.context,
        "rope_theta": g.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": g.rope_base},
        "rms_norm_eps": g.norm_eps,
        "tie_word_embeddings": g.tied_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": checkpoint.end_tokens[0],
        "eos_token_id": list(checkpoint.end_tokens),
        "dtype": str(dtype).removeprefix("torch."),
    }


def _facts(checkpoint: Checkpoint, dtype: torch.dtype, weights: str) -> dict[str, Any]:
    return {
        "source": checkpoint.source,
        "licence": checkpoint.licence,
        "weights_digest": weights[:32],
        "geometry": msgspec.to_builtins(checkpoint.geometry),
        "end_tokens": list(checkpoint.end_tokens),
        "bos_token": checkpoint.bos_token,
        "eos_token": checkpoint.eos_token,
        "built_with": {
            "torch": version("torch"),
            "cloud_dtype": str(dtype).removeprefix("torch."),
        },
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=2))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    return run_step(lambda: convert(args.source, args.artifact, args.work))


if __name__ == "__main__":
    sys.exit(main())
