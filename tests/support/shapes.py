"""Sizes of models that tests and benchmarks use without their weights."""

from __future__ import annotations

from segue_contract.model.manifest import ModelGeometry

# Llama-3.1-8B. Its RoPE also rescales low frequencies, which costs the same.
LLAMA_8B = ModelGeometry(
    layers=32,
    hidden=4096,
    heads=32,
    kv_heads=8,
    head_dim=128,
    ffn=14336,
    vocab=128_256,
    context=8192,
    rope_base=500_000.0,
    norm_eps=1e-5,
    tied_embeddings=False,
)
