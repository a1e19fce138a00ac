"""An event loop on a thread of its own, for code without one: `segue.sync` runs on it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import inspect
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from typing import Any, TypeVar

from segue_contract.errors import InvalidArgument, Unreachable
from segue_contract.limits import RPC_TIMEOUT_S

T = TypeVar("T")


class Portal:
    """May be used from any number of threads. Ends with `close`, or with the last reference to it,
    or with the interpreter."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="segue", daemon=True)
        self._thread.start()
        self._gate = threading.RLock()  # what is submitted before the end is cancelled by it
        self._end = weakref.finalize(self, _end, self._loop, self._thread)

    def call(self, make: Callable[[], Awaitable[T]]) -> T:
        """What comes of the awaitable that `make` gives. Ctrl-C cancels it.

        Raises:
            Unreachable: the client was closed, or is closed meanwhile.
            InvalidArgument: called on the portal's own thread, which would wait for itself.
        """
        tasks: list[asyncio.Task[Any]] = []

        async def work() -> T:
            tasks.extend(one for one in [asyncio.current_task()] if one is not None)
            return await make()

        future = self._submit(work())
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise _closed() from None
        except BaseException:
            if future.cancel():  # of Ctrl-C: nobody waits for it any more
                self._unwound(tasks)
            raise

    def _submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Raises Unreachable, InvalidArgument: as `call`."""
        try:
            with self._gate:
                self._check()
                return asyncio.run_coroutine_threadsafe(work, self._loop)
        except BaseException:
            work.close()
            raise

    def _unwound(self, tasks: list[asyncio.Task[Any]]) -> None:
        """Wait for the end of what was cancelled: only then may what it used be closed. One that
        had not begun by then never does."""

        async def ended() -> None:
            if tasks:
                await asyncio.wait(tasks)

        with contextlib.suppress(Unreachable, TimeoutError, concurrent.futures.CancelledError):
            self._submit(ended()).result(RPC_TIMEOUT_S)

    def run(self, make: Callable[[], T]) -> T:
        """The same for a function that awaits nothing."""

        async def work() -> T:
            return make()

        return self.call(work)

    def iterate(self, make: Callable[[], AsyncIterator[T]]) -> Iterator[T]:
        """The items of an asynchronous iterator; leaving the loop ends it."""
        items = self.run(make)
        try:
            while True:
                try:
                    item = self.call(items.__anext__)
                except StopAsyncIteration:
                    return
                yield item
        finally:
            if inspect.isasyncgen(items):
                self.leave(items.aclose)

    @property
    def closed(self) -> bool:
        return not self._end.alive

    def close(self) -> None:
        """Cancel what runs, and end the thread. Idempotent."""
        if threading.current_thread() is self._thread:
            return
        with self._gate:
            found = self._end.detach()
            if found is not None:
                _wind_up(self._loop)
        if found is not None:
            _join(self._loop, self._thread)

    def leave(self, close: Callable[[], Awaitable[Any]]) -> None:
        """Await `close`, unless the end of everything did. May be called on our own thread: a
        generator is collected on whichever thread lets go of it."""
        if threading.current_thread() is self._thread:
            asyncio.ensure_future(close())  # noqa: RUF006 - `_end` waits for it
        elif not self.closed:
            with contextlib.suppress(Unreachable):
                self.call(close)

    def _check(self) -> None:
        if self.closed:
            raise _closed()
        if threading.current_thread() is self._thread:
            raise InvalidArgument(
                "A SyncClient was used on its own thread, which would wait for itself for ever.",
                hint="A token function fetches its token by other means.",
            )


def _closed() -> Unreachable:
    return Unreachable("The client is closed.", hint="Open a new segue.SyncClient.")


def _end(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    """Knows nothing of the portal, which may be gone."""
    _wind_up(loop)
    _join(loop, thread)


def _wind_up(loop: asyncio.AbstractEventLoop) -> None:
    """Have it cancel all tasks, and stop."""

    async def wind_up() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=RPC_TIMEOUT_S)
        await loop.shutdown_asyncgens()
        loop.stop()

    asyncio.run_coroutine_threadsafe(wind_up(), loop)


def _join(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    if threading.current_thread() is thread:
        return  # whose last task let go of the portal: the loop stops once that has ended
    thread.join(2 * RPC_TIMEOUT_S)
    if not thread.is_alive():
        loop.close()
