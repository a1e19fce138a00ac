"""The page tables of a batch, as the kernels read them."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np

from segue_cloud.engine.sequence import Sequence


class PageTables:
    """Page tables of the running sequences in one array, rewritten only where they changed."""

    def __init__(self, sequences: int, pages: int) -> None:
        self.array = np.zeros((sequences, pages), np.int32)
        self._free = list(range(sequences - 1, -1, -1))
        self._known: dict[Sequence, tuple[int, int]] = {}

    def index(self, sequence: Sequence) -> int:
        return self._known[sequence][0]

    def update(self, sequences: Seq[Sequence]) -> None:
        if len(sequences) > len(self._free):
            self._forget(frozenset(sequences))
        for sequence in sequences:
            index, version = self._known.get(sequence, (-1, -1))
            if version != sequence.table_version:
                index = self._free.pop() if index < 0 else index
                # A hole is never read; page 0 keeps whoever prefetches inside the memory.
                self.array[index, : len(sequence.pages)] = np.maximum(sequence.pages, 0)
                self._known[sequence] = (index, sequence.table_version)

    def _forget(self, keep: frozenset[Sequence]) -> None:
        for sequence in [s for s in self._known if s not in keep]:
            self._free.append(self._known.pop(sequence)[0])
