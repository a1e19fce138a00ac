"""An offline turn on its way into the log, once a cloud is back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator

import grpc
import structlog

from segue_contract.errors import (
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    SessionBusy,
    SessionDeleted,
    UnknownDevice,
    UnknownSession,
    Unreachable,
)
from segue_contract.kv.layout import block_ids
from segue_contract.limits import RPC_TIMEOUT_S
from segue_contract.plan import Shape
from segue_contract.sync.state import decode_turns
from segue_contract.transport.bearer import bearer
from segue_contract.transport.status import error_from_rpc
from segue_contract.turn.events import Durable, Ended, Frame, MadeBy
from segue_contract.turn.merge import Merger
from segue_contract.turn.wire import from_reply
from segue_contract.v1 import agent_pb2 as pb
from segue_contract.v1 import decode_pb2 as dpb
from segue_edge.turns.cloud.begin import call_begin
from segue_edge.turns.history import HistoryCache
from segue_edge.turns.offline.turn import OfflineTurn
from segue_edge.uplink.attempts import at_some_cloud
from segue_edge.uplink.clouds import Cloud, CloudSet
from segue_edge.uplink.stream import TurnStream

log = structlog.get_logger("segue.outbox")

# Whether the log has the turn as it was shown.
Told = Callable[[OfflineTurn, bool], None]


class Delivery:
    """Puts offline turns into the log.

    Args:
        recipe: digest of this node's KV recipe.
        told: called when the log has a turn, and whether as this edge showed it.
    """

    def __init__(self, clouds: CloudSet, histories: HistoryCache, recipe: str, told: Told) -> None:
        self._clouds = clouds
        self._histories = histories
        self._recipe = recipe
        self._told = told

    async def deliver(self, offline: OfflineTurn) -> None:
        """Append the turn: Begin with its own id, its tokens, its end.

        A turn that the log has without an end is taken over with its tokens. Where the log has
        other tokens, or an end, the log's text stands. A session or a device that the log does not
        know (any more) is opened there first: what was said is not dropped for that.

        Raises:
            SessionDeleted: somebody deleted the session, and it stays deleted.
            SegueError: retryable ones leave the turn in the outbox.
        """
        session = offline.asked.session

        async def call(cloud: Cloud) -> bool:
            return await self._deliver_at(cloud, offline)

        same = await at_some_cloud(
            self._clouds, session, call, final=(SessionBusy, DeadlineExceeded)
        )
        self._histories.of(session).delivered(offline.asked.turn, same)
        self._told(offline, same)

    async def _deliver_at(self, cloud: Cloud, offline: OfflineTurn) -> bool:
        try:
            async with asyncio.timeout(RPC_TIMEOUT_S):
                if offline.begun:
                    with contextlib.suppress(NotFound):  # the log has lost it
                        return await self._take_over(cloud, offline)
            return await self._begin_and_send(cloud, offline)
        except TimeoutError as error:
            raise Unreachable("The cloud did not take an offline turn in time.") from error

    async def _begin_and_send(self, cloud: Cloud, offline: OfflineTurn) -> bool:
        """Begin may wait for the session's running turn; what follows has `RPC_TIMEOUT_S`."""
        try:
            reply = await self._begin(cloud, offline)
        except SessionDeleted:
            raise
        except (UnknownDevice, UnknownSession) as error:
            await _open_session(cloud, offline, there=isinstance(error, UnknownDevice))
            reply = await self._begin(cloud, offline)
        async with asyncio.timeout(RPC_TIMEOUT_S):
            if reply.joined:
                try:
                    return await self._take_over(cloud, offline)
                except PermissionDenied as error:
                    raise SessionBusy(
                        "Another edge runs the turn.", hint="It is read once it has ended."
                    ) from error
            return await self._send(cloud, offline, reply.epoch)

    async def _begin(self, cloud: Cloud, offline: OfflineTurn) -> dpb.BeginReply:
        history = self._histories.of(offline.asked.session)
        reply = await call_begin(cloud, offline.asked, history, follows=offline.follows)
        if not reply.joined:
            with _understood():
                turns = decode_turns(reply.turns)
            history.merge(reply.tail.generation, reply.first_turn, turns, reply.known_digest)
        return reply

    async def _send(self, cloud: Cloud, offline: OfflineTurn, epoch: int) -> bool:
        async with self._stream(cloud, offline, self._spec(offline, epoch)) as stream:
            tokens = dpb.EdgeTokens(index=0, tokens=offline.tokens, pieces=offline.pieces)
            stream.control(dpb.RunRequest(plan=dpb.PlanNote(plan=offline.plan)))
            if offline.tokens:
                stream.control(dpb.RunRequest(tokens=tokens))
            stream.control(_end_of(offline))
            return await self._read_to_the_end(stream, offline, ours=True)

    async def _take_over(self, cloud: Cloud, offline: OfflineTurn) -> bool:
        """End a turn that the log knows: with our tokens, unless the log goes on otherwise."""
        spec = self._spec(offline, 0)
        spec.takeover = True
        spec.known_tokens.extend(offline.tokens)
        async with self._stream(cloud, offline, spec) as stream:
            stream.control(dpb.RunRequest(plan=dpb.PlanNote(plan=offline.plan)))
            return await self._read_to_the_end(stream, offline, ours=False)

    async def _read_to_the_end(
        self, stream: TurnStream, offline: OfflineTurn, *, ours: bool
    ) -> bool:
        """Whether the log has the turn as it was shown. `ours`: our end was sent already."""
        merger = _shown(offline)
        in_log: int | None = None  # tokens that the log held as the cloud answered
        async for message in stream.replies():
            if message.WhichOneof("kind") == "opened":
                in_log = message.opened.next_index
                ours = ours or message.opened.attached  # then it ends the turn itself
            with _understood():
                event = from_reply(message)
                if isinstance(event, Frame):
                    merger.push(event)
            match event:
                case Durable() as notice:
                    merger.confirm(notice.next_index)
                case Ended() as ended:
                    if not ended.durable:
                        break
                    return _whose_text_stands(offline, merger, ended)
            if not ours and in_log is not None and merger.durable_index >= in_log:
                ours = True
                same = tuple(merger.tokens) == offline.tokens
                other = dpb.RunRequest(hand_over=dpb.HandOver(next_index=in_log))
                with contextlib.suppress(Unreachable):  # `replies` says why
                    stream.control(_end_of(offline) if same else other)
        raise Unreachable("The cloud closed the stream of an offline turn before its end.")

    def _stream(self, cloud: Cloud, offline: OfflineTurn, spec: dpb.TurnSpec) -> TurnStream:
        return TurnStream(cloud, spec, self._clouds.pacer, offline.asked.token)

    def _spec(self, offline: OfflineTurn, epoch: int) -> dpb.TurnSpec:
        request = offline.asked.request
        return dpb.TurnSpec(
            session=request.session,
            device=request.device,
            turn=request.turn,
            epoch=epoch,
            prompt=offline.prompt,
            blocks=block_ids(self._recipe, offline.prompt),
            recipe=self._recipe,
            max_tokens=request.max_tokens,
            sampling=request.sampling,
            stop=request.stop,
            shape=Shape.EDGE.value,
        )


@contextlib.contextmanager
def _understood() -> Iterator[None]:
    """Bytes that are no answer say nothing of the turn: it goes on waiting.

    Raises:
        Internal: in place of InvalidArgument, with which a cloud refuses a turn.
    """
    try:
        yield
    except InvalidArgument as error:
        raise Internal(f"The cloud's answer cannot be read: {error.message}") from error


def _shown(offline: OfflineTurn) -> Merger:
    merger = Merger()
    merger.push(Frame(0, 0, offline.tokens, offline.pieces, made_by=MadeBy.EDGE))
    return merger


async def _open_session(cloud: Cloud, offline: OfflineTurn, *, there: bool) -> None:
    request = offline.asked.request
    opening = pb.OpenSessionRequest(
        session=request.session, device=request.device, must_exist=there
    )
    try:
        await cloud.agent.OpenSession(
            opening, timeout=RPC_TIMEOUT_S, metadata=bearer(offline.asked.token)
        )
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from error


def _whose_text_stands(offline: OfflineTurn, merger: Merger, ended: Ended) -> bool:
    asked = offline.asked
    merger.end(ended.next_index)
    if tuple(merger.tokens) == offline.tokens and ended.next_index == len(offline.tokens):
        log.info("offline_turn_appended", session=asked.session.session, turn=asked.turn)
        return True
    log.warning(
        "offline_turn_differs",
        session=asked.session.session,
        turn=asked.turn,
        stands="the log's text, not the one that this edge showed",
        tokens_shown=len(offline.tokens),
        tokens_in_log=ended.next_index,
        end=ended.reason.value,
    )
    return False


def _end_of(offline: OfflineTurn) -> dpb.RunRequest:
    ended = dpb.EdgeEnded(reason=offline.reason, next_index=len(offline.tokens))
    return dpb.RunRequest(ended=ended)
