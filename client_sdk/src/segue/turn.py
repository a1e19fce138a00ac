"""One turn as the device that asked for it sees it."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType

import grpc

from segue._connecting import Node
from segue._failures import (
    being_cancelled,
    client_closed,
    is_link_loss,
    is_refusal,
    pauses,
    ran_out,
    typed,
)
from segue._nodes import Nodes
from segue._reading import join_again
from segue._reply import ReplyView
from segue.events import Ended, Frame, Reply, Timing, TurnEvent
from segue.options import passed
from segue_contract.errors import (
    InvalidArgument,
    NotFound,
    SegueError,
    SessionBusy,
    TurnFailed,
    UnknownDevice,
    Unreachable,
)
from segue_contract.limits import (
    RPC_TIMEOUT_S,
    TAKEOVER_PREPARE_S,
    TURN_SILENCE_S,
    TURN_TIMEOUT_S,
    TURN_WAIT_TIMEOUT_S,
    ClientLimits,
)
from segue_contract.transport.heartbeat import EOF, Listening
from segue_contract.v1 import agent_pb2 as pb


class Turn:
    """Made by `Session.run`; use it with `async with`, and iterate over its events.

    Entering waits until the turn was accepted. From then on it runs to its end: leaving the block
    early, or losing the connection, never cancels it; `stop` does. Where the stream breaks, the
    turn is joined again, at the next address if need be, and goes on without a token lost or
    doubled. The next event tells `Rewound` where previews had to be taken back.

    Attributes:
        id: the turn's id in the session log.
        timing: what this device measured.
    """

    def __init__(
        self,
        nodes: Nodes,
        request: pb.RunTurnRequest,
        stop: Callable[[str], Awaitable[bool]],
        *,
        limits: ClientLimits = ClientLimits(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.id = request.turn
        self.timing = Timing()
        self._nodes = nodes
        self._request = request
        self._stop = stop
        self._limits = limits
        self._clock = clock
        self._view = ReplyView(request.turn)
        self._ready: deque[TurnEvent] = deque()
        self._node: Node | None = None
        self._call: Listening | None = None
        self._entered = False
        self._begun_at = 0.0
        self._lost_since: float | None = None
        self._next_pause = pauses()
        self._told: set[str] = set()  # timeouts of the whole turn that were raised
        self._refused: set[str] = set()  # addresses that were asked since the last pause
        self._refusal: SegueError | None = None  # of the last of them
        self._joined = False
        self._shown_again = False  # another token
        self._lost = False  # the node that served the turn died or fell silent
        self._offline_end: Ended | None = None  # while its settling is awaited
        self._retries = 0  # of asking for it, before it was accepted

    # -- what is known ----------------------------------------------------------------------------
    @property
    def text(self) -> str:
        """The reply so far."""
        return self._view.merger.text

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(self._view.merger.tokens)

    @property
    def durable_index(self) -> int:
        """Tokens of the reply, from the first on, that the session log holds."""
        return self._view.merger.durable_index

    @property
    def ended(self) -> Ended | None:
        return self._view.ended or self._offline_end

    @property
    def address(self) -> str:
        """The node that serves this turn to us now."""
        return self._node.address if self._node is not None else ""

    # -- running ----------------------------------------------------------------------------------
    async def __aenter__(self) -> Turn:
        """Start the turn and wait until it is accepted.

        Raises:
            SessionBusy: another turn runs, and `when_busy` is "refuse".
            Overloaded, PromptTooLong, UnknownModel, ...: what the node refused it for.
            Unreachable: no node could be reached.
            DeadlineExceeded: it took longer than `timeout` allows.
        """
        if self._entered:
            raise InvalidArgument("A turn runs once.", hint="Call session.run again.")
        self._entered = True
        self._begun_at = self._clock()
        try:
            await self._receive_in_time()
        except BaseException:
            self._drop()
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._drop()

    def __aiter__(self) -> Turn:
        return self

    async def __anext__(self) -> TurnEvent:
        """The next event; the last one is `Ended`.

        Raises:
            DeadlineExceeded: a `timeout` has passed. The turn runs on, and so may the iteration:
                `total` and `first_token` are told once, `idle` of each wait.
        """
        if not self._entered:
            raise InvalidArgument(
                "The turn was not started.", hint="Write `async with session.run(...) as turn`."
            )
        while not self._ready:
            if self._view.ended is not None:
                raise StopAsyncIteration
            await self._receive_in_time()
        return self._ready.popleft()

    async def settled(self) -> AsyncIterator[TurnEvent]:
        """What the log makes of a reply that ended out of its reach; for after its end.

        Where the log keeps what was shown: `Durable`, and an `Ended` that is durable. Where it has
        other tokens: `Rewound` and these first. Where it refused the message for good: `Ended` with
        the error. Nothing where the end was durable. It waits until the edge that served the turn
        has a cloud again, however long that takes: bound it with `asyncio.timeout`.
        """
        while (ended := self.ended) is not None and ended.pending:
            self._offline_end, self._lost_since = ended, None
            self._view.reopen()
            try:
                while self._view.ended is None or self._ready:
                    if not self._ready:
                        await self._receive()
                    event = self._ready.popleft()
                    if not (isinstance(event, Ended) and event.pending):
                        yield event
                        continue
                    # That node's own run of it has only just ended.
                    await asyncio.sleep(self._limits.retry_pause_s)
            except SegueError as error:
                if self._nodes.closed or not (error.retryable or isinstance(error, NotFound)):
                    raise
                if self._node is not None:  # another one may be the edge that keeps it
                    await self._nodes.failed(self._node)
                await asyncio.sleep(self._limits.retry_pause_s)
            finally:
                self._drop()

    async def result(self) -> Reply:
        """Wait for the end and return the whole reply.

        Raises:
            TurnFailed: the turn ended with an error; `fields["code"]` says which.
        """
        async for _ in self:
            pass
        ended = self._view.ended
        assert ended is not None
        if ended.error is not None:
            raise TurnFailed(ended.error.message, hint=ended.error.hint, **ended.error.fields)
        return Reply(self.id, self.text, self.tokens, ended.reason, ended.usage, ended.plan)

    async def stop(self) -> bool:
        """Cancel this turn, for everyone. False: it was not running (any more)."""
        return await self._stop(self.id)

    # -- its time ---------------------------------------------------------------------------------
    def _next_deadline(self) -> tuple[float, str, float] | None:
        """When the next timeout passes (by our clock), which one, and its seconds."""
        limits = self._nodes.options.timeout
        known = self._view.merger.next_index
        found = [
            (since + limit_s, name, limit_s)
            for since, name, limit_s in (
                (self._begun_at, "total", limits.total),
                (self._begun_at, "first_token", None if known else limits.first_token),
                # what its reader did meanwhile is none of the reply's
                (self._clock(), "idle", limits.idle if known else None),
            )
            if limit_s is not None and name not in self._told
        ]
        return min(found, default=None)

    async def _receive_in_time(self) -> None:
        deadline = self._next_deadline()
        if deadline is None:
            await self._receive()
            return
        at, name, limit_s = deadline
        try:
            async with asyncio.timeout(max(0.0, at - self._clock())):
                await self._receive()
        except TimeoutError as error:
            if name != "idle":  # which is each wait's own
                self._told.add(name)
            what = {"total": "had not ended", "first_token": "had no token", "idle": "went not on"}
            raise passed(
                name,
                limit_s,
                f"The turn {self.id} {what[name]}",
                "It runs on: iterate on, or join it with run(turn=...); stop() ends it.",
            ) from error

    # -- the stream -------------------------------------------------------------------------------
    async def _receive(self) -> None:
        """Wait until the wire brought at least one event, over however many streams."""
        while not self._ready and self._view.ended is None:
            try:
                if self._call is None:
                    self._call = await self._open()
                wire = await self._call.read()
            except (SegueError, grpc.aio.AioRpcError, asyncio.CancelledError) as error:
                silent = self._call is not None and self._call.silent
                self._drop()
                if being_cancelled():
                    raise
                await self._survive(error, silent=silent)
                continue
            if wire is EOF:
                self._drop()
                await self._survive(Unreachable("The turn's stream ended before the turn did."))
                continue
            await self._take(wire)

    async def _take(self, wire: pb.TurnEvent) -> None:
        known, started = self._view.merger.next_index, self._view.started
        now = self._clock() - self._begun_at
        for event in self._view.take(wire):
            if isinstance(event, Frame):
                self.timing.saw(now, event.next_index, event.made_by)
            self._ready.append(event)
        if self._view.started and not started:
            self._refused.clear()  # who had no room before may take it over
        if self._view.merger.next_index > known:
            self._lost = self._shown_again = False
            self._lost_since = None  # only tokens are progress: resuming has an end
            self._next_pause = pauses()
        if self._view.incomplete:
            self._drop()
            await self._survive(Unreachable("The turn's end came without all of its tokens."))
        elif self._view.ended is not None:
            self._drop()

    async def _open(self) -> Listening:
        """Run, or join, the turn at the node that is preferred now.

        Raises:
            Unreachable: none can be reached.
            SegueError: all that can be were asked since the last pause; the last one's answer.
        """
        self._node = None
        self._node = await self._nodes.connect(last=self._refused)
        if self._node.address in self._refused and self._refusal is not None:
            raise self._refusal
        stub = await self._nodes.stub(self._node)
        request = self._request
        if self._view.started:
            request = pb.RunTurnRequest()
            request.CopyFrom(self._request)
            request.from_index = self._view.resume_index
            request.lost = self._lost
            request.must_exist = self._offline_end is not None
            request.plan = ""  # it is made: whoever serves the rest need not be able to force it
        call = self._node.keep(stub.RunTurn(request, timeout=TURN_TIMEOUT_S + TURN_WAIT_TIMEOUT_S))
        return Listening(
            call,
            silence_s=TURN_SILENCE_S,
            others=len(self._nodes.order()) > 1,
            prepare=self._prepare,
        )

    async def _prepare(self, leaving: bool) -> None:
        """Let another node get ready for the turn. Raises SegueError where none can."""
        others = [node for node in self._nodes.order() if node is not self._node]
        request = pb.PrepareRequest(
            session=self._request.session,
            device=self._request.device,
            turn=self.id,
            leaving=leaving,
        )
        failure: SegueError = Unreachable("No other node can go on with the turn.")
        for node in others if self._view.started else []:
            try:
                async with self._nodes.calling(node):
                    stub = await self._nodes.stub(node)
                    reply = await stub.Prepare(request, timeout=TAKEOVER_PREPARE_S)
            except SegueError as error:
                failure = error
                continue
            if reply.ready:
                return
        raise failure

    def _drop(self) -> None:
        """Leave the stream; the turn goes on."""
        call, self._call = self._call, None
        if call is not None:
            call.cancel()

    async def _survive(self, error: BaseException, *, silent: bool = False) -> None:
        """Pause before another attempt; raise where none would help."""
        if self._nodes.closed:
            raise client_closed() from error
        failure = typed(error)
        accepted = self._view.started
        if not is_link_loss(error) and not (accepted and failure.retryable):
            await self._try_next_or_raise(failure)
            return
        if self._node is not None and is_refusal(failure):
            self._nodes.refused(self._node, failure)
        elif self._node is not None:
            await (self._nodes.silent if silent else self._nodes.failed)(self._node)
        self._lost = True
        now = self._clock()
        if self._lost_since is None:
            self._lost_since = now
        pause = max(self._next_pause(), self._nodes.full_s)
        if not accepted and self._nodes.options.max_retries is not None:
            if self._ends_round(failure):
                await self._ask_again(failure, pause)
            return
        bound_s = self._limits.resume_timeout_s if accepted else RPC_TIMEOUT_S / 4
        if now + pause - self._lost_since > bound_s:
            raise self._give_up(failure) from error
        await asyncio.sleep(pause)

    def _ends_round(self, failure: SegueError) -> bool:
        """Whether every node was asked, or cannot be reached, now that ours gave `failure`."""
        node = self._node
        again = node is None or node.address in self._refused
        if node is not None:
            self._refused.add(node.address)
            self._refusal = failure
        over = again or all(one.address in self._refused for one in self._nodes.order())
        if over:
            self._refused.clear()
        return over

    async def _ask_again(self, failure: SegueError, pause_s: float) -> None:
        """Pause, as often as the options allow and in their time; else raise `failure`."""
        options = self._nodes.options
        left_s = self._begun_at + (options.timeout.total or math.inf) - self._clock()
        if isinstance(failure, SessionBusy) or pause_s >= left_s:
            raise failure
        if not options.may_repeat(failure, self._retries):
            raise failure
        self._retries += 1
        await asyncio.sleep(pause_s)

    async def _try_next_or_raise(self, failure: SegueError) -> None:
        """Where one node has no room, or no engine any more, another may have one; each is asked
        once. A device that the log forgot meanwhile joins the session again, once; one whose token
        ran out, and whose app renews it, shows the next one."""
        if ran_out(failure) and not self._shown_again and self._nodes.shows_another():
            self._shown_again = True
            return
        if isinstance(failure, UnknownDevice) and not self._joined:
            self._joined = True
            await join_again(self._nodes, self._request.session, self._request.device)
            return
        if not is_refusal(failure) or self._node is None:
            if self._view.started:
                raise failure
            await self._ask_again(failure, max(self._next_pause(), failure.retry_after_s or 0.0))
            return
        self._nodes.refused(self._node, failure)
        if self._ends_round(failure):
            if self._view.started:
                raise failure
            await self._ask_again(failure, max(self._next_pause(), self._nodes.full_s))

    def _give_up(self, failure: SegueError) -> SegueError:
        if not self._view.started:
            return failure
        return Unreachable(
            f"The turn {self.id} could not be joined again: {failure.message}",
            hint="It runs on; read the session's log when a node is back.",
            turn=self.id,
        )
