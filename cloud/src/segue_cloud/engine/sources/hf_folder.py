"""Reads a Hugging Face folder of the Llama family: config, safetensors, tokenizer, template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from segue_cloud.engine.sources.checkpoint import HEAD, Checkpoint
from segue_contract.errors import ModelError, ModelMismatch
from segue_contract.model.manifest import ModelGeometry
from segue_contract.model.progress import Progress

# Mistral is a Llama, most of them with a sliding window.
_FAMILIES = ("llama", "mistral")


def read_folder(path: Path, progress: Progress) -> Checkpoint:
    """Read the folder at `path`.

    Raises:
        ModelMismatch: a file is missing, unreadable, or does not fit the others.
        ModelError: another family, or an option of it that is not supported.
    """
    progress(0.0, "Reading the configuration")
    config = _json(path / "config.json")
    geometry = _geometry(config)
    tensors = _tensors(path, progress)
    if geometry.tied_embeddings:
        tensors.pop(HEAD, None)
    tokenizer_path = path / "tokenizer.json"
    if not tokenizer_path.is_file():
        raise ModelMismatch(
            f"{path} has no tokenizer.json.", hint="Save the fast tokenizer into the folder."
        )
    settings = _json(path / "tokenizer_config.json", {})
    tokenizer = tokenizer_path.read_text(encoding="utf-8")
    ends = _end_tokens(config, _json(path / "generation_config.json", {}), settings, tokenizer)
    return Checkpoint(
        source=path.name,
        licence=str(config.get("license", "")),
        geometry=geometry,
        tensors=tensors,
        tokenizer=tokenizer,
        chat_template=_template(path, settings),
        end_tokens=ends,
        bos_token=_token_text(settings.get("bos_token")),
        eos_token=_token_text(settings.get("eos_token")),
    )


def _json(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    if default is not None and not path.is_file():
        return default
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelMismatch(
            f"{path.parent} has no {path.name}.", hint="Give a complete Hugging Face folder."
        ) from error
    except (ValueError, OSError) as error:
        raise ModelMismatch(f"{path} cannot be read: {error}.") from error
    if not isinstance(value, dict):
        raise ModelMismatch(f"{path} holds no JSON object.")
    return value


def _geometry(config: dict[str, Any]) -> ModelGeometry:
    family = config.get("model_type")
    if family not in _FAMILIES:
        raise ModelError(
            f"This model is of the family {family!r}; only 'llama' and 'mistral' can be built.",
            hint="Use a Llama-family model, such as SmolLM2.",
            family=str(family),
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    refused = {
        f"RoPE scaling {kind!r}": kind not in ("default", None),
        "biases": bool(config.get("attention_bias") or config.get("mlp_bias")),
        f"activation {config.get('hidden_act')!r}": config.get("hidden_act", "silu") != "silu",
    }
    for what, present in refused.items():
        if present:
            raise ModelError(
                f"This model uses {what}, which is not supported.", hint="Use a plain Llama model."
            )
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        context, window = int(config["max_position_embeddings"]), _window(config)
        return ModelGeometry(
            layers=int(config["num_hidden_layers"]),
            hidden=hidden,
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            ffn=int(config["intermediate_size"]),
            vocab=int(config["vocab_size"]),
            context=context,
            rope_base=float(rope.get("rope_theta") or config.get("rope_theta", 10000.0)),
            norm_eps=float(config["rms_norm_eps"]),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            sliding_window=window if 0 < window < context else 0,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelMismatch(f"config.json lacks or garbles an entry: {error}.") from error


def _window(config: dict[str, Any]) -> int:
    """Mistral's `sliding_window`; Llama's own code ignores such an entry, so we do."""
    return int(config.get("sliding_window") or 0) if config["model_type"] == "mistral" else 0


def _tensors(path: Path, progress: Progress) -> dict[str, torch.Tensor]:
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ModelMismatch(
            f"{path} holds no .safetensors file.", hint="Save the model with safetensors."
        )
    tensors: dict[str, torch.Tensor] = {}
    for index, file in enumerate(files):
        progress(index / len(files), f"Reading {file.name}")
        try:
            tensors |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise ModelMismatch(
                f"{file} cannot be read: {error}.", hint="Download the file again."
            ) from error
    return {n: t for n, t in tensors.items() if not n.endswith("rotary_emb.inv_freq")}


def _template(path: Path, settings: dict[str, Any]) -> str:
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template", "")
    return template if isinstance(template, str) else ""


def _token_text(value: Any) -> str:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _end_tokens(
    config: dict[str, Any], generation: dict[str, Any], settings: dict[str, Any], tokenizer: str
) -> tuple[int, ...]:
    """The tokenizer's own end token first: chat templates close a reply with that one."""
    found: list[int] = []
    text = _token_text(settings.get("eos_token"))
    for token in json.loads(tokenizer).get("added_tokens", []):
        if text and token.get("content") == text:
            found.append(int(token["id"]))
    for source in (generation, config):
        value = source.get("eos_token_id")
        found += value if isinstance(value, list) else [value] if isinstance(value, int) else []
    if not found:
        raise ModelMismatch(
            "The model names no end token.", hint="Set eos_token_id in config.json."
        )
    return tuple(dict.fromkeys(found))
