"""Sources of a random Llama that builds in seconds: a Hugging Face folder, and the same as GGUF."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

from segue_cloud.engine.sources.checkpoint import expected_shapes
from segue_contract.chat.detokenizer import byte_alphabet
from segue_contract.model.manifest import ModelGeometry

GEOMETRY = ModelGeometry(
    layers=2,
    hidden=64,
    heads=4,
    kv_heads=2,
    head_dim=16,
    ffn=128,
    vocab=260,
    context=512,
    rope_base=10000.0,
    norm_eps=1e-5,
)
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
TOKENS = [*byte_alphabet(), "<|im_start|>", "<|im_end|>", "ab", "bc"]
IM_START, IM_END = 256, 257
_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def random_tensors(seed: int = 3) -> dict[str, torch.Tensor]:
    """Weights wide enough that logits are far from uniform; norms near one."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in expected_shapes(GEOMETRY).items():
        values = torch.randn(*shape, generator=generator)
        is_norm = len(shape) == 1
        tensors[name] = 1.0 + 0.1 * values if is_norm else values * 1.5 / shape[-1] ** 0.5
    return tensors


def hf_config(**changes: Any) -> dict[str, Any]:
    g = GEOMETRY
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": g.hidden,
        "intermediate_size": g.ffn,
        "num_hidden_layers": g.layers,
        "num_attention_heads": g.heads,
        "num_key_value_heads": g.kv_heads,
        "head_dim": g.head_dim,
        "vocab_size": g.vocab,
        "max_position_embeddings": g.context,
        "rope_theta": g.rope_base,
        "rms_norm_eps": g.norm_eps,
        "tie_word_embeddings": True,
        "eos_token_id": IM_END,
    } | changes


def write_hf_folder(folder: Path, **config: Any) -> Path:
    """A folder as `save_pretrained` writes it; `config` changes entries of config.json."""
    folder.mkdir(parents=True)
    save_file(random_tensors(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(hf_config(**config)))
    added = [
        {
            "id": index,
            "content": TOKENS[index],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for index in (IM_START, IM_END)
    ]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {text: index for index, text in enumerate(TOKENS)},
        "merges": [["a", "b"], ["b", "c"]],
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": _LEVEL,
        "post_processor": None,
        "decoder": _LEVEL,
        "model": model,
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    drop: str = "",
    scaling: str = "",
    pre: str = "gpt-2",
) -> Path:
    """The same model as llama.cpp's converter writes it, in float32.

    `drop`: a tensor to leave out; `scaling`: a RoPE scaling type; `pre`: the pre-tokenizer's name.
    """
    g = GEOMETRY
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(g.context)
    writer.add_embedding_length(g.hidden)
    writer.add_block_count(g.layers)
    writer.add_feed_forward_length(g.ffn)
    writer.add_head_count(g.heads)
    writer.add_head_count_kv(g.kv_heads)
    writer.add_layer_norm_rms_eps(g.norm_eps)
    writer.add_rope_freq_base(g.rope_base)
    if scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    kinds = [gguf.TokenType.NORMAL] * len(TOKENS)
    kinds[IM_START] = kinds[IM_END] = gguf.TokenType.CONTROL
    writer.add_token_types(kinds)
    writer.add_token_merges(["a b", "b c"])
    writer.add_eos_token_id(IM_END)
    writer.add_bos_token_id(IM_START)
    writer.add_chat_template(TEMPLATE)
    for name, tensor in random_tensors().items():
        gguf_name = _gguf_name(name)
        if gguf_name != drop:
            writer.add_tensor(gguf_name, _interleave(name, tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_name(name: str) -> str:
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    layer = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    stem = name.removesuffix(".weight")
    if stem in top:
        return f"{top[stem]}.weight"
    _, _, number, rest = stem.split(".", 3)
    return f"blk.{number}.{layer[rest]}.weight"


def _interleave(name: str, values: np.ndarray) -> np.ndarray:
    """llama.cpp's `permute` of Q and K rows."""
    heads = {"q_proj": GEOMETRY.heads, "k_proj": GEOMETRY.kv_heads}
    for part, count in heads.items():
        if part in name:
            rows, columns = values.shape
            halves = values.reshape(count, 2, rows // count // 2, columns)
            return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))
    return values
