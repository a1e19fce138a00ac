"""The runner over the compiled step: builds its arrays, and samples from its logits."""

from __future__ import annotations

import sys
from collections.abc import Sequence as Seq
from pathlib import Path

import numpy as np
import torch
from llvmlite import binding  # type: ignore[import-untyped]

from segue_cloud.engine.attention import Window
from segue_cloud.engine.first_start import told_if_slow
from segue_cloud.engine.native.emit import LANES
from segue_cloud.engine.native.matrix_units import MatrixUnits, pay_off
from segue_cloud.engine.native.model import NativeModel
from segue_cloud.engine.native.pages import NativePages
from segue_cloud.engine.native.tiles import TILE_ROWS
from segue_cloud.engine.options import EngineOptions, choose_threads
from segue_cloud.engine.page_tables import PageTables
from segue_cloud.engine.rows import logit_rows, rows_of
from segue_cloud.engine.runner import Prepared
from segue_cloud.engine.sampler import sample_rows
from segue_cloud.engine.scheduler import Step, Work
from segue_cloud.engine.sequence import pages_for
from segue_cloud.engine.step_input import NativeInput
from segue_cloud.engine.weights import open_tensors
from segue_contract.kv.layout import KvBlock
from segue_contract.model.manifest import ModelGeometry


def serves(geometry: ModelGeometry) -> bool:
    """Whether this CPU has the instruction that the tiles are made of, and the model's heads are
    whole registers wide."""
    native = bool(binding.get_host_cpu_features().get("avx512bf16", False))
    return native and sys.platform == "linux" and geometry.head_dim % LANES == 0


class NativeRunner:
    """Implements `runner.StepRunner`. One call at a time.

    Raises (from the constructor):
        ModelMissing, ModelMismatch: see `weights.open_tensors`.
    """

    def __init__(
        self, directory: Path, geometry: ModelGeometry, pages: int, options: EngineOptions
    ) -> None:
        self.pages = NativePages(geometry.kv, pages)
        self._tables = PageTables(options.max_batch, pages_for(geometry.context))
        with open_tensors(directory, geometry, torch.bfloat16, "cpu") as tensors:
            wanted = options.matrix_units and pay_off(geometry, self.pages.bits.nbytes)
            units = MatrixUnits(tensors.layers()) if wanted else None
            self._model = NativeModel(
                geometry,
                tensors,
                self.pages,
                Window(options.window, options.sinks),
                choose_threads(options.threads),
                self._tables.array,
                max_rows=max(options.step_tokens, options.mixed_tokens) + options.max_batch,
                units=units,
            )

    def warm_up(self, threads: int) -> None:
        with told_if_slow("compiles its step for this CPU, once"):
            self._model.start()
        torch.set_num_threads(1)  # it only moves blocks from now on: waking threads costs more
        one = np.zeros(1, np.int64)
        self._model.step(NativeInput(one, one, one, np.array([[0, 0, 1, 1]], np.int32), one))

    def prepare(self, step: Step) -> Prepared:
        return Prepared.of(step, self._build(step.works))

    def run(self, prepared: Prepared) -> list[int]:
        assert isinstance(prepared.input, NativeInput)
        logits = self._model.step(prepared.input)
        return sample_rows(logits, prepared.samplings, prepared.indexes)

    def write_block(self, pages: Seq[int], block: KvBlock) -> None:
        self.pages.write_block(pages, block)

    def close(self) -> None:
        self._model.close()

    def _build(self, works: Seq[Work]) -> NativeInput:
        spans: list[tuple[int, int, int, int]] = []
        self._tables.update([work.sequence for work in works])
        rows = rows_of(works)
        for work, first in zip(works, rows.firsts, strict=True):
            table, done = self._tables.index(work.sequence), 0
            while done < work.count:  # to the next multiple of a tile's rows
                start = work.start + done
                count = min(TILE_ROWS - start % TILE_ROWS, work.count - done)
                spans.append((first + done, table, start + 1, count))
                done += count
        return NativeInput(
            rows.tokens,
            rows.positions,
            rows.slots,
            np.array(spans, np.int32).reshape(-1, 4),
            np.array(logit_rows(works, rows.firsts), np.int64),
        )
