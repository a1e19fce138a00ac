"""Reads a GGUF file of the Llama family: weights dequantised to float32, tokenizer rebuilt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from segue_cloud.engine.sources.checkpoint import EMBEDDING, FINAL_NORM, HEAD, Checkpoint
from segue_contract.errors import ModelError, ModelMismatch
from segue_contract.model.manifest import ModelGeometry
from segue_contract.model.progress import Progress

_TOP = {"token_embd": EMBEDDING, "output_norm": FINAL_NORM, "output": HEAD}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# llama.cpp's names of pre-tokenizers (src/llama-vocab.cpp) and what they do in tokenizers' terms.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_BYTES = {**_GPT2, "use_regex": False}
_PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_GPT2],
    "smollm": [{"type": "Digits", "individual_digits": True}, _GPT2],
    "llama-bpe": [
        {
            "type": "Split",
            "pattern": {"Regex": _LLAMA3_SPLIT},
            "behavior": "Isolated",
            "invert": False,
        },
        _BYTES,
    ],
}
_SPECIAL, _USER_DEFINED = 3, 4  # gguf.TokenType


def read_gguf(path: Path, progress: Progress) -> Checkpoint:
    """Read the file at `path`.

    Raises:
        ModelMismatch: no GGUF, damaged, or with tensors that are no Llama's.
        ModelError: another family, or a tokenizer that is not supported.
    """
    progress(0.0, f"Reading {path.name}")
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise ModelMismatch(
            f"{path} cannot be read as GGUF: {error}.", hint="Download the file again."
        ) from error
    meta = _Metadata(path, reader)
    geometry = _geometry(meta, reader)
    tensors: dict[str, torch.Tensor] = {}
    for index, item in enumerate(reader.tensors):
        progress(index / len(reader.tensors), f"Dequantising {item.name}")
        name = _name(item.name, path)
        tensors[name] = torch.from_numpy(_weights(item, name, geometry))
    eos = int(meta.get("tokenizer.ggml.eos_token_id"))
    texts: list[str] = meta.get("tokenizer.ggml.tokens")
    bos = int(meta.get("tokenizer.ggml.bos_token_id", eos))
    also = {"<|endoftext|>", "<|eot_id|>", "<|end_of_text|>"}
    kinds = meta.get("tokenizer.ggml.token_type")
    others = [i for i, text in enumerate(texts) if text in also and kinds[i] == _SPECIAL]
    return Checkpoint(
        source=path.name,
        licence=str(meta.get("general.license", "")),
        geometry=geometry,
        tensors=tensors,
        tokenizer=_tokenizer(meta, texts, kinds),
        chat_template=str(meta.get("tokenizer.chat_template", "")),
        end_tokens=(eos, *(i for i in others if i != eos)),
        bos_token=texts[bos],
        eos_token=texts[eos],
    )


class _Metadata:
    """Typed access to the file's key-value pairs; a missing one names itself."""

    def __init__(self, path: Path, reader: Any) -> None:
        self._path = path
        self._reader = reader

    def get(self, key: str, default: Any = None) -> Any:
        field = self._reader.get_field(key)
        if field is None:
            if default is None:
                raise ModelMismatch(
                    f"{self._path} lacks the entry {key}.", hint="Use a complete GGUF file."
                )
            return default
        return field.contents()


def _geometry(meta: _Metadata, reader: Any) -> ModelGeometry:
    family = meta.get("general.architecture")
    if family != "llama":
        raise ModelError(
            f"This model is of the family {family!r}; only 'llama' can be built.",
            hint="Use a Llama-family model, such as SmolLM2.",
            family=str(family),
        )
    scaling = meta.get("llama.rope.scaling.type", "none")
    if scaling != "none" or any(t.name.startswith("rope_freqs") for t in reader.tensors):
        raise ModelError(
            f"This model scales its RoPE ({scaling}), which is not supported.",
            hint="Use a model with plain RoPE.",
        )
    heads = int(meta.get("llama.attention.head_count"))
    hidden = int(meta.get("llama.embedding_length"))
    return ModelGeometry(
        layers=int(meta.get("llama.block_count")),
        hidden=hidden,
        heads=heads,
        kv_heads=int(meta.get("llama.attention.head_count_kv", heads)),
        head_dim=int(meta.get("llama.attention.key_length", hidden // heads)),
        ffn=int(meta.get("llama.feed_forward_length")),
        vocab=len(meta.get("tokenizer.ggml.tokens")),
        context=int(meta.get("llama.context_length")),
        rope_base=float(meta.get("llama.rope.freq_base", 10000.0)),
        norm_eps=float(meta.get("llama.attention.layer_norm_rms_epsilon")),
        tied_embeddings=not any(t.name == "output.weight" for t in reader.tensors),
    )


def _name(gguf_name: str, path: Path) -> str:
    stem, _, kind = gguf_name.rpartition(".")
    if kind == "weight" and stem in _TOP:
        return _TOP[stem]
    parts = stem.split(".")
    if kind == "weight" and len(parts) == 3 and parts[0] == "blk" and parts[2] in _LAYER:
        return f"model.layers.{int(parts[1])}.{_LAYER[parts[2]]}.weight"
    raise ModelMismatch(
        f"{path} holds the tensor {gguf_name}, which a plain Llama model has not.",
        hint="Only plain Llama-family models can be built.",
    )


def _weights(item: Any, name: str, geometry: ModelGeometry) -> NDArray[np.float32]:
    values = np.array(gguf.dequantize(item.data, item.tensor_type), dtype=np.float32)
    # llama.cpp stores Q and K with the two halves of each head interleaved (its converter's
    # `permute`); Hugging Face's rotary embedding wants the halves one after the other.
    if name.endswith("q_proj.weight"):
        return _split_halves(values, geometry.heads)
    if name.endswith("k_proj.weight"):
        return _split_halves(values, geometry.kv_heads)
    return values


def _split_halves(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    rows, columns = values.shape
    pairs = values.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, columns))


def _tokenizer(meta: _Metadata, texts: list[str], kinds: list[int]) -> str:
    """Byte-level BPE in tokenizers' JSON form.

    Written by hand, since generic converters drop the pre-tokenizer's digit rule.
    """
    model, pre = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre", "gpt-2")
    if model != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise ModelError(
            f"The tokenizer {model}/{pre} is not supported.",
            hint="Build from the model's Hugging Face folder, which has a tokenizer.json.",
        )
    if meta.get("tokenizer.ggml.add_bos_token", False):
        raise ModelError(
            "This model's tokenizer adds a beginning token by itself, which is not supported.",
            hint="Build from the model's Hugging Face folder.",
        )
    merges = [merge.split(" ", 1) for merge in meta.get("tokenizer.ggml.merges")]
    added = [
        {
            "id": index,
            "content": texts[index],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == _SPECIAL,
        }
        for index, kind in enumerate(kinds)
        if kind in (_SPECIAL, _USER_DEFINED)
    ]
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": _PRE_TOKENIZERS[pre]},
            "post_processor": None,
            "decoder": {**_GPT2, "add_prefix_space": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": "",
                "end_of_word_suffix": "",
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": pre == "llama-bpe",
                "vocab": {text: index for index, text in enumerate(texts)},
                "merges": merges,
            },
        },
        ensure_ascii=False,
    )
