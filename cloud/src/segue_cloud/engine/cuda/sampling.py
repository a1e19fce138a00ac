"""Tokens from logits that lie on a device: only what must be on the host goes there."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from segue_cloud.engine.sampler import BAD_LOGITS, sample_rows
from segue_contract.sync.ops import Sampling


def pick(logits: torch.Tensor) -> torch.Tensor:
    """The greedy token of each row, int64 `[rows]`: the first of equals, as on the host.
    `BAD_LOGITS` where a row's best is not finite; a NaN anywhere in a row is its best.
    """
    best = logits.amax(dim=1, keepdim=True)
    vocab = logits.shape[1]
    # Fills, not `where` with a number: that one copies the number to the device, which a capture
    # does not allow.
    ids = torch.arange(vocab, device=logits.device, dtype=torch.int32).expand(logits.shape)
    first = ids.masked_fill(logits != best, vocab).amin(dim=1).long()
    return first.masked_fill(~torch.isfinite(best[:, 0]), BAD_LOGITS)


def choose_tokens(
    logits: torch.Tensor,
    greedy: torch.Tensor,
    samplings: Sequence[Sampling],
    indexes: Sequence[int],
) -> list[int]:
    """One token per row by the contract's rule, as `sample_rows`; `greedy`: what `pick` found.

    Logits of greedy rows stay where they are: at 128,000 words and 128 rows they are 66 MB a step.
    """
    tokens: list[int] = greedy.tolist()
    drawn = [row for row, rule in enumerate(samplings) if rule.temperature != 0.0]
    if drawn:
        chosen = logits[torch.tensor(drawn, device=logits.device)].cpu().numpy()
        rules, places = [samplings[r] for r in drawn], [indexes[r] for r in drawn]
        for row, token in zip(drawn, sample_rows(chosen, rules, places), strict=True):
            tokens[row] = token
    return tokens
