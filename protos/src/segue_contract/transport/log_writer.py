"""Lines to a file that may stall: written by a thread, so that nobody who logs ever waits."""

from __future__ import annotations

import threading
from collections import deque
from typing import TextIO


class LogWriter:
    """A text file whose `write` returns at once.

    At most `max_bytes` wait, counted in characters; lines beyond that are dropped and counted, and
    the count is written once there is room again. Its thread starts with the first line and never
    keeps the process alive; `close` gives what waits a moment.
    """

    def __init__(self, file: TextIO, max_bytes: int) -> None:
        self._file = file
        self._max_bytes = max_bytes
        self._lines: deque[str] = deque()
        self._waiting = 0  # characters of `_lines` and of the line being written
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False
        self.dropped = 0  # lines since the last note about it
        self.dropped_in_all = 0

    def write(self, text: str) -> int:
        with self._changed:
            if self._closing or self._waiting + len(text) > self._max_bytes:
                self.dropped += 1
                self.dropped_in_all += 1
                return len(text)
            self._lines.append(text)
            self._waiting += len(text)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="segue-logs", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return len(text)

    def flush(self) -> None:
        """Nothing: the thread flushes what it wrote."""

    def isatty(self) -> bool:
        return self._file.isatty()

    def drain(self, timeout_s: float) -> bool:
        """Wait until nothing waits; False where that took too long."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting, timeout_s)

    def close(self, timeout_s: float) -> None:
        """Take no more lines, and wait for those that wait."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._waiting, timeout_s)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines or self._closing)
                if not self._lines:
                    return
                text, size = "".join(self._lines), self._waiting
                self._lines.clear()
                dropped, self.dropped = self.dropped, 0
            if dropped:
                text += f"({dropped} log lines were dropped: nobody read them in time)\n"
            try:
                self._file.write(text)
                self._file.flush()
            except (OSError, ValueError):
                pass  # the reader is gone; a node goes on without its log
            with self._changed:
                self._waiting -= size
                self._changed.notify_all()
