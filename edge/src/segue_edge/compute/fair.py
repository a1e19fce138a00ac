"""Which job the compute thread advances next. Pure: times come in as arguments.

Decoding and prefilling share the processor by time, as in start-time fair queueing (Goyal, Vin and
Cheng, SIGCOMM 1996): each class has a virtual time that grows with the service it got, divided by
its share, and the class that is behind goes next. A class that had nothing to do comes back at the
virtual time of the step that was served last: idleness earns no credit. Within a class first come,
first served, and a job keeps its place until its last step. Warm-ups take what is left.

A reply that is being decoded has no job queued between two of its tokens, while the event loop
looks at the last one. Where decoding is behind, the processor waits for it, `DECODE_RETURN_S` at
most: otherwise every token of a single reply would cost it a whole prefill chunk.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import IntEnum
from typing import Generic, TypeVar

from segue_contract.limits import DECODE_RETURN_S, EDGE_DECODE_SHARE

T = TypeVar("T")


class Priority(IntEnum):
    """The class of a job: two that share the processor, and one for idle time."""

    DECODE = 0
    PREFILL = 1
    WARM = 2


@dataclass(frozen=True)
class Idle:
    """Nothing to advance: before `until`, the caller's clock in seconds, or, where it is None,
    before something is pushed."""

    until: float | None = None


class FairQueue(Generic[T]):
    """Jobs of the three classes; one is taken at a time.

    Args:
        decode_share: of the processor for decoding while prompts wait as well; between 0 and 1.

    Attributes:
        shares: of each of the two classes that share the processor.
    """

    def __init__(self, decode_share: float = EDGE_DECODE_SHARE) -> None:
        assert 0 < decode_share < 1
        self.shares = {Priority.DECODE: decode_share, Priority.PREFILL: 1 - decode_share}
        self._served = dict.fromkeys(self.shares, 0.0)  # virtual times
        self._now = 0.0  # virtual time at which the last step began
        self._queues: dict[Priority, deque[T]] = {priority: deque() for priority in Priority}
        self._taken: tuple[Priority, T] | None = None
        self._decode_ended = float("-inf")

    def __len__(self) -> int:
        """Jobs that wait; the one that is taken is not among them."""
        return sum(map(len, self._queues.values()))

    @property
    def taken(self) -> Priority:
        """The class of the job that is taken; there must be one."""
        assert self._taken is not None
        return self._taken[0]

    def jobs(self, priority: Priority) -> list[T]:
        """All of one class, the one that is taken first."""
        taken = [self._taken[1]] if self._taken is not None and self._taken[0] == priority else []
        return [*taken, *self._queues[priority]]

    def push(self, priority: Priority, job: T) -> None:
        """Put a job behind the others of its class."""
        if priority in self.shares and not self.jobs(priority):
            self._served[priority] = max(self._served[priority], self._now)
        self._queues[priority].append(job)

    def take(self, now: float, decoding: int = 0) -> T | Idle:
        """The job whose next step is due; `put_back` or `drop` follows before the next `take`.

        Args:
            decoding: replies under way, also those that are between two tokens.
        """
        assert self._taken is None, "one job at a time"
        priority = self._next_class()
        if priority is None:
            return Idle()
        if priority != Priority.DECODE and self._decode_returns(priority, now, decoding):
            return Idle(self._decode_ended + DECODE_RETURN_S)
        self._now = max(self._now, self._served.get(priority, self._now))
        self._taken = (priority, self._queues[priority].popleft())
        return self._taken[1]

    def put_back(self, seconds: float, now: float) -> None:
        """The taken job had a step of `seconds` and has more: it keeps its place."""
        priority, job = self._end_step(seconds, now)
        self._queues[priority].appendleft(job)

    def drop(self, seconds: float, now: float) -> None:
        """The taken job had its last step, of `seconds`."""
        self._end_step(seconds, now)

    def check_integrity(self) -> None:
        """For tests: a taken job waits nowhere, and no class is served by less than nothing."""
        waiting = [id(job) for queue in self._queues.values() for job in queue]
        assert len(set(waiting)) == len(waiting)
        assert self._taken is None or id(self._taken[1]) not in waiting
        assert all(served >= 0 for served in self._served.values())

    def clear(self) -> list[T]:
        """Empty the queue; returns the jobs that waited."""
        waiting = [job for queue in self._queues.values() for job in queue]
        for queue in self._queues.values():
            queue.clear()
        return waiting

    def _next_class(self) -> Priority | None:
        due = [priority for priority in self.shares if self._queues[priority]]
        if due:
            return min(due, key=lambda priority: self._served[priority])
        return Priority.WARM if self._queues[Priority.WARM] else None

    def _decode_returns(self, priority: Priority, now: float, decoding: int) -> bool:
        """A reply between two tokens is worth waiting for before a longer step of `priority`."""
        if decoding <= len(self._queues[Priority.DECODE]):
            return False
        decode = max(self._served[Priority.DECODE], self._now)
        behind = decode < self._served.get(priority, float("inf"))
        return behind and now < self._decode_ended + DECODE_RETURN_S

    def _end_step(self, seconds: float, now: float) -> tuple[Priority, T]:
        assert self._taken is not None
        priority, job = self._taken
        self._taken = None
        if priority in self.shares:
            self._served[priority] += max(0.0, seconds) / self.shares[priority]
        if priority == Priority.DECODE:
            self._decode_ended = now
        return priority, job
