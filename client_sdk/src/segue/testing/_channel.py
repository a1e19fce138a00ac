"""A gRPC channel to a node in the same process: messages are serialised as on a wire, and what ends
a call ends it as there. No sockets, no threads."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator
from typing import Any, Protocol

import grpc

from segue_contract.errors import SegueError
from segue_contract.transport.status import ERROR_KEY, as_segue_error, status_code
from segue_contract.transport.together import end

EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]
State = grpc.ChannelConnectivity


class Serving(Protocol):
    """The node at the other end."""

    @property
    def reachable(self) -> bool: ...

    def handle(self, path: str, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The replies to one call. Raises SegueError: what the call ends with."""
        ...


class MemoryCall:
    """One call as its caller holds it: awaitable where the reply is one message, else readable."""

    def __init__(
        self, replies: AsyncIterator[bytes], parse: Callable[[bytes], Any], timeout: float | None
    ) -> None:
        self._parse = parse
        self._received: deque[bytes] = deque()
        self._status: BaseException | None = None
        self._ended = False
        self._changed = asyncio.Event()
        self._task = asyncio.create_task(self._run(replies, timeout), name="fake call")

    async def _run(self, replies: AsyncIterator[bytes], timeout: float | None) -> None:
        try:
            async with asyncio.timeout(timeout):
                async for data in replies:
                    self._received.append(data)
                    self._changed.set()
        except TimeoutError:
            self._finish(_failure(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded"))
        except asyncio.CancelledError:
            self._finish(asyncio.CancelledError())
            raise
        except grpc.aio.AioRpcError as error:
            self._finish(error)
        except Exception as error:
            self._finish(_failure_of(as_segue_error(error)))
            if not isinstance(error, SegueError):
                raise  # a fault of the test's own script: let asyncio tell of it
        else:
            self._finish(None)

    def _finish(self, status: BaseException | None) -> None:
        if not self._ended:
            self._ended, self._status = True, status
        self._changed.set()

    async def read(self) -> Any:
        """The next message, or EOF. Raises AioRpcError; CancelledError where it was cancelled."""
        while not self._received and not self._ended:
            self._changed.clear()
            try:
                await self._changed.wait()
            except asyncio.CancelledError:
                self.cancel()
                raise
        if self._received:
            return self._parse(self._received.popleft())
        if self._status is not None:
            raise self._status
        return EOF

    def __await__(self) -> Generator[Any, None, Any]:
        return self.read().__await__()

    async def __aiter__(self) -> AsyncIterator[Any]:
        while (message := await self.read()) is not EOF:
            yield message

    def cancel(self) -> bool:
        if self._ended:
            return False
        self._finish(asyncio.CancelledError())
        self._task.cancel()
        return True

    def lose(self) -> None:
        """The connection broke."""
        if not self._ended:
            self._finish(_failure(grpc.StatusCode.UNAVAILABLE, "Connection reset by peer"))
            self._task.cancel()

    def done(self) -> bool:
        return self._ended

    async def gone(self) -> None:
        """Its handler has ended, too."""
        await end(self._task)


class MemoryChannel:
    """As much of `grpc.aio.Channel` as the SDK uses; it is connected or refused at once."""

    def __init__(self, node: Serving) -> None:
        self._node = node
        self._calls: set[MemoryCall] = set()
        self._closed = False

    def unary_unary(self, path: str, request_serializer: Any = None,
                    response_deserializer: Any = None, **_: Any) -> Any:  # fmt: skip
        return self._method(path, request_serializer, response_deserializer)

    unary_stream = unary_unary

    def stream_unary(self, path: str, request_serializer: Any = None,
                     response_deserializer: Any = None, **_: Any) -> Any:  # fmt: skip
        return self._method(path, request_serializer, response_deserializer, streams=True)

    stream_stream = stream_unary

    def _method(self, path: str, serialise: Any, parse: Any, *, streams: bool = False) -> Any:
        serialise, parse = serialise or bytes, parse or bytes

        async def one(message: Any) -> AsyncIterator[bytes]:
            yield serialise(message)

        async def many(messages: AsyncIterator[Any]) -> AsyncIterator[bytes]:
            async for message in messages:
                yield serialise(message)

        def call(request: Any, *, timeout: float | None = None, **_: Any) -> MemoryCall:
            requests = many(request) if streams else one(request)
            made = MemoryCall(self._replies(path, requests), parse, timeout)
            self._calls = {old for old in self._calls if not old.done()} | {made}
            return made

        return call

    async def _replies(self, path: str, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        if self._closed or not self._node.reachable:
            raise _failure(grpc.StatusCode.UNAVAILABLE, "failed to connect: connection refused")
        async for data in self._node.handle(path, requests):
            yield data

    def lose(self) -> None:
        """Every call on it breaks."""
        for call in self._calls:
            call.lose()

    def get_state(self, try_to_connect: bool = False) -> State:
        if self._closed:
            return State.SHUTDOWN
        return State.READY if self._node.reachable else State.TRANSIENT_FAILURE

    async def close(self, grace: float | None = None) -> None:
        self._closed = True
        calls, self._calls = self._calls, set()
        for call in calls:
            call.cancel()
        for call in calls:
            await call.gone()


def _failure(code: grpc.StatusCode, details: str, data: bytes = b"") -> grpc.aio.AioRpcError:
    trailing = grpc.aio.Metadata(*(((ERROR_KEY, data),) if data else ()))
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details, None)


def _failure_of(error: SegueError) -> grpc.aio.AioRpcError:
    return _failure(status_code(error), str(error), error.to_bytes())
