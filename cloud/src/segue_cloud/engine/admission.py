"""What the engine refuses before it queues anything. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Set

import numpy as np

from segue_cloud.engine.port import EngineTurn
from segue_contract.errors import (
    BadBlock,
    BadRecipe,
    EmptyPrompt,
    InvalidArgument,
    PromptTooLong,
)
from segue_contract.kv.layout import BLOCK_TOKENS, KvBlock, KvGeometry
from segue_contract.model.manifest import ModelGeometry


def check_turn(
    turn: EngineTurn,
    geometry: ModelGeometry,
    pages_total: int,
    peak_pages: Callable[[int], int],
) -> None:
    """Raises EmptyPrompt, InvalidArgument (a token id of no vocabulary) or PromptTooLong.

    Args:
        peak_pages: most pages that a turn of so many tokens holds at once.
    """
    if not turn.prompt:
        raise EmptyPrompt("The prompt has no tokens.")
    vocab = geometry.vocab
    # The kernels trust token ids: one outside the table would read foreign memory.
    if not all(0 <= token < vocab for token in itertools.chain(turn.prompt, turn.made)):
        raise InvalidArgument(
            f"A token id is outside the model's vocabulary of {vocab}.",
            hint="Edge and cloud must serve the same model.",
        )
    total = len(turn.prompt) + max(turn.max_tokens, len(turn.made))
    if total > geometry.context:
        raise PromptTooLong(
            f"{len(turn.prompt)} prompt tokens and {turn.max_tokens} new ones exceed the"
            f" model's context of {geometry.context} tokens.",
            hint="Shorten the conversation or ask for fewer tokens.",
            context=geometry.context,
        )
    if peak_pages(total) > pages_total:
        raise PromptTooLong(
            f"A turn of {total} tokens does not fit this engine's KV pool.",
            hint="Shorten it, or start the cloud with a larger --pool-mb.",
        )


def check_block(block: KvBlock, kv: KvGeometry, recipes: Set[str]) -> None:
    """Raises BadRecipe (none of `recipes`) or BadBlock (another geometry, or not finite)."""
    if block.recipe not in recipes:
        raise BadRecipe(
            "A KV block was made in a way that this model's manifest does not allow.",
            hint="Build the same model on both sides (`segue model verify`).",
            recipe=block.recipe,
        )
    shape = (kv.layers, kv.kv_heads, BLOCK_TOKENS, kv.head_dim)
    for values in (block.k, block.v):
        if values.shape != shape or values.dtype not in (np.float16, np.float32, np.uint16):
            raise BadBlock(
                f"A KV block has shape {list(values.shape)} of {values.dtype}; this model's"
                f" blocks have {list(shape)}.",
                hint="Edge and cloud must serve the same model.",
            )
        # What attends to a NaN becomes NaN, in every turn that uses the block.
        if values.dtype != np.uint16 and not np.isfinite(values).all():
            raise BadBlock("A KV block holds numbers that are not finite.")
