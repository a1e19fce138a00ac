"""Copies between a device's memory and the host's that nobody waits for until they are needed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch


class Ticket(Protocol):
    """One copy under way."""

    def ready(self) -> bool:
        """Whether it is done."""
        ...

    def wait(self) -> None:
        """Return once it is done. Any thread may wait."""
        ...


class Transfers(Protocol):
    """Copies in the order of the device's work: a copy sees what was queued before it, and what is
    queued later sees, or may overwrite, what was copied."""

    def host(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Host memory that copies may read and write while the program goes on."""
        ...

    def fetch(self, read: Callable[[], torch.Tensor], into: torch.Tensor) -> Ticket:
        """Copy what `read` gathers on the device into host memory."""
        ...

    def send(self, values: torch.Tensor, write: Callable[[torch.Tensor], None]) -> Ticket:
        """Copy host memory to the device and let `write` put it into place. The ticket is ready
        when `values` may be used for something else."""
        ...


class _Done:
    def ready(self) -> bool:
        return True

    def wait(self) -> None:
        return


class DirectTransfers:
    """For the CPU: each copy is over when the call returns."""

    def host(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    def fetch(self, read: Callable[[], torch.Tensor], into: torch.Tensor) -> Ticket:
        into.copy_(read())
        return _Done()

    def send(self, values: torch.Tensor, write: Callable[[torch.Tensor], None]) -> Ticket:
        write(values)
        return _Done()


class _Event:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def ready(self) -> bool:
        return bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        self._event.synchronize()


class CudaTransfers:
    """Pinned memory and a stream of its own, so that copies run beside the computing."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def host(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def fetch(self, read: Callable[[], torch.Tensor], into: torch.Tensor) -> Ticket:
        main = torch.cuda.current_stream(self._device)
        self._side.wait_stream(main)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._side):
            gathered = read()
            # The pages may be written again once they are gathered, not only when they arrived.
            main.wait_event(self._side.record_event())
            into.copy_(gathered, non_blocking=True)
            done.record(self._side)
        return _Event(done)

    def send(self, values: torch.Tensor, write: Callable[[torch.Tensor], None]) -> Ticket:
        main = torch.cuda.current_stream(self._device)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._side):
            moved = values.to(self._device, non_blocking=True)
            done.record(self._side)
        main.wait_event(done)
        moved.record_stream(main)  # its memory is not given to another copy while `main` reads it
        write(moved)
        return _Event(done)


class Staging:
    """A fixed number of host buffers of one size, each in the hands of at most one copy."""

    def __init__(
        self, transfers: Transfers, count: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        self._free = deque(transfers.host(shape, dtype) for _ in range(count))
        self._busy: deque[tuple[torch.Tensor, Ticket]] = deque()

    def take(self) -> torch.Tensor | None:
        """A buffer, or None while all are held by somebody who reads them."""
        while self._busy and self._busy[0][1].ready():
            self._free.append(self._busy.popleft()[0])
        if self._free:
            return self._free.popleft()
        if self._busy:  # a copy out of it is under way, and will end by itself
            buffer, ticket = self._busy.popleft()
            ticket.wait()
            return buffer
        return None

    def give_back(self, buffer: torch.Tensor, ticket: Ticket | None = None) -> None:
        """`ticket`: the copy that still reads the buffer."""
        if ticket is None:
            self._free.append(buffer)
        else:
            self._busy.append((buffer, ticket))
