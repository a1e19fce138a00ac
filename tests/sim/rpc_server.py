"""`grpc.aio.server`, simulated: handlers of the product's services over simulated connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import grpc

from tests.sim.network import End
from tests.sim.process import Process, current
from tests.sim.world import World

Code = grpc.StatusCode
EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]


class Context:
    """As grpc.aio.ServicerContext."""

    def __init__(self) -> None:
        self.status: tuple[Code, str, tuple[Any, ...]] | None = None

    async def abort(
        self, code: Code, details: str = "", trailing_metadata: tuple[Any, ...] = ()
    ) -> None:
        self.status = (code, details, tuple(trailing_metadata))
        raise grpc.aio.AbortError(details)

    def invocation_metadata(self) -> tuple[Any, ...]:
        return ()

    def peer(self) -> str:
        return "sim"


class Server:
    """As grpc.aio.Server."""

    def __init__(self, world: World, interceptors: Any = ()) -> None:
        process = current()
        assert process is not None
        self._world = world
        self._process: Process = process
        self._interceptors = list(interceptors or ())
        self._handlers: dict[str, Any] = {}
        self._addresses: list[str] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ends: list[End] = []
        self._stopping = False

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        for name, handler in handlers.items():
            self._handlers[f"/{service}/{name}"] = handler

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        return None  # the same ones as registered

    def add_insecure_port(self, address: str) -> int:
        self._addresses.append(address)
        return int(address.rpartition(":")[2])

    async def start(self) -> None:
        for address in self._addresses:
            self._world.network.listen(self._process, address, self._accept)

    async def stop(self, grace: float | None) -> None:
        self._stopping = True
        for address in self._addresses:
            self._world.network.unlisten(self._process, address)
        if self._tasks and grace:
            await asyncio.wait(self._tasks, timeout=grace)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for end in self._ends:
            end.close()

    def _accept(self, end: End) -> None:
        _Served(self, end)
        self._ends.append(end)

    def run(self, work: Any, name: str) -> asyncio.Task[Any]:
        task = self._process.start(work, name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def handler(self, path: str) -> Any:
        found = self._handlers.get(path)
        if found is None or not self._interceptors:
            return found
        details: Any = SimpleNamespace(method=path, invocation_metadata=())

        async def through(interceptors: list[Any]) -> Any:
            if not interceptors:
                return found
            first, *others = interceptors
            return await first.intercept_service(lambda _: through(others), details)

        return await through(self._interceptors)


class _Served:
    """One connection at the server."""

    def __init__(self, server: Server, end: End) -> None:
        self._server = server
        self._end = end
        self._calls: dict[int, tuple[asyncio.Task[Any], asyncio.Queue[Any]]] = {}
        end.on_message = self._took
        end.on_lost = self._lost

    def _took(self, message: tuple[Any, ...]) -> None:
        kind = message[0]
        if kind == "ping":
            self._end.send(("pong",))
        elif kind == "open":
            _, number, path, request = message
            queue: asyncio.Queue[Any] = asyncio.Queue()
            if request is not None:
                queue.put_nowait(request)
                queue.put_nowait(EOF)
            task = self._server.run(self._serve(number, path, queue), f"serve {path}")
            self._calls[number] = (task, queue)
        elif message[1] in self._calls:
            task, queue = self._calls[message[1]]
            if kind == "cancel":
                task.cancel()
            else:
                queue.put_nowait(message[2] if kind == "msg" else EOF)

    def _lost(self) -> None:
        for task, _ in list(self._calls.values()):
            task.cancel()

    async def _serve(self, number: int, path: str, queue: asyncio.Queue[Any]) -> None:
        context = Context()
        status: tuple[Any, ...] = (Code.OK, "", ())
        reply: bytes | None = None
        try:
            reply = await self._handle(number, path, queue, context)
        except grpc.aio.AbortError:
            status = context.status or (Code.UNKNOWN, "", ())
        except asyncio.CancelledError:
            status = (Code.UNAVAILABLE, "The server is going away.", ())
        except Exception as error:
            status = (Code.UNKNOWN, f"Unexpected {error!r}", ())
        finally:
            self._calls.pop(number, None)
        self._end.send(("end", number, reply, *status))

    async def _handle(
        self, number: int, path: str, queue: asyncio.Queue[Any], context: Context
    ) -> bytes | None:
        """The reply, where there is one, not a stream."""
        handler = await self._server.handler(path)
        if handler is None:
            await context.abort(Code.UNIMPLEMENTED, f"Method not found: {path}")

        serialised: Callable[[Any], bytes] = handler.response_serializer

        def send(reply: Any) -> None:
            self._end.send(("msg", number, serialised(reply)))

        async def requests() -> AsyncIterator[Any]:
            while (data := await queue.get()) is not EOF:
                yield handler.request_deserializer(data)

        if handler.request_streaming:
            request: Any = requests()
            if not handler.response_streaming:
                return serialised(await handler.stream_unary(request, context))
            served = handler.stream_stream(request, context)
        else:
            request = handler.request_deserializer(await queue.get())
            if not handler.response_streaming:
                return serialised(await handler.unary_unary(request, context))
            served = handler.unary_stream(request, context)
        try:
            async for reply in served:
                send(reply)
        finally:
            await served.aclose()
        return None
