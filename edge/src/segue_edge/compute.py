"""The edge's one compute thread: a priority queue of jobs that yield between steps.

A job is a sequence of short steps (a prefill chunk, one decoded token). After every step the
thread takes whichever job is now the most urgent, so an arriving turn waits for one chunk of an
idle warm-up at most, and a bridge's tokens are not held up by another turn's whole prompt.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Generic, TypeVar

from segue_contract.errors import Internal, Overloaded, SegueError
from segue_contract.limits import PREFILL_QUEUE_JOBS, SHUTDOWN_GRACE_S

T = TypeVar("T")


class Priority(IntEnum):
    """Lower is more urgent; within one priority first come, first served."""

    DECODE = 0
    PREFILL = 1
    WARM = 2


@dataclass(order=True)
class _Entry:
    priority: int
    order: int
    job: Job[object] = field(compare=False)


class Job(Generic[T]):
    """One piece of work. `step` runs in the compute thread and returns True when it was the last.

    `done` resolves in the event loop with `result()`, or with the error that a step raised.
    """

    def __init__(self) -> None:
        self.done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self.cancelled = False

    @property
    def left(self) -> int:
        """Prompt tokens still to compute; 0 for jobs that are no prefill."""
        return 0

    def step(self) -> bool:
        raise NotImplementedError

    def result(self) -> T:
        """What `done` resolves with; called in the compute thread after the last step."""
        raise NotImplementedError

    def cancel(self) -> None:
        """Drop the job before its next step."""
        self.cancelled = True
        self.done.cancel()


class Call(Job[T]):
    """A job of one step: a plain function."""

    def __init__(self, function: Callable[[], T]) -> None:
        super().__init__()
        self._function = function
        self._value: list[T] = []

    def step(self) -> bool:
        self._value.append(self._function())
        return True

    def result(self) -> T:
        return self._value[0]


class ComputeThread:
    """Runs jobs one step at a time in a thread of its own. `start` before use, `close` after."""

    def __init__(self, name: str = "segue-compute") -> None:
        self._queue: list[_Entry] = []
        self._orders = itertools.count()
        self._wake = threading.Condition()
        self._running: _Entry | None = None
        self._closing = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def prefill_backlog(self) -> int:
        """Prompt tokens of turns that wait or are being prefilled."""
        with self._wake:
            jobs = [entry.job for entry in self._queue if entry.priority == Priority.PREFILL]
            if self._running is not None and self._running.priority == Priority.PREFILL:
                jobs.append(self._running.job)
        return sum(job.left for job in jobs if not job.cancelled)

    def submit(self, job: Job[T], priority: Priority) -> asyncio.Future[T]:
        """Queue a job; await the future for its result.

        Raises:
            Overloaded: the queue is full.
        """
        with self._wake:
            if len(self._queue) >= PREFILL_QUEUE_JOBS or self._closing:
                raise Overloaded(
                    f"This edge already has {len(self._queue)} jobs waiting for its processor.",
                    hint="Try again a little later.",
                    retry_after_s=1.0,
                )
            entry = _Entry(priority, next(self._orders), job)  # type: ignore[arg-type]
            heapq.heappush(self._queue, entry)
            self._wake.notify()
        return job.done

    async def close(self) -> None:
        """Stop after the running step; jobs that never ran are cancelled."""
        with self._wake:
            self._closing = True
            dropped, self._queue = self._queue, []
            self._wake.notify()
        for entry in dropped:
            entry.job.cancel()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, SHUTDOWN_GRACE_S)

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._queue and not self._closing:
                    self._wake.wait()
                if self._closing:
                    return
                entry = self._running = heapq.heappop(self._queue)
            self._advance(entry)
            self._running = None

    def _advance(self, entry: _Entry) -> None:
        job = entry.job
        if job.cancelled:
            return
        try:
            if not job.step():
                with self._wake:
                    if not self._closing:
                        heapq.heappush(self._queue, entry)
                        return
                self._post(job.done.cancel)
                return
            value = job.result()
        except Exception as error:
            self._post(_fail, job.done, error)
        else:
            self._post(_resolve, job.done, value)

    def _post(self, function: Callable[..., object], *arguments: object) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            return  # the loop is closed: nobody waits any more


def _resolve(future: asyncio.Future[object], value: object) -> None:
    if not future.done():
        future.set_result(value)


def _fail(future: asyncio.Future[object], error: Exception) -> None:
    if future.done():
        return
    if not isinstance(error, SegueError):
        wrapped = Internal(
            f"The edge model failed with an unexpected {type(error).__name__}: {error}.",
            hint="See the node's log.",
        )
        wrapped.__cause__ = error
        error = wrapped
    future.set_exception(error)
