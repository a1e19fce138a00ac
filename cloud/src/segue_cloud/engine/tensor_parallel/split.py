"""Which part of a model each rank computes. Pure.

Attention is cut between groups of query heads that share a KV head, the feed-forward between its
columns, the head between the vocabulary's rows. Norms and the token embedding are whole everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from segue_contract.errors import InvalidArgument
from segue_contract.model.manifest import ModelGeometry

# Matrix units like widths in multiples of these; the widest that leaves every rank enough counts.
_UNITS = (64, 32, 16, 8, 4, 2, 1)
# With this many units a rank, no rank has over a quarter more than another.
_UNITS_PER_RANK = 4


@dataclass(frozen=True)
class Span:
    """The half-open range [start, end) of rows or columns."""

    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start

    @property
    def cut(self) -> slice:
        return slice(self.start, self.end)

    def times(self, factor: int) -> Span:
        return Span(self.start * factor, self.end * factor)


@dataclass(frozen=True)
class Shard:
    """One rank's part: of the KV heads, the feed-forward's columns and the vocabulary."""

    rank: int
    ranks: int
    kv_heads: Span
    ffn: Span
    vocab: Span

    def geometry(self, whole: ModelGeometry) -> ModelGeometry:
        """The sizes that this rank computes with; the vocabulary stays that of the embedding."""
        return msgspec.structs.replace(
            whole,
            heads=self.kv_heads.size * (whole.heads // whole.kv_heads),
            kv_heads=self.kv_heads.size,
            ffn=self.ffn.size,
        )


def split(geometry: ModelGeometry, ranks: int) -> tuple[Shard, ...]:
    """One shard per rank; what does not divide evenly goes to the last ranks.

    The first rank also plans, samples and talks, so it is the last to get more.

    Raises:
        InvalidArgument: there are fewer KV heads than ranks.
    """
    if ranks > geometry.kv_heads:
        most = geometry.kv_heads
        raise InvalidArgument(
            f"{ranks} ranks cannot share this model's {most} KV heads: each needs at least one.",
            hint=f"Choose --tensor-parallel from 1 to {most}.",
            most=most,
        )
    heads = spans(geometry.kv_heads, ranks, 1)
    ffn = spans(geometry.ffn, ranks, unit_of(geometry.ffn, ranks))
    vocab = spans(geometry.vocab, ranks, unit_of(geometry.vocab, ranks))
    return tuple(Shard(rank, ranks, heads[rank], ffn[rank], vocab[rank]) for rank in range(ranks))


def unit_of(width: int, ranks: int) -> int:
    """The unit in which a width is dealt out: see `_UNITS`."""
    fitting = [unit for unit in _UNITS if width % unit == 0]
    even = [unit for unit in fitting if width % (unit * ranks) == 0]
    fair = [unit for unit in fitting if width // unit >= _UNITS_PER_RANK * ranks]
    return (even or fair or [1])[0]


def spans(total: int, ranks: int, unit: int) -> list[Span]:
    """`total` dealt out in units, in order; the last ranks get one unit more where it must be."""
    units, rest = divmod(total // unit, ranks)
    result: list[Span] = []
    start = 0
    for rank in range(ranks):
        end = start + (units + (rank >= ranks - rest)) * unit
        result.append(Span(start, end))
        start = end
    return result
