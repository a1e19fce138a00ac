"""Prompts that share no prefix, so that no cache helps."""

from __future__ import annotations

import random


def random_prompts(count: int, tokens: int, vocab: int, seed: int = 5) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    return [tuple(rng.randrange(vocab) for _ in range(tokens)) for _ in range(count)]
