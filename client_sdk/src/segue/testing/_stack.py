"""For tests of applications: all of Segue on this machine, real programs on free ports.

async with LocalStack() as stack:
    async with segue.Client(stack.edge_address, device="phone") as client: ...

with local_stack(edges=2) as stack: ...     # the same for code without an event loop
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from segue.local.parts import Part, Program, Server
from segue.local.stack import LocalStack

__all__ = ["LocalStack", "Part", "Program", "Server", "local_stack"]


@contextmanager
def local_stack(**options: Any) -> Iterator[LocalStack]:
    """A `LocalStack` for synchronous code; `options` are its arguments.

    It lives on an event loop in a thread of its own: the addresses may be read from anywhere, its
    coroutines (`kill`, `restart`) only be run on that loop.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="local stack", daemon=True)
    thread.start()
    stack = LocalStack(**options)
    try:
        asyncio.run_coroutine_threadsafe(stack.__aenter__(), loop).result()
        try:
            yield stack
        finally:
            asyncio.run_coroutine_threadsafe(stack.__aexit__(None, None, None), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
