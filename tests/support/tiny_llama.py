"""A Llama small enough for fast tests: random weights in the layout of a built model directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from segue_contract.kv.layout import BLOCK_TOKENS, KvBlock, KvRecipe, block_ids
from segue_contract.model.manifest import (
    Manifest,
    ModelGeometry,
    RecipeEntry,
    hash_file,
    write_manifest,
)

WEIGHTS = Path("cloud") / "model.safetensors"

TINY = ModelGeometry(
    layers=2,
    hidden=64,
    heads=4,
    kv_heads=2,
    head_dim=16,
    ffn=128,
    vocab=512,
    context=1024,
    rope_base=10000.0,
    norm_eps=1e-5,
)


def build_tiny_llama(
    directory: Path, *, seed: int = 11, geometry: ModelGeometry = TINY
) -> Manifest:
    """Write weights and manifest of a random model; only what the cloud's engine reads."""
    g = geometry
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        # Wide enough that attention and logits are far from uniform: no two tokens tie.
        return torch.randn(*shape, generator=generator) * 2.0 / shape[-1] ** 0.5

    def norm() -> torch.Tensor:
        return 1.0 + 0.1 * torch.randn(g.hidden, generator=generator)

    tensors = {"model.embed_tokens.weight": random(g.vocab, g.hidden), "model.norm.weight": norm()}
    q, kv = g.heads * g.head_dim, g.kv_heads * g.head_dim
    for index in range(g.layers):
        at = f"model.layers.{index}."
        tensors |= {
            at + "input_layernorm.weight": norm(),
            at + "post_attention_layernorm.weight": norm(),
            at + "self_attn.q_proj.weight": random(q, g.hidden),
            at + "self_attn.k_proj.weight": random(kv, g.hidden),
            at + "self_attn.v_proj.weight": random(kv, g.hidden),
            at + "self_attn.o_proj.weight": random(g.hidden, q),
            at + "mlp.gate_proj.weight": random(g.ffn, g.hidden),
            at + "mlp.up_proj.weight": random(g.ffn, g.hidden),
            at + "mlp.down_proj.weight": random(g.hidden, g.ffn),
        }
    if not g.tied_embeddings:
        tensors["lm_head.weight"] = random(g.vocab, g.hidden)
    (directory / WEIGHTS.parent).mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / WEIGHTS)
    entry = hash_file(directory / WEIGHTS)
    recipe = KvRecipe(
        weights_digest=entry.sha256[:32], weight_quant="fp32", rope=f"{g.rope_base:g}"
    )
    manifest = Manifest(
        name="tiny",
        source="random",
        weights_digest=entry.sha256[:32],
        geometry=g,
        end_tokens=(0,),
        edge_quant="fp32",
        recipes={"edge": RecipeEntry(recipe=recipe)},
        files={str(WEIGHTS): entry},
    )
    write_manifest(directory, manifest)
    return manifest


class HfReference:
    """The same weights in Hugging Face's Llama, float32: what the engine must reproduce."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        g = manifest.geometry
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
            pad_token_id=None,
        )
        model = LlamaForCausalLM(config)
        tensors = {name: t.float() for name, t in load_file(directory / WEIGHTS).items()}
        missing, unexpected = model.load_state_dict(tensors, strict=False)
        assert set(missing) <= {"lm_head.weight"}, missing
        assert not unexpected, unexpected
        model.tie_weights()
        self.model: Any = model.eval()
        self.manifest = manifest

    @torch.inference_mode()
    def greedy(self, prompt: Sequence[int], count: int, ends: frozenset[int]) -> list[int]:
        """Up to `count` greedy tokens, without the end token."""
        tokens: list[int] = []
        past: Any = None
        ids = torch.tensor([list(prompt)])
        while len(tokens) < count:
            out = self.model(ids, past_key_values=past, use_cache=True)
            past = out.past_key_values
            token = int(out.logits[0, -1].argmax())
            if token in ends:
                break
            tokens.append(token)
            ids = torch.tensor([[token]])
        return tokens

    @torch.inference_mode()
    def confirms(
        self, prompt: Sequence[int], reply: Sequence[int], count: int, ends: frozenset[int]
    ) -> bool:
        """Whether `greedy` would return `reply`: one pass instead of one per token.

        Each token must be the largest logit's after those before it, and the reply must stop
        where it has `count` tokens or where an end token has the largest logit.
        """
        logits = self.model(torch.tensor([[*prompt, *reply]]), use_cache=False).logits[0]
        best = logits[len(prompt) - 1 :].argmax(dim=1).tolist()
        complete = len(reply) == count or (len(reply) < count and best[len(reply)] in ends)
        return complete and best[: len(reply)] == list(reply) and not ends & set(reply)

    @torch.inference_mode()
    def blocks(self, tokens: Sequence[int], recipe: KvRecipe) -> list[KvBlock]:
        """KV of all full 64-token blocks of `tokens`, float32, as an edge would ship them."""
        if len(tokens) < BLOCK_TOKENS:
            return []
        out = self.model(torch.tensor([list(tokens)]), use_cache=True)
        keys = np.stack([layer.keys[0].numpy() for layer in out.past_key_values.layers])
        values = np.stack([layer.values[0].numpy() for layer in out.past_key_values.layers])
        blocks = []
        for index, name in enumerate(block_ids(recipe.digest, tokens)):
            cut = slice(index * BLOCK_TOKENS, (index + 1) * BLOCK_TOKENS)
            blocks.append(
                KvBlock(name, recipe.digest, keys[:, :, cut].copy(), values[:, :, cut].copy())
            )
        return blocks
