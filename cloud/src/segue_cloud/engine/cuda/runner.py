"""One step's effect on a device: the plain runner with the device's parts in place of the CPU's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import structlog
import torch

from segue_cloud.engine.attention import StepOps
from segue_cloud.engine.cuda.decode_graph import (
    Capture,
    CudaCapture,
    DecodeGraphs,
    DirectCapture,
    Results,
)
from segue_cloud.engine.cuda.flashinfer import choose_attention
from segue_cloud.engine.cuda.ops import DeviceOps
from segue_cloud.engine.cuda.pages import DevicePages
from segue_cloud.engine.cuda.sampling import choose_tokens, pick
from segue_cloud.engine.cuda.shapes import Shape
from segue_cloud.engine.cuda.transfers import CudaTransfers, DirectTransfers, Transfers
from segue_cloud.engine.kv_pages import KvPages, slots_of
from segue_cloud.engine.options import EngineOptions
from segue_cloud.engine.runner import LoadWeights, Prepared, Runner
from segue_cloud.engine.scheduler import Work
from segue_cloud.engine.sequence import pages_for
from segue_cloud.engine.step_input import Segment, StepInput
from segue_cloud.engine.weights import load_weights
from segue_contract.limits import KV_PAGE_TOKENS
from segue_contract.model.manifest import ModelGeometry

log = structlog.get_logger(__name__)


class DeviceRunner(Runner):
    """Implements `StepRunner` on `options.device`: a card, or for tests the CPU.

    A prepared step stays on the host; `run` brings it to the device, in one go where its size was
    captured at warm-up, else array by array.
    """

    def __init__(
        self,
        directory: Path,
        geometry: ModelGeometry,
        pages: int,
        options: EngineOptions,
        load: LoadWeights = load_weights,
    ) -> None:
        device = torch.device(options.device)
        self._on_card = device.type == "cuda"
        if device.index is not None:
            torch.cuda.set_device(device)  # of this thread, which computes
        super().__init__(directory, geometry, pages, options, load)
        self._input_device = "cpu"  # `run` moves a step as a whole
        assert isinstance(self.pages, DevicePages)
        assert isinstance(self._ops, DeviceOps)
        self._device_ops = self._ops
        self._graphs = DecodeGraphs(
            self._model,
            self._device_ops,
            self._make_capture(options),
            options.device,
            options.max_batch,
            min(pages, pages_for(geometry.context)),
            self.pages.scratch_page,
        )
        self._wants_graphs = options.graphs
        self.replayed_steps = 0
        self.eager_steps = 0

    def _make_pages(self, pages: int, dtype: torch.dtype, options: EngineOptions) -> KvPages:
        transfers: Transfers = CudaTransfers(options.device) if self._on_card else DirectTransfers()
        return DevicePages(self._geometry.kv, pages, dtype, options.device, transfers)

    def _make_ops(self, options: EngineOptions) -> StepOps:
        pages = self.pages
        assert isinstance(pages, DevicePages)
        scratch = pages.scratch_page * KV_PAGE_TOKENS
        attention = choose_attention(self._geometry, pages, scratch, self._window)
        return DeviceOps(self._geometry, pages, options.device, attention, self._window)

    def _make_capture(self, options: EngineOptions) -> Capture:
        return CudaCapture(options.device) if self._on_card else DirectCapture()

    @property
    def captured_shapes(self) -> list[Shape]:
        """The sizes of decode steps that are replayed, not computed kernel by kernel."""
        return self._graphs.shapes

    def run(self, prepared: Prepared) -> list[int]:
        assert isinstance(prepared.input, StepInput)
        with torch.inference_mode():
            found = self._graphs.run(prepared.input)
            if found is None:
                found = self._eager(prepared.input)
                self.eager_steps += 1
            else:
                self.replayed_steps += 1
            if not prepared.samplings:
                return []
            return choose_tokens(*found, prepared.samplings, prepared.indexes)

    def warm_up(self, threads: int) -> None:
        self.touch()
        if self._wants_graphs:
            with torch.inference_mode():
                self._capture()

    def compute(self, step: StepInput) -> torch.Tensor:
        with torch.inference_mode():
            return self._eager(step)[0]

    def _capture(self) -> None:
        try:
            self._graphs.capture_all()
        except torch.OutOfMemoryError as error:
            log.warning("no_decode_graphs", error=str(error)[:300], captured=self._graphs.shapes)

    def _eager(self, step: StepInput) -> Results:
        device = self._device
        moved = replace(step, tokens=step.tokens.to(device), logit_rows=step.logit_rows.to(device))
        self._device_ops.begin(moved)
        logits = self._model.step(moved)
        return logits, pick(logits)

    def _segment(self, work: Work, first: int) -> Segment:
        """As the plain one; where all is in sight, no mask: the fused kernels know that case."""
        if self._window.tokens:
            return super()._segment(work, first)
        if work.start == 0:
            return Segment(first, work.count, 0, None, None)
        slots = slots_of(work.sequence.pages)[: work.start + work.count]
        on_device = torch.from_numpy(slots).to(self._device)
        return Segment(first, work.count, work.start, on_device, None)
