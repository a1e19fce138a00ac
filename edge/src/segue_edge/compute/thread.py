"""The edge's one compute thread: it runs jobs that yield between steps.

A job is a sequence of short steps (a prefill chunk, one decoded token). After every step
`FairQueue` says which job has the next one: an arriving turn waits for one chunk of an idle warm-up
at most, and prompts and replies slow each other down by a known factor.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from segue_contract.errors import Internal, Overloaded, SegueError
from segue_contract.limits import PREFILL_QUEUE_JOBS, SHUTDOWN_GRACE_S
from segue_contract.liveness import UsualTime
from segue_edge.compute.fair import FairQueue, Idle, Priority

T = TypeVar("T")


@dataclass(frozen=True)
class Load:
    """What the thread has to do: prompt tokens of turns that wait or are being prefilled, and
    replies that are being decoded."""

    prefill_tokens: int
    decoding: int


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


class ComputeThread:
    """Runs jobs one step at a time in a thread of its own. `start` before use, `close` after.

    Args:
        now: a clock in seconds that never goes back.
    """

    def __init__(
        self, name: str = "segue-compute", now: Callable[[], float] = time.monotonic
    ) -> None:
        self._now = now
        self._queue: FairQueue[Job[Any]] = FairQueue()
        self._wake = threading.Condition()
        self._decoding = 0
        self._steps = 0
        self._step_began: float | None = None
        self._usual = {priority: UsualTime() for priority in Priority}
        self._closing = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def load(self) -> Load:
        """What there is to do now, for the estimate of the queue."""
        with self._wake:
            jobs = self._queue.jobs(Priority.PREFILL)
            decoding = self._decoding
        return Load(sum(job.left for job in jobs if not job.cancelled), decoding)

    def running(self) -> tuple[float, float]:
        """The running step's number from 1 on (0 where none runs), and how long such steps take:
        for `segue_contract.transport.stalls.StallMonitor`."""
        with self._wake:
            if self._step_began is None:
                return 0.0, math.inf
            return float(self._steps + 1), self._usual[self._queue.taken].seconds

    @contextlib.contextmanager
    def decoding(self) -> Iterator[None]:
        """While inside, one reply is being decoded, also when it is between two tokens."""
        with self._wake:
            self._decoding += 1
        try:
            yield
        finally:
            with self._wake:
                self._decoding -= 1
                self._wake.notify()

    def submit(self, job: Job[T], priority: Priority) -> asyncio.Future[T]:
        """Queue a job; await the future for its result.

        Raises:
            Overloaded: the queue is full. A decoded token is always taken: a reply has one at a
                time, and got its place with its prefill.
        """
        with self._wake:
            waiting = len(self._queue)
            full = waiting >= PREFILL_QUEUE_JOBS and priority != Priority.DECODE
            if full or self._closing:
                raise Overloaded(
                    f"This edge already has {waiting} jobs waiting for its processor.",
                    hint="Try again a little later.",
                    retry_after_s=1.0,
                )
            self._queue.push(priority, job)
            self._wake.notify()
        return job.done

    async def close(self) -> None:
        """Stop after the running step; jobs that never ran are cancelled."""
        with self._wake:
            self._closing = True
            dropped = self._queue.clear()
            self._wake.notify()
        for job in dropped:
            job.cancel()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, SHUTDOWN_GRACE_S)

    def _run(self) -> None:
        while (job := self._take()) is not None:
            more = self._advance(job)
            with self._wake:
                now = self._now()
                assert self._step_began is not None
                seconds, self._step_began = now - self._step_began, None
                self._steps += 1
                self._usual[self._queue.taken].took(seconds)
                if more and not self._closing:
                    self._queue.put_back(seconds, now)
                    continue
                self._queue.drop(seconds, now)
            if more:
                self._post(job.done.cancel)

    def _take(self) -> Job[Any] | None:
        """Wait for the job that is due; None when the thread is to end."""
        with self._wake:
            while not self._closing:
                now = self._now()
                due = self._queue.take(now, self._decoding)
                if not isinstance(due, Idle):
                    self._step_began = now
                    return due
                self._wake.wait(None if due.until is None else max(0.0, due.until - now))
            return None

    def _advance(self, job: Job[Any]) -> bool:
        """One step; True where there are more."""
        if job.cancelled:
            return False
        try:
            if not job.step():
                return True
            value = job.result()
        except Exception as error:
            self._post(_fail, job.done, error)
        else:
            self._post(_resolve, job.done, value)
        return False

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
