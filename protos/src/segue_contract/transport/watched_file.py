"""A file that may be replaced while a program runs: what it says now, or said when it was right."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import structlog

from segue_contract.errors import SegueError
from segue_contract.limits import GATE_LOOK_S

T = TypeVar("T")

log = structlog.get_logger("segue.files")


class WatchedFile(Generic[T]):
    """`value` is what `read` makes of the file, the last good one where it cannot be read. The file
    is looked at once in `GATE_LOOK_S`.

    Args:
        read: raises SegueError where the file cannot be used.
        kept: the event that is logged where the value stays as it was.

    Attributes:
        changes: how often it was read anew so far.

    Raises:
        SegueError: `read` does, at the start.
    """

    def __init__(
        self,
        path: Path,
        read: Callable[[Path], T],
        kept: str,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.changes = 0
        self._path = path
        self._read = read
        self._kept = kept
        self._monotonic = monotonic
        self._stamp = self._stat()
        self._value = read(path)
        self._looked_s = monotonic()

    @property
    def value(self) -> T:
        if self._monotonic() - self._looked_s >= GATE_LOOK_S:
            self._look()
        return self._value

    def _look(self) -> None:
        self._looked_s = self._monotonic()
        stamp = self._stat()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._value = self._read(self._path)
            self.changes += 1
        except SegueError as error:
            log.error(self._kept, file=str(self._path), error=str(error),
                      hint="The last good ones are used until the file is right.")  # fmt: skip

    def _stat(self) -> tuple[int, int, int]:
        try:
            found = self._path.stat()
        except OSError:
            return (0, 0, 0)
        return (found.st_mtime_ns, found.st_size, found.st_ino)
