"""Compiling takes seconds, once on a machine: while it lasts, the log says what is going on."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from segue_contract.limits import START_NOTICE_S
from segue_contract.telemetry import EVENT_PREPARING

log = structlog.get_logger(__name__)


@contextmanager
def told_if_slow(what: str, after_s: float = START_NOTICE_S) -> Iterator[None]:
    """Log that the program does `what` ("compiles ...") once the block has taken `after_s`, and at
    its end how long it took. A cache cannot be asked beforehand whether all in it is still good.
    """
    began = time.monotonic()
    notice = threading.Timer(after_s, log.info, (EVENT_PREPARING,), {"what": what})
    notice.daemon = True
    notice.start()
    try:
        yield
    finally:
        notice.cancel()
    seconds = time.monotonic() - began
    if seconds >= after_s:
        log.info("prepared", seconds=round(seconds, 1))
