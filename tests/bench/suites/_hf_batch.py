"""The peer of the gpu suite: Hugging Face `generate` on one batch, with random weights."""

from __future__ import annotations

import time
from typing import Any

import torch

from segue_contract.model.manifest import ModelGeometry
from tests.bench.suites._prompts import random_prompts


def hf_model(geometry: ModelGeometry, device: str) -> Any:
    """`LlamaForCausalLM` of this shape in bfloat16, with torch's fused attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    g = geometry
    config = LlamaConfig(
        vocab_size=g.vocab,
        hidden_size=g.hidden,
        intermediate_size=g.ffn,
        num_hidden_layers=g.layers,
        num_attention_heads=g.heads,
        num_key_value_heads=g.kv_heads,
        head_dim=g.head_dim,
        max_position_embeddings=g.context,
        rms_norm_eps=g.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": g.rope_base},
        tie_word_embeddings=g.tied_embeddings,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        attn_implementation="sdpa",
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model: Any = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval()


def hf_decode(model: Any, vocab: int, device: str, batch: int, prompt: int, new: int) -> float:
    """Tokens per second of `batch` replies after their first tokens: two calls, one of them for
    the first tokens alone, and their difference."""
    ids = torch.tensor(random_prompts(batch, prompt, vocab, seed=batch + 70_000), device=device)
    mask = torch.ones_like(ids)

    def seconds(tokens: int) -> float:
        began = time.perf_counter()
        out = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens
        )
        assert out.shape == (batch, prompt + tokens)
        out.cpu()
        return time.perf_counter() - began

    with torch.inference_mode():
        seconds(2)  # warm-up
        first, all_of_them = seconds(1), seconds(new + 1)
    return batch * new / max(all_of_them - first, 1e-9)
