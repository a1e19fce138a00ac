"""The sizes for which decode steps are captured. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Shape:
    """A decode step of `rows` rows, each with a page table of up to `pages` pages."""

    rows: int
    pages: int


def row_buckets(max_batch: int) -> tuple[int, ...]:
    """1, 2, 4, ... and `max_batch` itself: padding at most doubles the rows of a step."""
    powers = []
    size = 1
    while size < max_batch:
        powers.append(size)
        size *= 2
    return (*powers, max_batch)


def smallest(shapes: Iterable[Shape], rows: int, pages: int) -> Shape | None:
    """The smallest of `shapes` that holds so many rows and pages; None: none does."""
    fitting = [s for s in shapes if s.rows >= rows and s.pages >= pages]
    return min(fitting, default=None)
