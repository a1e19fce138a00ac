"""The nodes a client may talk to, in order of preference, and calls that survive one of them.

All calls of the device API are idempotent (a turn by its id, an append by its sequence numbers),
so a call whose answer was lost may be repeated at the next node. A node that says nothing though
its connection stands (its process hangs, its network is gone) is as good as lost: see
`segue_contract.transport.heartbeat`.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from segue._access import Access
from segue._connecting import HEALTH_METHOD, SERVING, Node, connected
from segue._failures import (
    being_cancelled,
    client_closed,
    is_answer,
    is_link_loss,
    is_refusal,
    pauses,
    ran_out,
    typed,
)
from segue.options import Options, passed
from segue_contract.errors import (
    InvalidArgument,
    SegueError,
    Unreachable,
)
from segue_contract.limits import (
    ADDRESS_RETRY_S,
    CONNECT_TIMEOUT_S,
    MAX_ADDRESSES,
    RETRY_PAUSE_MAX_S,
    RPC_TIMEOUT_S,
)
from segue_contract.transport.heartbeat import answered
from segue_contract.transport.together import end
from segue_contract.v1 import agent_pb2_grpc

EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]


@dataclass(slots=True)
class _Shared:
    """What all `Nodes` with the same channels know."""

    closed: bool = False
    files_were_good: bool = False


class Nodes:
    """Channels to a list of addresses. Not thread-safe; one event loop."""

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        access: Access = Access(),
        options: Options = Options(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not addresses:
            raise InvalidArgument("No address was given.", hint="Write host:port of a node.")
        if len(addresses) > MAX_ADDRESSES:
            raise InvalidArgument(
                f"{len(addresses)} addresses were given; {MAX_ADDRESSES} are allowed."
            )
        self._nodes = [Node(access.check(address)) for address in dict.fromkeys(addresses)]
        self._spare: dict[str, Node] = {}  # measured, or preferred before
        self._access = access
        self._clock = clock
        self._shared = _Shared()
        self.options = options
        self.tries = 0  # attempts of unary calls so far
        self.unanswered = 0  # of these: the node said nothing of what became of them

    def with_options(self, options: Options) -> Nodes:
        """The same channels under other options."""
        twin = copy.copy(self)
        twin.options = options
        return twin

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
    def closed(self) -> bool:
        return self._shared.closed

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

    # -- other addresses than those that were given: see `segue._finding` --------------------------
    def node_at(self, address: str) -> Node:
        """The node there, preferred or not; a new one where it is not known.

        Raises:
            InvalidArgument: no channel may be opened to it.
        """
        known = [one for one in (*self._nodes, *self._spare.values()) if one.address == address]
        if known:
            return known[0]
        node = self._spare[address] = Node(self._access.check(address))
        return node

    async def round_trip_s(self, node: Node) -> float:
        """Of a small call over a connection that stands. Raises Unreachable: it does not serve."""
        await self.stub(node)
        assert node.channel is not None
        ask = node.channel.unary_unary(HEALTH_METHOD, None, None)
        began = self._clock()
        async with self.calling(node):
            reply = await ask(b"", timeout=CONNECT_TIMEOUT_S)
        if reply != SERVING:
            raise Unreachable(f"{node.address} does not serve now.", address=node.address)
        return self._clock() - began

    async def prefer(self, addresses: Sequence[str]) -> None:
        """These in this order from now on. What runs at others goes on there."""
        chosen = [self.node_at(address) for address in addresses[:MAX_ADDRESSES]]
        self._spare |= {one.address: one for one in self._nodes}
        for one in chosen:
            self._spare.pop(one.address, None)
        self._nodes[:] = chosen

    async def forget_spares(self) -> None:
        """Close what is not preferred any more, and where nothing runs."""
        for node in list(self._spare.values()):
            if not node.busy:
                del self._spare[node.address]
                await self._let_go(node)

    async def _let_go(self, node: Node) -> None:
        if node.reviving is not None:
            await end(node.reviving)
        await self._disconnect(node)

    async def stub(self, node: Node) -> Any:
        """The `Agent` stub of a connected node.

        Raises:
            Unreachable: it refuses, or does not answer in time; or certificates that were good
                cannot be used now.
            InvalidArgument: they never could.
        """
        if self._shared.closed:
            raise client_closed()
        if node.channel is not None and self._outdated(node):
            await self._disconnect(node)
        connect_s = self.options.timeout.connect or CONNECT_TIMEOUT_S
        try:
            if node.channel is None:
                node.files = self._access.stamp()
                node.channel = self._channel(node.address)
                node.stub = agent_pb2_grpc.AgentStub(node.channel)  # type: ignore[no-untyped-call]
            async with asyncio.timeout(connect_s):
                await connected(node.channel)
        except (TimeoutError, Unreachable) as error:
            await self.failed(node)
            if isinstance(error, TimeoutError):
                raise Unreachable(
                    f"Nothing answered at {node.address} within {connect_s:g} s.",
                    hint="Check the address, and the network between (`segue doctor`).",
                    address=node.address,
                    timeout="connect",
                    limit_s=connect_s,
                ) from error
            if error.hint:
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
            if not self._shared.files_were_good:
                raise
            raise Unreachable(error.message, hint=error.hint or "Try again.") from error
        self._shared.files_were_good = True
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
        if node.reviving is None and not self._shared.closed:
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
                await connected(channel)
        except Exception:  # also what the app's token function raises
            return False
        else:
            return True
        finally:
            if channel is not None:
                with contextlib.suppress(Exception):
                    await channel.close(None)

    async def connect(self, *, last: Collection[str] = ()) -> Node:
        """The first node that can be reached; those at the addresses `last` after all others.

        Raises:
            Unreachable: none can.
        """
        lost: Unreachable | None = None
        for node in sorted(self.order(), key=lambda node: node.address in last):
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
            if ran_out(failure):
                self._access.refused()
            if failure is error:
                raise
            raise failure from error

    async def unary(self, method: str, request: Any, *, patience_s: float = 0.0) -> Any:
        """One call at the first node that answers and has room; repeated at the pace that refusals
        ask for, as often as `options` say, or for `patience_s` where they say nothing.

        Raises:
            DeadlineExceeded: it took longer than `options` allow.
            SegueError: what the node answered, or Unreachable.
        """
        total_s = self.options.timeout.total
        if total_s is None:
            return await self._unary(method, request, patience_s)
        try:
            async with asyncio.timeout(total_s):
                return await self._unary(method, request, patience_s)
        except TimeoutError as error:
            raise passed(
                "total",
                total_s,
                f"{method} was not answered",
                "It may have been done. Try again, or with more time: with_options(timeout=...).",
            ) from error

    async def _unary(self, method: str, request: Any, patience_s: float) -> Any:
        began = self._clock()
        next_pause = pauses()
        retries = 0
        while True:
            try:
                return await self._first_with_room(method, request)
            except SegueError as error:
                asked_s = error.retry_after_s or 0.0
                pause = max(next_pause(), self.full_s, asked_s if not is_refusal(error) else 0.0)
                if not self._repeats(error, retries, pause, began, patience_s):
                    raise
            retries += 1
            await asyncio.sleep(pause)

    def _repeats(
        self, error: SegueError, retries: int, pause: float, began: float, patience_s: float
    ) -> bool:
        """Whether a call is made again, a pause after `error`."""
        if self.options.max_retries is None:
            elsewhere = is_refusal(error) or isinstance(error, Unreachable)
            return elsewhere and self._clock() + pause < began + patience_s
        total_s = self.options.timeout.total
        fits = total_s is None or self._clock() + pause < began + total_s
        return fits and self.options.may_repeat(error, retries)

    async def _first_with_room(self, method: str, request: Any) -> Any:
        """One round over the nodes.

        Raises:
            SegueError: what a node answered; where none took the call the first refusal, else
                Unreachable.
        """
        refusal: SegueError | None = None
        lost: SegueError | None = None
        for node in self.order():
            tries = self.tries
            try:
                async with self.calling(node):
                    stub = await self.stub(node)
                    self.tries += 1
                    return await self._ask(node, getattr(stub, method), request)
            except Unreachable as error:
                lost = error
                self.unanswered += self.tries > tries and not is_answer(error.__cause__)
            except SegueError as error:
                if not is_refusal(error):
                    raise
                refusal = refusal or error
        reason = refusal or lost
        assert reason is not None
        raise reason

    async def _ask(self, node: Node, method: Any, request: Any) -> Any:
        """One call; where another node could serve it, a silent one is not waited for.

        Raises:
            Unreachable: the node says nothing at all.
            AioRpcError: what became of the call.
        """
        call = node.keep(method(request, timeout=self.options.timeout.total or RPC_TIMEOUT_S))
        if len(self._nodes) == 1:
            return await call
        channel = node.channel
        assert channel is not None

        async def ping(timeout_s: float) -> None:
            await channel.unary_unary(HEALTH_METHOD, None, None)(b"", timeout=timeout_s)

        try:
            return await answered(call, ping)
        except Unreachable:
            await self.silent(node)
            raise

    def shows_another(self) -> bool:
        """A token was refused: whether the app renews it, so that the next one may be taken."""
        self._access.refused()
        return self._access.renews

    async def everywhere(self, method: str, request: Any) -> None:
        """One call at each node that is connected: what goes on may run at any of them.

        Raises:
            SegueError: why one of them did not take it; the others were asked as well.
        """
        failures: list[SegueError] = []

        async def ask(node: Node) -> None:
            try:
                async with self.calling(node):
                    await self._ask(node, getattr(node.stub, method), request)
            except SegueError as error:
                failures.append(error)

        known = (*self._nodes, *self._spare.values())
        await asyncio.gather(*(ask(node) for node in known if node.channel is not None))
        if failures:
            raise failures[0]

    async def close(self) -> None:
        self._shared.closed = True
        for node in (*self._nodes, *self._spare.values()):
            await self._let_go(node)
