"""The nodes a client may talk to, in order of preference, and calls that survive one of them.

All calls of the device API are idempotent (a turn by its id, an append by its sequence numbers),
so a call whose answer was lost may be repeated at the next node. A node that says nothing though
its connection stands (its process hangs, its network is gone) is as good as lost: see
`segue_contract.transport.heartbeat`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from segue._access import Access
from segue_contract.errors import (
    EngineGone,
    InvalidArgument,
    Overloaded,
    SegueError,
    Unreachable,
)
from segue_contract.limits import (
    ADDRESS_RETRY_S,
    CONNECT_TIMEOUT_S,
    MAX_ADDRESSES,
    RETRY_PAUSE_MAX_S,
    RETRY_PAUSE_S,
    RPC_TIMEOUT_S,
)
from segue_contract.transport.heartbeat import answered
from segue_contract.transport.status import ERROR_KEY, concerns_tls, error_from_rpc
from segue_contract.transport.together import end
from segue_contract.v1 import agent_pb2_grpc

EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]

_HEALTH_METHOD = "/grpc.health.v1.Health/Check"

_LOST_CODES = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.INTERNAL,  # how gRPC reports a stream that was reset
        grpc.StatusCode.UNKNOWN,
    }
)


@dataclass(slots=True)
class Node:
    """One address. `failed_at` is a monotonic time; -inf: it did not fail lately.

    `full_until`, alike: it refused, and may have room by then.
    `reviving` runs while it counts as silent: until a new connection gets an answer.
    """

    address: str
    failed_at: float = float("-inf")
    full_until: float = float("-inf")
    channel: grpc.aio.Channel | None = None
    stub: Any = None
    reviving: asyncio.Task[None] | None = None
    files: tuple[object, ...] = ()  # the certificates as its channel was opened with them


def is_link_loss(error: BaseException) -> bool:
    """Whether the call failed on its way, so that another node may serve it.

    A typed error of the node itself is none, except where it says that it cannot reach the cloud.
    """
    if isinstance(error, Unreachable):
        return True
    if isinstance(error, asyncio.CancelledError):
        return True
    if not isinstance(error, grpc.aio.AioRpcError):
        return False
    metadata: Any = error.trailing_metadata() or ()
    if any(key == ERROR_KEY for key, _ in metadata):
        return isinstance(error_from_rpc(error), Unreachable)
    return error.code() in _LOST_CODES


def is_refusal(error: BaseException) -> bool:
    """Whether the node has no room for now, or no engine any more; another one may."""
    return isinstance(error, Overloaded | EngineGone)


def typed(error: BaseException) -> SegueError:
    """A failed call as an error of the tree."""
    if isinstance(error, SegueError):
        return error
    if isinstance(error, grpc.aio.AioRpcError) and not is_link_loss(error):
        return error_from_rpc(error)
    detail = ""
    if isinstance(error, grpc.aio.AioRpcError):
        found = error_from_rpc(error)
        if isinstance(found, Unreachable):
            return found
        detail = f" ({error.details()})"
    return Unreachable(
        f"The connection broke{detail}.",
        hint="Check that the node is running (`segue doctor`).",
    )


def being_cancelled() -> bool:
    """Whether the running task itself was cancelled.

    grpc.aio raises CancelledError also where the server (not we) cancelled the call.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def pauses() -> Callable[[], float]:
    """Doubling pauses, from `RETRY_PAUSE_S` to `RETRY_PAUSE_MAX_S`."""
    pause = RETRY_PAUSE_S / 2

    def next_pause() -> float:
        nonlocal pause
        pause = min(pause * 2, RETRY_PAUSE_MAX_S)
        return pause

    return next_pause


class Nodes:
    """Channels to a list of addresses. Not thread-safe; one event loop."""

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        access: Access = Access(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not addresses:
            raise InvalidArgument("No address was given.", hint="Write host:port of a node.")
        if len(addresses) > MAX_ADDRESSES:
            raise InvalidArgument(
                f"{len(addresses)} addresses were given; {MAX_ADDRESSES} are allowed."
            )
        self._nodes = [Node(access.check(address)) for address in dict.fromkeys(addresses)]
        self._access = access
        self._clock = clock
        self._closed = False
        self._files_were_good = False
        self.tries = 0  # attempts of unary calls so far

    def order(self) -> list[Node]:
        """By preference; those without room come later, the first to have some before the others.

        Then those that failed within `ADDRESS_RETRY_S`, longest ago first. A silent one is the very
        last, however long ago it fell silent.
        """
        now = self._clock()

        def doubt(node: Node) -> tuple[bool, float, float]:
            failed = node.failed_at if now - node.failed_at < ADDRESS_RETRY_S else float("-inf")
            full = node.full_until if now < node.full_until else float("-inf")
            return node.reviving is not None, failed, full

        return sorted(self._nodes, key=doubt)

    @property
    def full_s(self) -> float:
        """Seconds until a node may have room; 0 where one did not refuse lately."""
        return max(0.0, min(node.full_until for node in self._nodes) - self._clock())

    def refused(self, node: Node, error: SegueError) -> None:
        """It has no room: others come first for as long as it said."""
        wait_s = error.fields.get("retry_after_s")
        if not (isinstance(wait_s, int | float) and wait_s > 0):
            wait_s = ADDRESS_RETRY_S
        node.full_until = self._clock() + min(wait_s, RPC_TIMEOUT_S)

    async def stub(self, node: Node) -> Any:
        """The `Agent` stub of a connected node.

        Raises:
            Unreachable: it refuses, or does not answer within `CONNECT_TIMEOUT_S`; or certificates
                that were good cannot be used now.
            InvalidArgument: they never could.
        """
        if self._closed:
            raise Unreachable("The client is closed.", hint="Open a new segue.Client.")
        if node.channel is not None and self._outdated(node):
            await self._disconnect(node)
        try:
            if node.channel is None:
                node.files = self._access.stamp()
                node.channel = self._channel(node.address)
                node.stub = agent_pb2_grpc.AgentStub(node.channel)  # type: ignore[no-untyped-call]
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await _connected(node.channel)
        except (TimeoutError, Unreachable) as error:
            await self.failed(node)
            if isinstance(error, Unreachable) and error.hint:
                raise Unreachable(
                    f"{node.address}: {error.message}", hint=error.hint, address=node.address
                ) from error
            raise Unreachable(
                f"Nothing answers at {node.address}.",
                hint="Check the address, and that the node is running (`segue up`).",
                address=node.address,
            ) from error
        return node.stub

    def _channel(self, address: str) -> grpc.aio.Channel:
        """Certificates are replaced file by file: what does not fit together may, a moment later.

        Raises:
            InvalidArgument: the files cannot be used, and never could.
            Unreachable: they could.
        """
        try:
            channel = self._access.channel(address)
        except InvalidArgument as error:
            if not self._files_were_good:
                raise
            raise Unreachable(error.message, hint=error.hint or "Try again.") from error
        self._files_were_good = True
        return channel

    def _outdated(self, node: Node) -> bool:
        """Its connection is lost, and the certificates were replaced since it was opened."""
        assert node.channel is not None
        lost = node.channel.get_state() is not grpc.ChannelConnectivity.READY
        return lost and node.files != self._access.stamp()

    async def failed(self, node: Node) -> None:
        """Prefer other nodes for a while; a dead connection is replaced the next time.

        One that still stands (a single call was reset) stays: other calls run over it.
        """
        node.failed_at = self._clock()
        channel = node.channel
        if channel is None or channel.get_state() is grpc.ChannelConnectivity.READY:
            return
        await self._disconnect(node)

    async def silent(self, node: Node) -> None:
        """It says nothing, though its connection may stand: others come first until it answers."""
        node.failed_at = self._clock()
        await self._disconnect(node)
        if node.reviving is None and not self._closed:
            name = f"revive {node.address}"
            node.reviving = asyncio.create_task(self._revive(node), name=name)

    async def _disconnect(self, node: Node) -> None:
        channel, node.channel, node.stub = node.channel, None, None
        if channel is not None:
            with contextlib.suppress(Exception):
                await channel.close(None)

    async def _revive(self, node: Node) -> None:
        """Until it answers."""
        while True:
            if await self._answers(node.address):
                node.reviving = None
                return
            await asyncio.sleep(RETRY_PAUSE_MAX_S)

    async def _answers(self, address: str) -> bool:
        """A new connection is ready only once the other side spoke. Whatever fails is a no."""
        channel = None
        try:
            channel = self._channel(address)
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await _connected(channel)
        except Exception:  # also what the app's token function raises
            return False
        else:
            return True
        finally:
            if channel is not None:
                with contextlib.suppress(Exception):
                    await channel.close(None)

    async def connect(self) -> Node:
        """The first node that can be reached.

        Raises:
            Unreachable: none can.
        """
        lost: Unreachable | None = None
        for node in self.order():
            try:
                await self.stub(node)
            except Unreachable as error:
                lost = error
            else:
                return node
        assert lost is not None
        raise lost

    @contextlib.asynccontextmanager
    async def calling(self, node: Node) -> AsyncIterator[None]:
        """While inside, `node` is asked. One that cannot be reached, or has no room, comes after
        others from then on.

        Raises:
            Unreachable: the call failed on its way.
            SegueError: what the node answered.
        """
        try:
            yield
        except (Unreachable, grpc.aio.AioRpcError, asyncio.CancelledError) as error:
            if being_cancelled():
                raise
            if is_link_loss(error):
                await self.failed(node)
            failure = typed(error)
            if is_refusal(failure):
                self.refused(node, failure)
            if failure is error:
                raise
            raise failure from error

    async def unary(self, method: str, request: Any, *, patience_s: float = 0.0) -> Any:
        """One call at the first node that answers and has room; repeated for `patience_s` while
        none does, at the pace that refusals ask for.

        Raises:
            SegueError: what the node answered, or Unreachable.
        """
        give_up = self._clock() + patience_s
        next_pause = pauses()
        while True:
            refusal: SegueError | None = None
            lost: SegueError | None = None
            for node in self.order():
                try:
                    async with self.calling(node):
                        stub = await self.stub(node)
                        self.tries += 1
                        return await self._ask(node, getattr(stub, method), request)
                except Unreachable as error:
                    lost = error
                except SegueError as error:
                    if not is_refusal(error):
                        raise
                    refusal = refusal or error
            reason = refusal or lost
            assert reason is not None
            pause = max(next_pause(), self.full_s)
            if self._clock() + pause >= give_up:
                raise reason
            await asyncio.sleep(pause)

    async def _ask(self, node: Node, method: Any, request: Any) -> Any:
        """One call; where another node could serve it, a silent one is not waited for.

        Raises:
            Unreachable: the node says nothing at all.
            AioRpcError: what became of the call.
        """
        call = method(request, timeout=RPC_TIMEOUT_S)
        if len(self._nodes) == 1:
            return await call
        channel = node.channel
        assert channel is not None

        async def ping(timeout_s: float) -> None:
            await channel.unary_unary(_HEALTH_METHOD, None, None)(b"", timeout=timeout_s)

        try:
            return await answered(call, ping)
        except Unreachable:
            await self.silent(node)
            raise

    async def close(self) -> None:
        self._closed = True
        for node in self._nodes:
            if node.reviving is not None:
                await end(node.reviving)
            await self._disconnect(node)


async def _connected(channel: grpc.aio.Channel) -> None:
    """Wait until the channel is ready; a refused connection fails at once.

    Raises:
        Unreachable: with a hint where it is known what is wrong.
    """
    while True:
        state = channel.get_state(try_to_connect=True)
        if state is grpc.ChannelConnectivity.READY:
            return
        if state in (
            grpc.ChannelConnectivity.TRANSIENT_FAILURE,
            grpc.ChannelConnectivity.SHUTDOWN,
        ):
            raise await _why(channel)
        await channel.wait_for_state_change(state)


async def _why(channel: grpc.aio.Channel) -> Unreachable:
    """Why the last attempt to connect failed: only a call is told."""
    refused = Unreachable("The connection was refused.")
    try:
        await channel.unary_unary(_HEALTH_METHOD, None, None)(b"", timeout=CONNECT_TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        found = error_from_rpc(error)
        if isinstance(found, Unreachable) and concerns_tls(error.details() or ""):
            return found
    except grpc.aio.UsageError:  # closed meanwhile
        pass
    return refused
