"""A Llama of any shape with random weights, made where it is used: no file, no download."""

from __future__ import annotations

from pathlib import Path

import torch

from segue_cloud.engine.weights import Layer, Weights, make_linear
from segue_contract.kv.layout import KvRecipe
from segue_contract.model.manifest import Manifest, ModelGeometry, RecipeEntry


def random_weights(
    directory: Path, geometry: ModelGeometry, dtype: torch.dtype, device: str
) -> Weights:
    """As `load_weights`, from a generator with seed 1; nothing is read from `directory`.

    Scaled so that activations keep their size from layer to layer.
    """
    g = geometry
    generator = torch.Generator(device).manual_seed(1)

    def table(rows: int, columns: int) -> torch.Tensor:
        made = torch.empty(rows, columns, dtype=dtype, device=device)
        return made.normal_(0.0, columns**-0.5, generator=generator)

    def norm() -> torch.Tensor:
        return torch.ones(g.hidden, dtype=torch.float32, device=device)

    def layer() -> Layer:
        q, kv = g.heads * g.head_dim, g.kv_heads * g.head_dim
        return Layer(
            input_norm=norm(),
            qkv=make_linear(table(q + 2 * kv, g.hidden)),
            out=make_linear(table(g.hidden, q)),
            ffn_norm=norm(),
            gate_up=make_linear(table(2 * g.ffn, g.hidden)),
            down=make_linear(table(g.hidden, g.ffn)),
        )

    embed = table(g.vocab, g.hidden)
    return Weights(
        embed=embed,
        layers=tuple(layer() for _ in range(g.layers)),
        final_norm=norm(),
        head=embed if g.tied_embeddings else table(g.vocab, g.hidden),
    )


def random_manifest(geometry: ModelGeometry) -> Manifest:
    """What the engine must know of such a model."""
    recipe = KvRecipe(weights_digest="0" * 32, weight_quant="bf16", rope=f"{geometry.rope_base:g}")
    return Manifest(
        name="random",
        source="random",
        weights_digest="0" * 32,
        geometry=geometry,
        end_tokens=(0,),
        edge_quant="none",
        recipes={"edge": RecipeEntry(recipe=recipe)},
        files={},
    )
