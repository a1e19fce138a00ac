"""The life of a real server as a child process: started once entered, stopped with its owner."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

from segue_contract.servers.process import ChildProcess


class LocalServer(ABC):
    """`async with` starts the server; leaving stops it and removes what it kept on disk.

    Attributes:
        port: 0 until it runs, where a free one was asked for; the same after a restart.
        kind: which program serves.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.kind = ""
        self._child: ChildProcess | None = None
        self._stack = AsyncExitStack()

    @abstractmethod
    async def _begin(self) -> None:
        """Start the program: sets `_child`, `port` and `kind`."""

    @property
    def process(self) -> ChildProcess:
        assert self._child is not None, "not started"
        return self._child

    async def __aenter__(self) -> Self:
        await self._begin()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._child is not None:
            await self._child.stop()
        await self._stack.aclose()

    async def restart(self) -> None:
        """Start again on the same port, after the process was stopped or killed."""
        await self.process.stop()
        await self._begin()
