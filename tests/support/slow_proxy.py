"""A TCP proxy between a client and a real server that makes their link bad, on request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType

_CHUNK = 65536
_UNDER_WAY = 256  # chunks: 16 MiB, more than any window of TCP here


class SlowProxy:
    """`async with SlowProxy(port) as proxy:` forwards `proxy.port` to `port` on loopback.

    Each chunk, in either direction, arrives `delay()` seconds after it was sent, those behind it
    right after it, and no more than `bytes_per_s` of them. `stall()` lets nothing through until
    `flow()`; `cut()` closes all connections; `refuse` makes new ones fail; `aim(port)` sends new
    ones elsewhere.
    """

    def __init__(
        self,
        target_port: int,
        delay: Callable[[], float] = lambda: 0.0,
        bytes_per_s: float = float("inf"),
    ) -> None:
        self._target_port = target_port
        self._delay = delay
        self._bytes_per_s = bytes_per_s
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._serving: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.port = 0
        self.refuse = False
        self.accepted = 0

    async def __aenter__(self) -> SlowProxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._server is not None
        self._server.close()
        self.flow()
        self.cut()
        await asyncio.gather(*self._serving, return_exceptions=True)
        await self._server.wait_closed()

    @property
    def redis_url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def retarget(self, port: int) -> None:
        """New connections go to `port`; those that stand stay where they are."""
        self._target_port = port

    def stall(self) -> None:
        self._flowing.clear()

    def flow(self) -> None:
        self._flowing.set()

    def cut(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()

    def aim(self, port: int) -> None:
        self._target_port = port

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        if self.refuse:
            writer.transport.abort()
            return
        serving = asyncio.current_task()
        assert serving is not None
        self._serving.add(serving)
        serving.add_done_callback(self._serving.discard)
        try:
            to, back = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, back}
        pumps = [
            asyncio.create_task(self._pump(reader, back)),
            asyncio.create_task(self._pump(to, writer)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            self._writers -= {writer, back}
            writer.transport.abort()
            back.transport.abort()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        """Ends with the first of both ends that does."""
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_UNDER_WAY)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._send(source, under_way))
            group.create_task(self._arrive(under_way, sink))

    async def _send(
        self, source: asyncio.StreamReader, under_way: asyncio.Queue[tuple[float, bytes]]
    ) -> None:
        now = asyncio.get_running_loop().time
        while chunk := await source.read(_CHUNK):
            if busy_s := len(chunk) / self._bytes_per_s:
                await asyncio.sleep(busy_s)
            await under_way.put((now() + self._delay(), chunk))
        await under_way.put((now(), b""))

    async def _arrive(
        self, under_way: asyncio.Queue[tuple[float, bytes]], sink: asyncio.StreamWriter
    ) -> None:
        now = asyncio.get_running_loop().time
        while True:
            due, chunk = await under_way.get()
            if not chunk:
                return
            if (wait_s := due - now()) > 0:
                await asyncio.sleep(wait_s)
            await self._flowing.wait()
            sink.write(chunk)
            await sink.drain()
