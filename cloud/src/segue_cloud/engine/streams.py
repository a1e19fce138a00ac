"""The reading side of a turn: what the engine made, waiting for the one who asked."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from segue_cloud.engine.port import EngineOutput
from segue_contract.errors import SegueError


class TurnStream:
    """An async iterator over a turn's outputs. Lives on one event loop.

    A slow reader costs no memory beyond the turn's own tokens: outputs that wait are joined. The
    iterator ends after the output with `finished`; leaving it earlier (`aclose`) cancels the turn.
    """

    def __init__(self, cancel: Callable[[], None]) -> None:
        self._cancel = cancel
        self._ready: deque[EngineOutput] = deque()
        self._error: SegueError | None = None
        self._ended = False
        self._wake = asyncio.Event()

    def __aiter__(self) -> TurnStream:
        return self

    async def __anext__(self) -> EngineOutput:
        while not self._ready:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        return self._ready.popleft()

    async def aclose(self) -> None:
        """Cancel the turn, if it still runs. May be called again."""
        if not self._ended:
            self._ended = True
            self._wake.set()
            self._cancel()

    def push(self, output: EngineOutput) -> None:
        """Hand an output over (from the engine's side, on the loop)."""
        if self._ended:
            return
        if self._ready:
            output = _joined(self._ready.pop(), output)
        self._ready.append(output)
        self._ended = bool(output.finished)
        self._wake.set()

    def fail(self, error: SegueError) -> None:
        """End with an error, after whatever was handed over before."""
        if not self._ended:
            self._error = error
            self._ended = True
            self._wake.set()


def _joined(first: EngineOutput, second: EngineOutput) -> EngineOutput:
    assert second.index == first.index + len(first.tokens), "outputs of a turn follow each other"
    return EngineOutput(
        index=first.index,
        tokens=first.tokens + second.tokens,
        finished=second.finished,
        cached_tokens=first.cached_tokens + second.cached_tokens,
    )
