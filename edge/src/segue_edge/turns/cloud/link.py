"""One attempt at a cloud: what its stream says, as signals of the turn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc

from segue_contract.errors import SegueError, Unreachable
from segue_contract.limits import RPC_TIMEOUT_S, TURN_SILENCE_S, TURN_TIMEOUT_S
from segue_contract.transport.bearer import bearer
from segue_contract.transport.heartbeat import Listening
from segue_contract.transport.status import error_from_rpc
from segue_contract.turn.wire import from_reply, from_wire
from segue_contract.v1 import agent_pb2 as pb
from segue_contract.v1 import decode_pb2 as dpb
from segue_edge.turns.asked import Asked
from segue_edge.turns.measure import Measure
from segue_edge.turns.state import signals as s
from segue_edge.uplink.clouds import Cloud
from segue_edge.uplink.stream import TurnStream

# Where KV was being written for a smaller part of the time than this, the prefill set the pace, and
# the bytes that arrived in it are no measure of the link.
_LINK_BOUND = 0.7

Emit = Callable[[s.Signal], None]
Prepare = Callable[[bool], Awaitable[object]]  # as of `Listening`


class CloudLink:
    """A `Decode.Run` stream. `run` reads it to its end and says how it ended.

    Attributes:
        opened: the cloud's answer to `open`.
    """

    def __init__(
        self,
        number: int,
        cloud: Cloud,
        stream: TurnStream,
        spec: dpb.TurnSpec,
        emit: Emit,
        measure: Measure,
        prepare: Prepare | None = None,
    ) -> None:
        self.cloud = cloud
        self.stream = stream
        self.opened: asyncio.Future[dpb.Opened] = asyncio.get_running_loop().create_future()
        self._number = number
        self._spec = spec
        self._emit = emit
        self._measure = measure
        self._prepare = prepare

    async def run(self) -> None:
        try:
            async with self.stream:
                replies = self.stream.replies(self._prepare)
                if self._spec.takeover:
                    self._take(await _soon(replies))
                async for message in replies:
                    self._take(message)
            self._broke(Unreachable("The cloud closed the turn's stream before its end."))
        except SegueError as error:
            self._broke(error)
        finally:
            if not self.opened.done():
                self.opened.cancel()

    def _broke(self, error: SegueError) -> None:
        if isinstance(error, Unreachable):
            self.cloud.failed(error)
        else:
            self.cloud.refused(error)
        self._emit(s.Broke(self._number, error, self.stream.slept))

    def _take(self, message: dpb.RunReply) -> None:
        number = self._number
        event = from_reply(message)
        if event is not None:
            self._emit(s.Logged(number, event))
            return
        match message.WhichOneof("kind"):
            case "opened":
                self._take_opened(message.opened)
            case "ready":
                self._take_ready(message.ready)
            case "stop":
                self._emit(s.StopNow(number))
            case _:
                pass  # a sign of life, or a kind of a later version

    def _take_opened(self, opened: dpb.Opened) -> None:
        self.cloud.take_facts(opened.facts)
        self._measure.cloud_cached_blocks = opened.have_blocks
        self._measure.mark("opened")
        if not self.opened.done():
            self.opened.set_result(opened)
        self._emit(
            s.Opened(
                self._number,
                opened.epoch,
                opened.next_index,
                attached=opened.attached,
                ships=self._spec.ship_blocks > 0,
            )
        )

    def _take_ready(self, ready: dpb.Ready) -> None:
        self._measure.mark("ready")
        self._emit(s.Ready(self._number))
        if ready.receive_s > 0:
            limited = self.stream.busy_s < _LINK_BOUND * ready.receive_s
            self.cloud.view.goodput.observe(
                ready.received_bytes, ready.receive_s, app_limited=limited
            )


async def _soon(replies: AsyncIterator[dpb.RunReply]) -> dpb.RunReply:
    """An instance that should take a turn over answers soon, or another one is asked."""
    try:
        async with asyncio.timeout(RPC_TIMEOUT_S):
            return await anext(replies)
    except TimeoutError as error:
        raise Unreachable("The cloud did not answer for the turn in time.") from error
    except StopAsyncIteration as error:
        raise Unreachable("The cloud closed the turn's stream at once.") from error


async def follow(
    number: int,
    cloud: Cloud,
    asked: Asked,
    from_index: int,
    emit: Emit,
    prepare: Prepare | None = None,
) -> None:
    """The turn as the log has it, read through `cloud`: signals, and at last how it broke.

    A further attempt (`number` 2 and beyond) says that the cloud before was lost.
    """
    again = pb.RunTurnRequest()
    again.CopyFrom(asked.request)
    again.from_index = from_index
    again.lost = again.lost or number > 1
    again.plan = ""  # the turn was planned where it began; a cloud could not force a plan
    try:
        call = cloud.agent.RunTurn(again, timeout=TURN_TIMEOUT_S, metadata=bearer(asked.token))
        heard = Listening(
            call,
            silence_s=TURN_SILENCE_S,
            patient=lambda: cloud.carries_kv,
            others=not cloud.alone,
            prepare=prepare,
        )
        try:
            async for message in heard:
                event = from_wire(message)
                if event is not None:
                    emit(s.Logged(number, event))
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        finally:
            heard.cancel()
        raise Unreachable("The cloud ended the stream of a turn early.")
    except SegueError as error:
        if isinstance(error, Unreachable):
            cloud.failed(error)
        emit(s.Broke(number, error))
