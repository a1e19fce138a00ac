"""The built model's cloud half as a GGUF file for llama.cpp: same weights, chosen number format.

Without a vocabulary: the peers are given token ids.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from safetensors.torch import load_file

from segue_contract.model.manifest import read_manifest

_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
FORMATS = {"bf16": gguf.GGMLQuantizationType.BF16, "fp32": gguf.GGMLQuantizationType.F32}


def write_gguf(directory: Path, file: Path, dtype: str) -> None:
    """Write `file` from the built model in `directory`; matrices in `dtype`, norms in float32."""
    g = read_manifest(directory).geometry
    out = gguf.GGUFWriter(file, "llama")
    out.add_block_count(g.layers)
    out.add_context_length(g.context)
    out.add_embedding_length(g.hidden)
    out.add_feed_forward_length(g.ffn)
    out.add_head_count(g.heads)
    out.add_head_count_kv(g.kv_heads)
    out.add_rope_dimension_count(g.head_dim)
    out.add_rope_freq_base(g.rope_base)
    out.add_layer_norm_rms_eps(g.norm_eps)
    out.add_vocab_size(g.vocab)
    out.add_tokenizer_model("no_vocab")
    for name, tensor in load_file(directory / "cloud" / "model.safetensors").items():
        values = tensor.float().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            values = interleave(values, g.head_dim)
        kind = FORMATS[dtype] if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        out.add_tensor(gguf_name(name), gguf.quantize(values, kind), raw_dtype=kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def gguf_name(name: str) -> str:
    """llama.cpp's name of a Hugging Face Llama tensor."""
    stem, _, kind = name.rpartition(".")
    if stem in _OUTSIDE:
        return f"{_OUTSIDE[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{_BLOCK[part]}.{kind}"


def interleave(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of a q or k projection in llama.cpp's order: RoPE pairs next to each other.

    Hugging Face rotates dimension i with i + head_dim / 2.
    """
    halves = weight.reshape(-1, 2, head_dim // 2, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)
