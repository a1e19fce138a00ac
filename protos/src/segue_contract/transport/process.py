"""What a program that serves does about signals, and about the memory that it has loaded."""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stop_requested() -> Iterator[asyncio.Event]:
    """An event that SIGINT and SIGTERM set, once; a second signal has its default effect."""
    loop = asyncio.get_running_loop()
    event = asyncio.Event()
    signals = (signal.SIGINT, signal.SIGTERM)

    def on_signal() -> None:
        event.set()
        for number in signals:
            loop.remove_signal_handler(number)

    for number in signals:
        loop.add_signal_handler(number, on_signal)
    try:
        yield event
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


def keep_loaded() -> None:
    """What is loaded by now, modules above all, stays as long as the process: collections that come
    later look at none of it, and hold the event loop up for less."""
    gc.collect()
    gc.freeze()
