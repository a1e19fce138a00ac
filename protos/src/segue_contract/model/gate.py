"""Which KV recipes a model may use: the measured ones against a budget. Pure.

A recipe is named after who computed the KV and the codec it travels in: `edge-k8v8` is the W8A8
prefill graph's KV in int8. Two short names say what is used: `edge`, by CPU nodes, and
`edge-weight-only`, by nodes with a GPU, which run the other graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from segue_contract.kv.layout import BLOCK_TOKENS, KvGeometry, KvRecipe
from segue_contract.kv.steps import codec_named, payload_bytes
from segue_contract.model.manifest import Quality, RecipeEntry

# What is measured, from the safest to the smallest. "-sink4": a prompt's first four tokens stay
# float16; attention leans on them, and their few bytes buy most of what 4 bits lose.
CODECS = ("k8v8", "k8v4-sink4", "k8v4", "k4v4-sink4", "k4v4")
MAX_AGREEMENT_LOSS = 0.03
EDGE, WEIGHT_ONLY, FLOAT = "edge", "edge-weight-only", "edge-fp32"
FLOAT_QUANT = "none"
_ROUNDING = 1e-9  # a loss of exactly the budget is within it
# the graphs that may stand behind the recipe "edge", the fastest first
FALLBACKS = (EDGE, WEIGHT_ONLY, FLOAT)
_SINK_SPREAD = 512  # tokens of a prompt over which the bytes of its sinks are spread: a window's


def codecs_of(graph: str) -> tuple[str, ...]:
    """What is measured of a graph: all steps where KV is made by the edge's own, and otherwise not
    those that lose more than their neighbour with sinks for 2 % fewer bytes."""
    return CODECS if graph == EDGE else tuple(c for c in CODECS if c not in ("k8v4", "k4v4"))


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """The quality of one graph's KV in one codec; `graph` is one of `FALLBACKS`, or one that was
    added to a built model."""

    graph: str
    weight_quant: str
    codec: str
    quality: Quality

    @property
    def name(self) -> str:
        return f"{self.graph}-{self.codec}"

    def within(self, max_loss: float) -> bool:
        return self.quality.agreement >= 1.0 - max_loss - _ROUNDING


@dataclass(frozen=True)
class Choice:
    """`edge`, `weight_only`: what the short names stand for, where anything is in the budget."""

    edge: Measured | None
    weight_only: Measured | None
    max_loss: float

    @property
    def note(self) -> str:
        """What a user must know about it; empty where all is as usual."""
        if self.edge is None:
            return (
                f"No recipe is within the budget of {self.max_loss:.3f}: edges of this model will "
                "send token ids, never KV."
            )
        if self.edge.graph == EDGE:
            return ""
        heavier = "8-bit weights only" if self.edge.graph == WEIGHT_ONLY else "float32"
        return (
            f"Every INT8 recipe of the fast prefill graph loses more than {self.max_loss:.3f} "
            f"agreement: edges prefill with {heavier}, which is slower."
        )


def bytes_per_token(codec: str, geometry: KvGeometry) -> float:
    """On the wire, frames left out, of a prompt of 512 tokens."""
    chosen = codec_named(codec)
    plain = payload_bytes(chosen.step, geometry, geometry.layers)
    sinks = payload_bytes(chosen.step, geometry, geometry.layers, chosen.sink_tokens) - plain
    return plain / BLOCK_TOKENS + sinks / _SINK_SPREAD


def choose(measured: Sequence[Measured], geometry: KvGeometry, max_loss: float) -> Choice:
    """The fastest graph that has a codec within the budget, with its cheapest such codec."""

    best = [
        _cheapest([one for one in measured if one.graph == graph], geometry, max_loss)
        for graph in FALLBACKS
    ]
    return Choice(
        edge=next((one for one in best if one is not None), None),
        weight_only=best[FALLBACKS.index(WEIGHT_ONLY)],
        max_loss=max_loss,
    )


def representative(measured: Sequence[Measured], geometry: KvGeometry, max_loss: float) -> Measured:
    """What one graph's short name stands for: its cheapest codec within the budget; where there is
    none, its best one, which is then refused. `measured` is not empty."""
    return _cheapest(measured, geometry, max_loss) or _best(measured)


def _cheapest(
    measured: Sequence[Measured], geometry: KvGeometry, max_loss: float
) -> Measured | None:
    inside = [one for one in measured if one.within(max_loss)]
    return min(inside, key=lambda one: bytes_per_token(one.codec, geometry), default=None)


def _best(measured: Sequence[Measured]) -> Measured:
    return max(measured, key=lambda one: one.quality.agreement)


def recipe_entry(one: Measured, base: KvRecipe, max_loss: float) -> RecipeEntry:
    """What the manifest says of `one`; `base` says its weights, RoPE and layout."""
    recipe = msgspec.structs.replace(base, weight_quant=one.weight_quant, codec=one.codec)
    return RecipeEntry(recipe=recipe, allowed=one.within(max_loss), quality=one.quality)


def entries(measured: Sequence[Measured], choice: Choice, base: KvRecipe) -> dict[str, RecipeEntry]:
    """The manifest's recipes; `base` says the weights, RoPE and layout of all of them.

    Where nothing is in the budget, the short names stand for the usual graphs, not allowed.
    """

    def entry(one: Measured) -> RecipeEntry:
        return recipe_entry(one, base, choice.max_loss)

    by_name = {one.name: entry(one) for one in measured}

    def best(graphs: Sequence[str]) -> Measured:
        usual = [one for one in measured if one.graph in FALLBACKS]
        return _best([one for one in usual if one.graph in graphs] or usual)

    return {
        "edge": entry(choice.edge or best((EDGE,))),
        "edge-weight-only": entry(choice.weight_only or best((WEIGHT_ONLY,))),
        "exact": RecipeEntry(recipe=msgspec.structs.replace(base, weight_quant=FLOAT_QUANT)),
        **by_name,
    }
