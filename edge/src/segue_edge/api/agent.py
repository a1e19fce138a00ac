"""`Agent` on an edge node."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import structlog

from segue_contract.checks import check_tails
from segue_contract.errors import OutcomeUnknown, StaleEpoch, Unreachable
from segue_contract.identity.principal import Kind, Right
from segue_contract.ids import SessionName, check_id
from segue_contract.limits import EXPORT_TIMEOUT_S, RPC_TIMEOUT_S, TURN_HEARTBEAT_S
from segue_contract.transport.bearer import bearer
from segue_contract.transport.gate import caller, caller_token, gate_here, named, renew_calls
from segue_contract.transport.heartbeat import Listening, beating
from segue_contract.transport.status import error_from_rpc
from segue_contract.turn.wire import to_wire
from segue_contract.v1 import agent_pb2 as pb
from segue_contract.v1 import agent_pb2_grpc
from segue_edge.api.tails import JoinedTails
from segue_edge.turns.asked import Asked, Shown
from segue_edge.turns.history import HistoryCache
from segue_edge.turns.offline.outbox import Outbox
from segue_edge.turns.registry import TurnRegistry
from segue_edge.uplink.attempts import at_some_cloud
from segue_edge.uplink.clouds import Cloud, CloudSet

log = structlog.get_logger("segue.api")


# Where no session is meant: its clouds are as good as any.
_ANY = "any"


class AgentService(agent_pb2_grpc.AgentServicer):
    """`RunTurn` starts or joins a turn of this node; the other methods go to the session's cloud,
    and the cloud's errors come back with their own type."""

    def __init__(
        self,
        registry: TurnRegistry,
        clouds: CloudSet,
        histories: HistoryCache,
        outbox: Outbox,
        *,
        instance: str,
        model: str,
        context: int,
    ) -> None:
        self._registry = registry
        self._clouds = clouds
        self._histories = histories
        self._outbox = outbox
        self._instance = instance
        self._model = model
        self._context = context
        self._attached: set[Listening] = set()
        self._tails = JoinedTails(
            lambda session: clouds.best(named(session)).target, self._ask_tails, instance
        )

    def close(self) -> None:
        """End what would go on for ever; its devices ask elsewhere."""
        self._tails.close()
        for call in list(self._attached):
            call.cancel()

    # -- turns ---------------------------------------------------------------------------------

    def RunTurn(self, request: pb.RunTurnRequest, context: Any) -> AsyncIterator[pb.TurnEvent]:
        session = named(request.session)

        def beat() -> pb.TurnEvent:
            run = self._registry.running(session, request.turn)
            stalled = run is not None and run.stalled
            return pb.TurnEvent(heartbeat=pb.Heartbeat(stalled=stalled))

        return beating(self._run_turn(request), beat, every_s=TURN_HEARTBEAT_S)

    async def _run_turn(self, request: pb.RunTurnRequest) -> AsyncIterator[pb.TurnEvent]:
        asked = Asked.of(request, caller().tenant, _shown())
        if request.must_exist:
            await self._outbox.settled(asked.key)
        feed = self._registry.run_or_join(asked)
        async for event in feed.read(request.from_index):
            yield to_wire(event)

    async def Prepare(self, request: pb.PrepareRequest, context: Any) -> pb.PrepareReply:
        reply: pb.PrepareReply = await self._ask("Prepare", request, request.session)
        return reply

    async def StopTurn(self, request: pb.StopTurnRequest, context: Any) -> pb.StopTurnReply:
        run = self._registry.offline_turn(named(request.session), request.turn)
        if run is not None:
            run.stop()
            return pb.StopTurnReply(stopping=True, turn=run.asked.turn)
        reply: pb.StopTurnReply = await self._ask("StopTurn", request, request.session)
        return reply

    async def DismissTurns(
        self, request: pb.DismissTurnsRequest, context: Any
    ) -> pb.DismissTurnsReply:
        session = named(request.session)
        device = check_id(request.device, "device")
        dismissed = await self._outbox.dismiss(session, device, frozenset(request.turns))
        return pb.DismissTurnsReply(dismissed=dismissed)

    # -- sessions ------------------------------------------------------------------------------

    async def OpenSession(
        self, request: pb.OpenSessionRequest, context: Any
    ) -> pb.OpenSessionReply:
        reply: pb.OpenSessionReply
        try:
            reply = await self._ask("OpenSession", request, request.session)
        except Unreachable:
            reply = self._open_offline(request)
        else:
            history = self._histories.of(named(request.session))
            history.tenant = reply.tenant
            if reply.created:
                history.created(reply.tail.generation)
        reply.role = "edge"
        reply.instance = self._instance
        reply.max_context_tokens = self._context
        kept = self._outbox.of(named(request.session))
        reply.offline_turns.extend(turn.listed() for turn in kept)
        return reply

    def _open_offline(self, request: pb.OpenSessionRequest) -> pb.OpenSessionReply:
        """A session that this node knows goes on without the cloud; any other cannot."""
        history = self._histories.find(named(request.session))
        if history is None or not history.known:
            raise Unreachable(
                f"No cloud can be reached, and this edge does not know session {request.session}.",
                hint="Check the cloud (`segue doctor`) and try again.",
            )
        return pb.OpenSessionReply(
            session=request.session,
            tail=pb.Cursor(generation=history.generation, offset=0),
            model=self._model,
            tenant=history.tenant,
        )

    async def ListSessions(
        self, request: pb.ListSessionsRequest, context: Any
    ) -> pb.ListSessionsReply:
        reply: pb.ListSessionsReply = await self._ask("ListSessions", request, _ANY)
        return reply

    async def DeleteSession(
        self, request: pb.DeleteSessionRequest, context: Any
    ) -> pb.DeleteSessionReply:
        reply: pb.DeleteSessionReply = await self._ask("DeleteSession", request, request.session)
        self._histories.forget(named(request.session))
        return reply

    async def ExpireSessions(
        self, request: pb.ExpireSessionsRequest, context: Any
    ) -> pb.ExpireSessionsReply:
        reply: pb.ExpireSessionsReply = await self._ask("ExpireSessions", request, _ANY)
        for session in reply.deleted:
            self._histories.forget(SessionName(caller().tenant, session))
        return reply

    async def ExportSession(
        self, request: pb.ExportSessionRequest, context: Any
    ) -> AsyncIterator[pb.ExportPart]:
        cloud = self._clouds.best(named(request.session))
        await cloud.reach()
        call = cloud.agent.ExportSession(
            request, timeout=EXPORT_TIMEOUT_S, metadata=bearer(caller_token())
        )
        try:
            async for part in call:
                yield part
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        finally:
            call.cancel()

    async def ImportSession(
        self, request_iterator: AsyncIterator[pb.ImportPart], context: Any
    ) -> pb.ImportSessionReply:
        # The gate judges the stream by its first part. Were that refused while a call reads the
        # parts, gRPC would cancel the call and drop the reason.
        parts = aiter(request_iterator)
        first = await anext(parts, None)
        cloud = self._clouds.best(named(_ANY))
        await cloud.reach()
        call = cloud.agent.ImportSession(
            _joined(first, parts), timeout=EXPORT_TIMEOUT_S, metadata=bearer(caller_token())
        )
        try:
            reply: pb.ImportSessionReply = await call
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        finally:
            call.cancel()
        return reply

    # -- the log -------------------------------------------------------------------------------

    def Attach(self, request: pb.AttachRequest, context: Any) -> AsyncIterator[pb.AttachEvent]:
        return beating(self._attach(request), lambda: pb.AttachEvent(heartbeat=pb.Heartbeat()))

    async def _attach(self, request: pb.AttachRequest) -> AsyncIterator[pb.AttachEvent]:
        cloud = self._clouds.best(named(request.session))
        await cloud.reach()
        call = Listening(
            cloud.agent.Attach(request, metadata=bearer(caller_token())),
            patient=lambda: cloud.carries_kv,
        )
        self._attached.add(call)
        try:
            async for event in call:
                yield event
        except Unreachable as error:
            cloud.failed(error)
            raise
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise Unreachable("This edge is shutting down.", hint="Attach elsewhere.") from None
        finally:
            self._attached.discard(call)
            call.cancel()

    async def Read(self, request: pb.ReadRequest, context: Any) -> pb.ReadReply:
        reply: pb.ReadReply = await self._ask("Read", request, request.session)
        return reply

    async def Nodes(self, request: pb.NodesRequest, context: Any) -> pb.NodesReply:
        reply: pb.NodesReply = await self._ask("Nodes", request, _ANY)
        return reply

    async def Renew(self, request: pb.RenewRequest, context: Any) -> pb.RenewReply:
        """Here, and at the clouds, where this node makes calls for the device."""
        calls = renew_calls()
        who = caller()
        if who.kind is Kind.DEVICE and Right.SEND in who.rights:
            self._registry.renew(who.tenant, who.name, _shown(), who.may_see)
        for cloud in self._clouds.clouds.values():
            if not cloud.healthy:
                continue
            try:
                renewing = cloud.agent.Renew(
                    request, timeout=RPC_TIMEOUT_S, metadata=bearer(caller_token())
                )
                await renewing
            except grpc.aio.AioRpcError as error:  # its streams of this device end, and come anew
                log.warning("not_renewed", cloud=cloud.target, error=str(error_from_rpc(error)))
        return pb.RenewReply(calls=calls)

    async def Revoke(self, request: pb.RevokeRequest, context: Any) -> pb.RevokeReply:
        one = not request.session.endswith("*")
        reply: pb.RevokeReply = await self._ask("Revoke", request, request.session if one else _ANY)
        gate_here().revoke(
            caller().tenant, request.session, request.revoked, reply.before_ms / 1000
        )
        return reply

    async def Tails(self, request: pb.TailsRequest, context: Any) -> pb.TailsReply:
        check_tails(request.device, request.sessions)
        return await self._tails.tails(request.sessions)

    async def _ask_tails(self, request: pb.TailsRequest) -> pb.TailsReply:
        reply: pb.TailsReply = await self._ask("Tails", request, request.sessions[0])
        return reply

    async def Append(self, request: pb.AppendRequest, context: Any) -> pb.AppendReply:
        """A cloud may take the ops and die before it says so: then the next one is asked. Where the
        log knows the writer no more by then, nobody can say what became of them."""
        tries: list[str] = []
        try:
            reply: pb.AppendReply = await self._ask("Append", request, request.session, tries)
        except StaleEpoch as error:
            if len(tries) > 1:
                raise OutcomeUnknown(
                    "The log forgot this writer, and an earlier attempt may have arrived.",
                    hint="Read the log: the ops may be in it. Then open the session again.",
                ) from error
            raise
        return reply

    async def _ask(
        self, method: str, request: Any, session: str, tries: list[str] | None = None
    ) -> Any:
        """One idempotent call at the session's cloud, at the next one where that is gone or full.

        Args:
            tries: gets the address of each cloud that was asked.

        Raises:
            SegueError: the cloud's own error, or Unreachable where none answers.
        """

        async def call(cloud: Cloud) -> Any:
            if tries is not None:
                tries.append(cloud.target)
            try:
                ask = getattr(cloud.agent, method)
                return await ask(request, timeout=RPC_TIMEOUT_S, metadata=bearer(caller_token()))
            except grpc.aio.AioRpcError as error:
                raise error_from_rpc(error) from error

        return await at_some_cloud(self._clouds, named(session), call)


def _shown() -> Shown:
    """The caller's token."""
    return Shown(caller_token(), caller().expires_s)


async def _joined(
    first: pb.ImportPart | None, rest: AsyncIterator[pb.ImportPart]
) -> AsyncIterator[pb.ImportPart]:
    if first is not None:
        yield first
    async for part in rest:
        yield part
