"""An event loop on a thread of its own, for code without one: `segue.sync` runs on it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import inspect
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
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
        self._end = weakref.finalize(self, _end, self._loop, self._thread)

    def call(self, make: Callable[[], Awaitable[T]]) -> T:
        """What comes of the awaitable that `make` gives. Ctrl-C cancels it.

        Raises:
            Unreachable: the client was closed, or is closed meanwhile.
            InvalidArgument: called on the portal's own thread, which would wait for itself.
        """

        async def work() -> T:
            return await make()

        self._check()
        future = asyncio.run_coroutine_threadsafe(work(), self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise _closed() from None
        except BaseException:
            future.cancel()  # of Ctrl-C: nobody waits for it any more
            raise

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
                self._leave(items.aclose)

    @property
    def closed(self) -> bool:
        return not self._end.alive

    def close(self) -> None:
        """Cancel what runs, and end the thread. Idempotent."""
        if threading.current_thread() is not self._thread:
            self._end()

    def _leave(self, close: Callable[[], Awaitable[Any]]) -> None:
        """A generator is collected on whichever thread lets go of it, our own included."""
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

    async def wind_up() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=RPC_TIMEOUT_S)
        await loop.shutdown_asyncgens()
        loop.stop()

    asyncio.run_coroutine_threadsafe(wind_up(), loop)
    if threading.current_thread() is thread:
        return  # whose last task let go of the portal: the loop stops once that has ended
    thread.join(2 * RPC_TIMEOUT_S)
    if not thread.is_alive():
        loop.close()
