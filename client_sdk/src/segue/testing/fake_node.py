"""A node in memory for apps' unit tests: scripted replies, faults on demand, no process, no socket.

The app runs through the SDK's own client, over calls that are serialised as on a wire.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Iterable
from types import TracebackType
from typing import Any, cast

import grpc

from segue._access import Access
from segue.client import Client
from segue.errors import InvalidArgument, SegueError, Unreachable
from segue.options import Timeout
from segue.testing._channel import MemoryChannel
from segue.testing._log import MemoryLog
from segue.testing._service import MemoryService
from segue.testing.script import Reply
from segue_contract.limits import ClientLimits
from segue_contract.sync.state import SessionState
from segue_contract.v1 import agent_pb2

ADDRESS = "localhost:7411"  # nothing listens there for it
_PREFIX = "/segue.v1.Agent/"
_VERBS = agent_pb2.DESCRIPTOR.services_by_name["Agent"].methods_by_name


class FakeNode:
    """`async with FakeNode(replies=["Hello!"]) as node: async with node.client("phone") as c: ...`

    All clients of one node are devices that see each other's changes, and belong to one event loop.

    Args:
        replies: what turns are answered, one after another: a text, a list of steps
            (`segue.testing.script`), or a function that makes one of these of the prompt. A turn
            for which none is left ends with an error.
        model: what the sessions say they are served with.

    Attributes:
        replies: those that are left; append to it.
        prompts: of all turns so far.
    """

    def __init__(self, replies: Iterable[Reply] = (), *, model: str = "fake") -> None:
        self.reachable = True
        self._service = MemoryService(list(replies), model)
        self.replies = self._service.replies
        self.prompts = self._service.prompts
        self._channels: list[MemoryChannel] = []
        self._clients: list[Client] = []
        self._failures: dict[str, list[SegueError]] = {}

    async def __aenter__(self) -> FakeNode:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End what runs, and its clients."""
        try:
            closed = (client.close() for client in self._clients)
            told = await asyncio.gather(*closed, return_exceptions=True)
        finally:
            await self._service.close()
        for error in told:
            if isinstance(error, BaseException):
                raise error

    def client(
        self,
        device: str = "",
        *,
        limits: ClientLimits = ClientLimits(),
        timeout: Timeout | float | None = None,
        max_retries: int | None = None,
    ) -> Client:
        """A client of this node; use it with `async with`. Arguments as those of `segue.Client`."""
        access = Access(open=self._channel)
        client = Client._over(
            access, [ADDRESS], device=device, limits=limits, timeout=timeout,
            max_retries=max_retries,
        )  # fmt: skip
        self._clients.append(client)
        return client

    def _channel(self, target: str, **_: Any) -> grpc.aio.Channel:
        channel = MemoryChannel(self)
        self._channels.append(channel)
        return cast("grpc.aio.Channel", channel)

    def state(self, session: str) -> SessionState:
        """What the session's log says now. Do not change it.

        Raises:
            InvalidArgument: there is no such session.
        """
        return self._log(session).state

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until it holds; it is asked whenever a log changes.

        await node.until(lambda: node.state("trip").values.get("city") == b"Paris")
        """
        while not condition():
            await self._service.changed.wait()

    # -- faults -----------------------------------------------------------------------------------
    def fail_next(self, verb: str, error: SegueError, *, times: int = 1) -> None:
        """The next call of `verb` is refused with `error`, before it does anything.

            node.fail_next("RunTurn", errors.Overloaded("Full.", retry_after_s=0.01))

        Args:
            verb: OpenSession, RunTurn, StopTurn, Read, Attach, Append, ListSessions, ...: as in the
                table of docs/security.md.

        Raises:
            InvalidArgument: the device API has no such verb.
        """
        if verb not in _VERBS:
            known = ", ".join(sorted(_VERBS))
            raise InvalidArgument(f"There is no verb {verb!r}.", hint=f"Use one of {known}.")
        self._failures.setdefault(verb, []).extend([error] * times)

    def break_connections(self) -> None:
        """All calls that run break; the next ones are served. Turns run on."""
        for channel in self._channels:
            channel.lose()

    def disconnect(self) -> None:
        """As `break_connections`, and nothing answers until `reconnect`."""
        self.reachable = False
        self.break_connections()

    def reconnect(self) -> None:
        self.reachable = True

    def lose_entries(self, session: str, count: int) -> None:
        """The last entries of a log are gone, as after a failover of its store: followers get a
        `Snapshot` that says what was lost."""
        self._log(session).lose(count)

    def _log(self, session: str) -> MemoryLog:
        if session not in self._service.logs:
            raise InvalidArgument(f"No device has opened a session {session!r}.")
        return self._service.logs[session]

    # -- as the other end of a channel ------------------------------------------------------------
    async def handle(self, path: str, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The replies to one call; see `segue.testing._channel`."""
        verb = path.removeprefix(_PREFIX)
        method = _VERBS.get(verb)
        if method is None:
            yield b""  # gRPC's health service: it serves
            return
        if self._failures.get(verb):
            raise self._failures[verb].pop(0)
        reads = _reader(method.input_type.name)
        handler: Any = getattr(self._service, verb)
        if method.client_streaming:
            yield (await handler(reads(data) async for data in requests)).SerializeToString()
            return
        request = reads(await anext(requests))
        if not method.server_streaming:
            yield (await handler(request)).SerializeToString()
            return
        async for reply in handler(request):
            if not self.reachable:
                raise Unreachable("The node went away.")
            yield reply.SerializeToString()


@functools.cache
def _reader(name: str) -> Callable[[bytes], Any]:
    read: Callable[[bytes], Any] = getattr(agent_pb2, name).FromString
    return read
