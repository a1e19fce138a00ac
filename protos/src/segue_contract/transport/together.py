"""Tasks that belong together, and end together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any


async def end(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks and return when all have ended, however they did: asyncio tells of an error that
    nobody takes out of one.

    A cancellation of the caller comes through, once they have ended. (To suppress CancelledError
    around `await task` swallows it, so that whoever cancelled the caller waits for ever.)
    """
    cancelled: asyncio.CancelledError | None = None
    left = set(tasks)
    for task in left:
        task.cancel()
    while left:
        try:
            _, left = await asyncio.wait(left)
        except asyncio.CancelledError as error:
            cancelled = error
            for task in left:
                task.cancel()
    if cancelled is not None:
        raise cancelled


@asynccontextmanager
async def in_background(work: Coroutine[Any, Any, None], name: str) -> AsyncIterator[None]:
    """While inside, `work` goes on in a task of that name."""
    task = asyncio.create_task(work, name=name)
    try:
        yield
    finally:
        await end(task)


class Together:
    """`async with Together() as tasks:` starts some. Its end waits for all of them, also for those
    that one of them started. Where one fails the others are cancelled and its error is raised.

    As asyncio's TaskGroup, but a cancellation always comes through. A TaskGroup of Python 3.11 and
    3.12 that is cancelled while it ends with an error raises only the error; a loop that goes on
    after errors then goes on, and whoever cancelled it waits for ever.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._leaving = False
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def start(self, work: Coroutine[Any, Any, None], *, name: str = "") -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name or None)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    async def __aenter__(self) -> Together:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leaving = True
        try:
            if error is None and (self._tasks or self._over.done()):
                await self._over
        finally:
            await end(*self._tasks)
            if self._over.done() and not self._over.cancelled():
                self._over.exception()  # seen: the body's own error is raised

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        failure = None if task.cancelled() else task.exception()
        if self._over.done():
            return
        if failure is not None:
            self._over.set_exception(failure)
        elif self._leaving and not self._tasks:
            self._over.set_result(None)
