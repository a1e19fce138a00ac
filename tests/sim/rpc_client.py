"""`grpc.aio.insecure_channel`, simulated: calls and the connection under them.

Messages are serialised as on a real wire. Statuses, cancellation, deadlines, reconnection with
back-off and keep-alive follow gRPC; flow control is not modelled.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator
from typing import Any

import grpc

from tests.sim.loop import SimLoop
from tests.sim.network import End
from tests.sim.process import Process, current
from tests.sim.world import World

State = grpc.ChannelConnectivity
Code = grpc.StatusCode
EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]
_ATTEMPT_S = 2.0
_FIRST_PAUSE_S = 0.1


def failure(code: Code, details: str, trailing: tuple[Any, ...] = ()) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(
        code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), details=details
    )


def _as_it_is(message: Any) -> Any:
    """What gRPC does where it is given no serializer."""
    return message


class Call:
    """One call as its caller holds it: awaitable where the reply is one message, else readable."""

    _numbers = itertools.count(1)

    def __init__(
        self,
        channel: Channel,
        path: str,
        codec: tuple[Any, Any],
        *,
        single: bool,
        timeout: float | None,
        wait_for_ready: bool,
        request: Any = None,
    ) -> None:
        """`request`: the only one, which then goes with the opening of the call."""
        self.id = channel.next_id()
        self._channel = channel
        self._path = path
        self._serialise, self._parse = (one or _as_it_is for one in codec)
        self._single = single
        self._request = self._serialise(request) if request is not None else None
        self._out: list[tuple[Any, ...]] = []  # until there is a connection
        self._end: End | None = None
        self._received: deque[Any] = deque()
        self._waiters: deque[asyncio.Future[Any]] = deque()
        self._status: Exception | None = None  # why it ended; EOF where well
        self._ended = False
        self._well = False
        self._cancelled = False
        loop = channel.loop
        self._deadline = loop.call_later(timeout, self._late) if timeout is not None else None
        self._timeout = timeout
        self._opening = loop.create_task(self._open(wait_for_ready), name=f"call {path}")

    def __hash__(self) -> int:
        return self.id

    # -- the caller's side --------------------------------------------------------------------

    def __await__(self) -> Generator[Any, None, Any]:
        assert self._single
        reply = yield from self._read().__await__()
        return reply

    async def read(self) -> Any:
        return await self._read(at_end=EOF)

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._iterate()

    async def _iterate(self) -> AsyncIterator[Any]:
        while (message := await self._read(at_end=EOF)) is not EOF:
            yield message

    async def write(self, message: Any) -> None:
        if self._ended:
            raise self._status if self._status is not None else asyncio.InvalidStateError("ended")
        self._send("msg", self.id, self._serialise(message))
        await asyncio.sleep(0)

    async def done_writing(self) -> None:
        self._send("half", self.id)

    def cancel(self) -> bool:
        if self._ended:
            return False
        self._cancelled = True
        self._send("cancel", self.id)
        self._finish(failure(Code.CANCELLED, "Locally cancelled by application!"))
        return True

    def cancelled(self) -> bool:
        return self._cancelled

    def done(self) -> bool:
        return self._ended

    async def _read(self, *, at_end: Any = None) -> Any:
        while not self._received and not self._ended:
            waiter = self._channel.loop.create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                self.cancel()
                raise
        if self._received:
            return self._received.popleft()
        if self._well:
            if at_end is None:
                raise failure(Code.INTERNAL, "The call ended without a reply.")
            return at_end
        if self._cancelled:
            raise asyncio.CancelledError
        assert self._status is not None
        raise self._status

    # -- the wire's side ----------------------------------------------------------------------

    async def _open(self, wait_for_ready: bool) -> None:
        try:
            end = await self._channel.connection(wait_for_ready)
        except ConnectionError as error:
            self._finish(failure(Code.UNAVAILABLE, f"failed to connect: {error}"))
            return
        if self._ended:
            return
        self._end = end
        self._channel.calls[self.id] = self
        end.send(("open", self.id, self._path, self._request))
        for message in self._out:
            end.send(message)
        self._out.clear()

    def _send(self, *message: Any) -> None:
        if self._end is None:
            self._out.append(message)
        else:
            self._end.send(message)

    def took(self, data: bytes) -> None:
        self._received.append(self._parse(data))
        self._wake()

    def ended(self, code: Code, details: str, trailing: tuple[Any, ...]) -> None:
        if code is Code.OK:
            self._well = True
            self._finish(None)
        else:
            self._finish(failure(code, details, trailing))

    def lost(self) -> None:
        self._finish(failure(Code.UNAVAILABLE, "Connection reset by peer"))

    def _late(self) -> None:
        if not self._ended:
            self._send("cancel", self.id)
            self._finish(failure(Code.DEADLINE_EXCEEDED, "Deadline Exceeded"))

    def _finish(self, status: Exception | None) -> None:
        if self._ended:
            return
        self._ended, self._status = True, status
        self._channel.calls.pop(self.id, None)
        if self._deadline is not None:
            self._deadline.cancel()
        self._opening.cancel()
        self._wake()

    def _wake(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)


class Channel:
    """As grpc.aio.Channel: one connection, made on demand and again after a loss."""

    def __init__(self, world: World, target: str, options: Any = ()) -> None:
        process = current()
        assert process is not None
        given = dict(options or ())
        self.loop: SimLoop = world.loop
        self.calls: dict[int, Call] = {}
        self._world = world
        self._process: Process = process
        self._target = target
        self._most_pause_s = given.get("grpc.max_reconnect_backoff_ms", 1000) / 1000
        self._ping_every_s = given.get("grpc.keepalive_time_ms", 20_000) / 1000
        self._ping_timeout_s = given.get("grpc.keepalive_timeout_ms", 5_000) / 1000
        self._state = State.IDLE
        self._changed = asyncio.Event()
        self._end: End | None = None
        self._connecting: asyncio.Task[Any] | None = None
        self._pinging: asyncio.Task[Any] | None = None
        self._pong = 0.0
        self._ids = 0

    def next_id(self) -> int:
        self._ids += 1
        return self._ids

    # -- as grpc.aio.Channel ------------------------------------------------------------------

    def unary_unary(
        self, path: str, request_serializer: Any = None, response_deserializer: Any = None, **_: Any
    ) -> Callable[..., Call]:
        return self._method(path, (request_serializer, response_deserializer), True, True)

    def unary_stream(
        self, path: str, request_serializer: Any = None, response_deserializer: Any = None, **_: Any
    ) -> Callable[..., Call]:
        return self._method(path, (request_serializer, response_deserializer), True, False)

    def stream_unary(
        self, path: str, request_serializer: Any = None, response_deserializer: Any = None, **_: Any
    ) -> Callable[..., Call]:
        return self._method(path, (request_serializer, response_deserializer), False, True)

    def stream_stream(
        self, path: str, request_serializer: Any = None, response_deserializer: Any = None, **_: Any
    ) -> Callable[..., Call]:
        return self._method(path, (request_serializer, response_deserializer), False, False)

    def _method(
        self, path: str, codec: tuple[Any, Any], one_request: bool, one_reply: bool
    ) -> Callable[..., Call]:
        def call(
            request: Any = None,
            *,
            timeout: float | None = None,
            wait_for_ready: bool | None = None,
            **_: Any,
        ) -> Call:
            return Call(
                self, path, codec, single=one_reply, timeout=timeout,
                wait_for_ready=bool(wait_for_ready), request=request if one_request else None,
            )  # fmt: skip

        return call

    def get_state(self, try_to_connect: bool = False) -> State:
        if try_to_connect:
            self._want()
        return self._state

    async def wait_for_state_change(self, last: State) -> None:
        while self._state is last:
            await self._changed.wait()

    async def channel_ready(self) -> None:
        while self.get_state(try_to_connect=True) is not State.READY:
            await self._changed.wait()

    async def close(self, grace: float | None = None) -> None:
        self._move(State.SHUTDOWN)
        for task in (self._connecting, self._pinging):
            if task is not None:
                task.cancel()
        for call in list(self.calls.values()):
            call.cancel()
        if self._end is not None:
            self._end.close()

    # -- the connection -----------------------------------------------------------------------

    async def connection(self, wait_for_ready: bool) -> End:
        """Raises ConnectionError where there is none and the call does not wait for one."""
        while True:
            self._want()
            if self._state is State.READY and self._end is not None and self._end.open:
                return self._end
            if self._state is State.SHUTDOWN or (
                self._state is State.TRANSIENT_FAILURE and not wait_for_ready
            ):
                raise ConnectionRefusedError(self._target)
            await self._changed.wait()

    def _want(self) -> None:
        if self._state is State.IDLE:
            self._move(State.CONNECTING)
            self._connecting = self._process.start(self._connect(), f"connect {self._target}")

    def _move(self, state: State) -> None:
        if self._state is not State.SHUTDOWN:
            self._state = state
            self._changed.set()
            self._changed = asyncio.Event()

    async def _connect(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            began = self.loop.time()
            try:
                async with asyncio.timeout(_ATTEMPT_S):
                    end = await self._world.network.connect(self._process, self._target)
                break
            except (ConnectionError, TimeoutError):
                self._move(State.TRANSIENT_FAILURE)
                await asyncio.sleep(max(0.0, pause_s - (self.loop.time() - began)))
                pause_s = min(pause_s * 1.6, self._most_pause_s)
                self._move(State.CONNECTING)
        self._end = end
        end.on_message = self._took
        end.on_lost = self._lost
        self._move(State.READY)
        self._pinging = self._process.start(self._ping(end), f"ping {self._target}")

    async def _ping(self, end: End) -> None:
        while end.open:
            await asyncio.sleep(self._ping_every_s)
            asked = self.loop.time()
            end.send(("ping",))
            await asyncio.sleep(self._ping_timeout_s)
            if self._pong < asked and end.open:
                end.close()
                self._lost()

    def _took(self, message: tuple[Any, ...]) -> None:
        kind = message[0]
        if kind == "pong":
            self._pong = self.loop.time()
            return
        call = self.calls.get(message[1])
        if call is None:
            return
        if kind == "msg":
            call.took(message[2])
        else:
            _, _, reply, *status = message
            if reply is not None:
                call.took(reply)
            call.ended(*status)

    def _lost(self) -> None:
        self._end = None
        self._move(State.IDLE)
        for call in list(self.calls.values()):
            call.lost()
