"""One step's effect: a plan of the scheduler in, sampled tokens out."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
import structlog
import torch

from segue_cloud.engine.attention import CompiledOps, StepOps, TorchOps, Window, chunk_mask
from segue_cloud.engine.first_start import told_if_slow
from segue_cloud.engine.kv_pages import BlockPages, KvPages, slots_of
from segue_cloud.engine.model import LlamaModel
from segue_cloud.engine.options import EngineOptions, choose_dtype
from segue_cloud.engine.page_tables import PageTables
from segue_cloud.engine.rows import logit_rows, rows_of
from segue_cloud.engine.sampler import sample_rows
from segue_cloud.engine.scheduler import Step, Work
from segue_cloud.engine.sequence import pages_for
from segue_cloud.engine.step_input import NativeInput, Segment, StepInput
from segue_cloud.engine.weights import Weights, load_weights
from segue_contract.kv.layout import KvBlock
from segue_contract.limits import KV_PAGE_TOKENS
from segue_contract.model.manifest import ModelGeometry
from segue_contract.sync.ops import Sampling

log = structlog.get_logger(__name__)

# Chunks up to this size attend row by row through the page table: cheaper than a gather.
_ROW_CHUNK = 16
_WARM_UP_TOKENS = 128

LoadWeights: TypeAlias = Callable[[Path, ModelGeometry, torch.dtype, str], Weights]


@dataclass(frozen=True)
class Prepared:
    """A step as arrays: nothing in it changes any more when turns go on, end or move."""

    input: StepInput | NativeInput
    samplings: tuple[Sampling, ...]
    indexes: tuple[int, ...]

    @staticmethod
    def of(step: Step, made: StepInput | NativeInput) -> Prepared:
        sampling = [work.sequence for work in step.sampling]
        return Prepared(
            made,
            tuple(sequence.turn.sampling for sequence in sampling),
            tuple(sequence.reply_index for sequence in sampling),
        )


class StepRunner(Protocol):
    """What the engine needs of whatever computes its steps. One call at a time."""

    @property
    def pages(self) -> BlockPages:
        """The memory that blocks are written to and read from."""
        ...

    def warm_up(self, threads: int) -> None:
        """Compile, load and touch what the first step would otherwise wait for.

        Only before the first turn: it overwrites some pages.
        """
        ...

    def prepare(self, step: Step) -> Prepared:
        """Copy out of the turns what `run` needs."""
        ...

    def run(self, prepared: Prepared) -> list[int]:
        """Compute a step; one token per work that samples, in order (negative: bad logits)."""
        ...

    def write_block(self, pages: Seq[int], block: KvBlock) -> None:
        """Put a shipped block into four pages."""
        ...

    def close(self) -> None:
        """End what computes besides the caller's thread; no step may follow."""
        ...


class Runner:
    """Weights, pages and kernels. Used by one thread only, the one that built it.

    Raises (from the constructor):
        ModelMissing, ModelMismatch: see `load_weights`.
    """

    def __init__(
        self,
        directory: Path,
        geometry: ModelGeometry,
        pages: int,
        options: EngineOptions,
        load: LoadWeights = load_weights,
    ) -> None:
        device = options.device
        dtype = choose_dtype(options.dtype, device)
        self._device = device
        self._input_device = device
        self._geometry = geometry
        self._window = Window(options.window, options.sinks)
        self.pages = self._make_pages(pages, dtype, options)
        self._ops = self._make_ops(options)
        weights = load(directory, geometry, dtype, device)
        self._model = LlamaModel(geometry, weights, self.pages, self._ops)
        self._tables = PageTables(options.max_batch, pages_for(geometry.context))
        self._dtype = dtype
        self._slots = pages * KV_PAGE_TOKENS

    # -- its parts; those of another device differ ---------------------------------------------

    def _make_pages(self, pages: int, dtype: torch.dtype, options: EngineOptions) -> KvPages:
        return KvPages(self._geometry.kv, pages, dtype, options.device)

    def _make_ops(self, options: EngineOptions) -> StepOps:
        return _choose_ops(self._geometry, self.pages, options)

    # -- a step -------------------------------------------------------------------------------

    def prepare(self, step: Step) -> Prepared:
        with torch.inference_mode():
            return Prepared.of(step, self._build(step.works))

    def run(self, prepared: Prepared) -> list[int]:
        assert isinstance(prepared.input, StepInput)
        logits = self.compute(prepared.input)
        if not prepared.samplings:
            return []
        return sample_rows(logits.cpu().numpy(), prepared.samplings, prepared.indexes)

    def compute(self, step: StepInput) -> torch.Tensor:
        """See `LlamaModel.step`."""
        with torch.inference_mode():
            return self._model.step(step)

    def write_block(self, pages: Seq[int], block: KvBlock) -> None:
        with torch.inference_mode():
            self.pages.write_block(pages, block)

    def close(self) -> None:
        """Nothing to end: torch's threads are the process's."""

    def load_kernels(self, threads: int) -> None:
        """The part of `warm_up` that may take a while and needs no other rank."""
        if isinstance(self._ops, CompiledOps):
            _load_kernels(self._ops, threads)

    def warm_up(self, threads: int) -> None:
        self.load_kernels(threads)
        self.touch()

    def touch(self) -> None:
        """The rest of `warm_up`: a chunk and a row, as steps will bring them."""
        tokens = min(_WARM_UP_TOKENS, self._geometry.context, self._slots)
        chunk = np.arange(tokens, dtype=np.int64)
        tables = np.zeros_like(self._tables.array)
        segment = Segment(first=0, count=tokens, start=0, slots=None, mask=None)
        self.compute(self._input(chunk, chunk, chunk, [], tables, (segment,), [tokens - 1]))
        one = chunk[:1]
        self.compute(self._input(one, one, one, [(0, 0, 1)], tables, (), [0]))

    # -- building a step's arrays -------------------------------------------------------------

    def _build(self, works: Seq[Work]) -> StepInput:
        attending: list[tuple[int, int, int]] = []
        segments: list[Segment] = []
        self._tables.update([work.sequence for work in works])
        rows = rows_of(works)
        for work, first in zip(works, rows.firsts, strict=True):
            if work.count <= _ROW_CHUNK:
                table, seen = self._tables.index(work.sequence), work.start + 1
                attending.extend((first + i, table, seen + i) for i in range(work.count))
            else:
                segments.append(self._segment(work, first))
        return self._input(
            rows.tokens,
            rows.positions,
            rows.slots,
            attending,
            self._tables.array,
            tuple(segments),
            logit_rows(works, rows.firsts),
        )

    def _input(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        slots: np.ndarray,
        rows: Seq[tuple[int, int, int]],
        tables: np.ndarray,
        segments: tuple[Segment, ...],
        logit_rows: list[int],
    ) -> StepInput:
        return StepInput(
            tokens=torch.from_numpy(tokens).to(self._input_device),
            positions_np=positions,
            slots_np=slots,
            rows=np.array(rows, np.int32).reshape(-1, 3),
            tables=tables,
            segments=segments,
            logit_rows=torch.tensor(logit_rows, dtype=torch.int64, device=self._input_device),
        )

    def _segment(self, work: Work, first: int) -> Segment:
        end = work.start + work.count
        keys = self._window.keys(work.start, end)
        mask = chunk_mask(self._window, work.start, work.count, self._dtype, self._device)
        if work.start == 0:
            return Segment(first, work.count, 0, None, mask)
        # Pages that the window has passed may be somebody else's by now.
        slots = torch.from_numpy(slots_of(work.sequence.pages)[keys.numpy()]).to(self._device)
        return Segment(first, work.count, work.start, slots, mask)


def _choose_ops(geometry: ModelGeometry, pages: KvPages, options: EngineOptions) -> StepOps:
    window = Window(options.window, options.sinks)
    if options.device == "cpu" and options.compiled:
        if find_spec("numba") is not None:
            return CompiledOps(geometry, pages, window)
        log.warning("cpu_kernels_missing", hint="pip install 'segue[cloud]'; decoding is slow now")
    return TorchOps(geometry, pages, options.device, window)


def _load_kernels(ops: CompiledOps, threads: int) -> None:
    ops.kernels.set_threads(threads)
    with told_if_slow("compiles its kernels for this CPU, once"):
        ops.load_kernels()
