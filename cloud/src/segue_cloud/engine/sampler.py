"""The next token of each row of a batch, by the contract's rule."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from segue_contract.errors import Internal
from segue_contract.sampling import sample
from segue_contract.sync.ops import Sampling

BAD_LOGITS = -1


def sample_rows(
    logits: NDArray[np.float32], samplings: Sequence[Sampling], indexes: Sequence[int]
) -> list[int]:
    """One token id per row of `logits` `[rows, vocab]`; `BAD_LOGITS` where a row is not finite.

    `indexes`: the reply index that each row's token gets. A row's noise depends on that, its seed
    and the token's id alone: a batch draws what each row alone would have drawn.
    """
    best = logits.argmax(axis=1)  # the first of equals, and a NaN wins: one look finds both
    finite = np.isfinite(logits[np.arange(len(best)), best])
    tokens: list[int] = []
    for row, (sampling, index) in enumerate(zip(samplings, indexes, strict=True)):
        if not finite[row]:
            tokens.append(BAD_LOGITS)
        elif sampling.temperature == 0.0:
            tokens.append(int(best[row]))
        else:
            try:
                tokens.append(sample(logits[row], sampling, index))
            except Internal:
                tokens.append(BAD_LOGITS)
    return tokens
