"""A model as read from its source: sizes, weights under Hugging Face's Llama names, tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from segue_contract.errors import ModelMismatch
from segue_contract.model.manifest import ModelGeometry

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"


@dataclass(frozen=True)
class Checkpoint:
    """What a source holds. `tokenizer` is the JSON of Hugging Face's tokenizers format."""

    source: str
    licence: str
    geometry: ModelGeometry
    tensors: Mapping[str, torch.Tensor]
    tokenizer: str
    chat_template: str
    end_tokens: tuple[int, ...]
    bos_token: str
    eos_token: str


def expected_shapes(g: ModelGeometry) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all weights of a Llama-family model without biases."""
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (g.vocab, g.hidden),
        FINAL_NORM: (g.hidden,),
    }
    if not g.tied_embeddings:
        shapes[HEAD] = (g.vocab, g.hidden)
    for layer in range(g.layers):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (g.hidden,),
            f"{prefix}.post_attention_layernorm.weight": (g.hidden,),
            f"{prefix}.self_attn.q_proj.weight": (g.heads * g.head_dim, g.hidden),
            f"{prefix}.self_attn.k_proj.weight": (g.kv_heads * g.head_dim, g.hidden),
            f"{prefix}.self_attn.v_proj.weight": (g.kv_heads * g.head_dim, g.hidden),
            f"{prefix}.self_attn.o_proj.weight": (g.hidden, g.heads * g.head_dim),
            f"{prefix}.mlp.gate_proj.weight": (g.ffn, g.hidden),
            f"{prefix}.mlp.up_proj.weight": (g.ffn, g.hidden),
            f"{prefix}.mlp.down_proj.weight": (g.hidden, g.ffn),
        }
    return shapes


def check_tensors(checkpoint: Checkpoint) -> None:
    """Every weight is there, of its shape, and finite; nothing is there that would be ignored.

    Raises:
        ModelMismatch: naming the first tensor that is missing, unknown or of another shape.
    """
    expected = expected_shapes(checkpoint.geometry)
    missing = sorted(set(expected) - set(checkpoint.tensors))
    if missing:
        raise ModelMismatch(
            f"{checkpoint.source} lacks {len(missing)} tensors, the first is {missing[0]}.",
            hint="The file is incomplete: download it again.",
            missing=len(missing),
        )
    unknown = sorted(set(checkpoint.tensors) - set(expected))
    if unknown:
        raise ModelMismatch(
            f"{checkpoint.source} has tensors that a Llama model has not, such as {unknown[0]}.",
            hint="Only plain Llama-family models can be built.",
        )
    for name, shape in expected.items():
        tensor = checkpoint.tensors[name]
        if tuple(tensor.shape) != shape:
            raise ModelMismatch(
                f"{name} of {checkpoint.source} has the shape {tuple(tensor.shape)} and not "
                f"{shape}.",
                hint="The configuration does not fit the weights.",
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ModelMismatch(
                f"{name} of {checkpoint.source} holds values that are not finite.",
                hint="The file is damaged: download it again.",
            )


def lossless_dtype(tensors: Mapping[str, torch.Tensor]) -> torch.dtype:
    """The smallest of bfloat16, float16 and float32 that holds every weight exactly.

    A dequantised 4-bit model needs float32: scale times integer plus offset does not fit 16 bits.
    """
    candidates = [torch.bfloat16, torch.float16]
    for tensor in tensors.values():
        candidates = [d for d in candidates if torch.equal(tensor.to(d).to(tensor.dtype), tensor)]
        if not candidates:
            return torch.float32
    return candidates[0]
