"""Decode steps as recorded work: captured once per size, replayed with other numbers.

A decode step of a large model is hundreds of short kernels; launching each from Python would take
longer than they do. So at warm-up one step per size is captured, over buffers that stay where they
are, and a step is then: fill the buffers, replay. What varies between steps is data in them:
tokens, positions, slots, page tables, lengths. A step with fewer rows than its size is padded;
padding rows write to a scratch page that no turn owns, and see one token of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from segue_cloud.engine.cuda.attention import Rows
from segue_cloud.engine.cuda.ops import DeviceOps, StepTensors, rows_of
from segue_cloud.engine.cuda.sampling import pick
from segue_cloud.engine.cuda.shapes import Shape, row_buckets, smallest
from segue_cloud.engine.model import LlamaModel
from segue_cloud.engine.step_input import StepInput
from segue_contract.limits import KV_PAGE_TOKENS, MAX_GRAPH_BYTES

log = structlog.get_logger(__name__)

# logits float32 `[rows, vocab]`, greedy tokens int64 `[rows]`
Results: TypeAlias = tuple[torch.Tensor, torch.Tensor]
_TOKENS, _POSITIONS, _SLOTS = range(3)


class Capture(Protocol):
    """Turns a computation over fixed buffers into something that repeats it."""

    @property
    def bytes_held(self) -> int:
        """Device memory that captured work keeps for itself."""
        ...

    def capture(self, compute: Callable[[], Results]) -> Callable[[], Results]:
        """What repeats `compute` on what its buffers hold by then."""
        ...


class DirectCapture:
    """Computes anew each time: for devices without graphs, and for tests of what is around them."""

    bytes_held = 0

    def capture(self, compute: Callable[[], Results]) -> Callable[[], Results]:
        compute()  # as a real capture does, so that what it leaves behind shows
        return compute


class CudaCapture:
    """CUDA graphs over one memory pool: they run one at a time, so they may share it."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._before: int | None = None

    @property
    def bytes_held(self) -> int:
        if self._before is None:
            return 0
        return torch.cuda.memory_reserved(self._device) - self._before

    def capture(self, compute: Callable[[], Results]) -> Callable[[], Results]:
        # Once outside the graph: libraries choose kernels and take workspaces in their first call.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            compute()
        torch.cuda.synchronize(self._device)
        if self._before is None:
            torch.cuda.empty_cache()
            self._before = torch.cuda.memory_reserved(self._device)
        graph = torch.cuda.CUDAGraph()
        # Only this thread's calls count: another one copies blocks meanwhile.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            results = compute()

        def replay() -> Results:
            graph.replay()
            return results

        return replay


@dataclass(frozen=True)
class Padded:
    """One decode step at the size of a shape: int64 `[3, rows]` of tokens, positions and slots."""

    numbers: NDArray[np.int64]
    rows: Rows


def pad(step: StepInput, shape: Shape, scratch_page: int) -> Padded:
    """`step` with rows that stand in for nobody, up to the shape's."""
    count = len(step.rows)
    numbers = np.zeros((3, shape.rows), np.int64)
    numbers[_TOKENS, :count] = step.tokens.numpy()
    numbers[_POSITIONS, :count] = step.positions_np
    numbers[_SLOTS, :count] = step.slots_np
    numbers[_SLOTS, count:] = scratch_page * KV_PAGE_TOKENS
    if not count:
        tables = np.full((shape.rows, 1), scratch_page, np.int32)
        return Padded(numbers, Rows(tables, np.ones(shape.rows, np.int64)))
    seen = rows_of(step)
    more = shape.rows - count
    tables = np.pad(seen.tables, ((0, more), (0, 0)), constant_values=scratch_page)
    lengths = np.pad(seen.lengths, (0, more), constant_values=1)
    return Padded(numbers, Rows(tables, lengths))


def decodes_only(step: StepInput) -> bool:
    """Each row is one token of a turn of its own, and the next token of each is sampled."""
    count = len(step.positions_np)
    return 0 < count == len(step.rows) == len(step.logit_rows) and not step.segments


class DecodeGraphs:
    """The captured steps of one model. Used by the thread that runs the model.

    Args:
        table_pages: the most pages a turn can have.
        scratch_page: a page that no turn owns.
    """

    def __init__(
        self,
        model: LlamaModel,
        ops: DeviceOps,
        capture: Capture,
        device: str,
        max_batch: int,
        table_pages: int,
        scratch_page: int,
    ) -> None:
        self._model = model
        self._ops = ops
        self._capture = capture
        self._scratch_page = scratch_page
        self._wanted = ops.attention.shapes(row_buckets(max_batch), table_pages)
        pinned = torch.device(device).type == "cuda"
        self._hosts = {
            rows: torch.zeros(3, rows, dtype=torch.int64, pin_memory=pinned)
            for rows in {shape.rows for shape in self._wanted}
        }
        self._numbers = {rows: host.to(device, copy=True) for rows, host in self._hosts.items()}
        self._replays: dict[Shape, Callable[[], Results]] = {}
        self._device = device

    @property
    def shapes(self) -> list[Shape]:
        """Those that were captured."""
        return sorted(self._replays)

    def capture_all(self) -> None:
        """Capture the shapes, the largest first: the others then fit into its memory.

        Stops at `MAX_GRAPH_BYTES`; steps of the sizes left out are computed kernel by kernel.
        """
        for shape in sorted(self._wanted, reverse=True):
            if self._capture.bytes_held > MAX_GRAPH_BYTES:
                log.warning("not_all_graphs", captured=len(self._replays), of=len(self._wanted))
                break
            self._fill(pad(_nothing(), shape, self._scratch_page), shape)
            self._replays[shape] = self._capture.capture(self._computation(shape))
        log.info(
            "decode_graphs",
            shapes=len(self._replays),
            mib=self._capture.bytes_held >> 20,
            attention=type(self._ops.attention).__name__,
        )

    def run(self, step: StepInput) -> Results | None:
        """Logits and greedy tokens of the step's rows; None where no captured shape fits it.

        They lie in memory that the next step overwrites.
        """
        if not decodes_only(step):
            return None
        pages = -(-int(step.rows[:, 2].max()) // KV_PAGE_TOKENS)
        count = len(step.rows)
        shape = smallest(self._replays, count, pages)
        if shape is None:
            return None
        self._fill(pad(step, shape, self._scratch_page), shape)
        logits, tokens = self._replays[shape]()
        return logits[:count], tokens[:count]

    def _fill(self, padded: Padded, shape: Shape) -> None:
        # The last copy out of this buffer is over: every step ends with its tokens on the host.
        host = self._hosts[shape.rows]
        host.copy_(torch.from_numpy(padded.numbers))
        self._numbers[shape.rows].copy_(host, non_blocking=True)
        self._ops.attention.plan(padded.rows, shape)

    def _computation(self, shape: Shape) -> Callable[[], Results]:
        numbers = self._numbers[shape.rows]
        step = StepInput(
            tokens=numbers[_TOKENS],
            positions_np=np.zeros(shape.rows, np.int64),
            slots_np=np.zeros(shape.rows, np.int64),
            rows=np.zeros((shape.rows, 3), np.int32),
            tables=np.zeros((shape.rows, 0), np.int32),
            segments=(),
            logit_rows=torch.arange(shape.rows, device=self._device),
        )
        tensors = StepTensors(numbers[_POSITIONS], numbers[_SLOTS])

        def compute() -> Results:
            self._ops.bind(step, tensors)
            logits = self._model.step(step)
            return logits, pick(logits)

        return compute


def _nothing() -> StepInput:
    """A step without rows: all that is left of it once padded is padding."""
    none = np.zeros(0, np.int64)
    return StepInput(
        tokens=torch.zeros(0, dtype=torch.int64),
        positions_np=none,
        slots_np=none,
        rows=np.zeros((0, 3), np.int32),
        tables=np.zeros((0, 0), np.int32),
        segments=(),
        logit_rows=torch.zeros(0, dtype=torch.int64),
    )
