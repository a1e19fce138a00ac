"""`Decode`: what edge nodes call."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

from segue_cloud.engine.port import Engine
from segue_cloud.log.session_log import SessionLog
from segue_cloud.rpc.convert import cursor_message, owned_turn, turn_request
from segue_cloud.rpc.directory import EdgeDirectory
from segue_cloud.rpc.facts import FactsSource, edge_calling
from segue_cloud.rpc.history import first_unknown, known_digest
from segue_cloud.rpc.revoking import caller_bearer, revoked_since
from segue_cloud.rpc.run_stream import RunStream
from segue_cloud.tenants.trust import EdgeTrust
from segue_cloud.turns.intake import KvIntake
from segue_cloud.turns.manager import TurnManager
from segue_cloud.turns.owner import TurnOwner
from segue_cloud.turns.spec import OwnedTurn
from segue_cloud.turns.spot_checks import Shipped, SpotChecks
from segue_contract.errors import (
    BadBlock,
    BadRecipe,
    DeadlineExceeded,
    InvalidArgument,
    ModelMismatch,
    PermissionDenied,
    UnknownTurn,
)
from segue_contract.identity.principal import Kind
from segue_contract.ids import check_id
from segue_contract.kv.layout import KvBlock, block_ids
from segue_contract.limits import KV_BLOCK_TOKENS, RPC_TIMEOUT_S, TURN_HEARTBEAT_S
from segue_contract.model.manifest import Manifest
from segue_contract.plan import Shape
from segue_contract.sync.context import first_seen
from segue_contract.sync.state import TurnState, encode_turns, find_turn, without_unheard
from segue_contract.transport.channel import check_public_url
from segue_contract.transport.gate import caller, caller_is_late, expired, gate_here
from segue_contract.transport.heartbeat import beating
from segue_contract.turn.from_log import turn_events
from segue_contract.turn.wire import to_reply
from segue_contract.v1 import agent_pb2 as pb
from segue_contract.v1 import decode_pb2 as dpb
from segue_contract.v1 import decode_pb2_grpc


class DecodeService(decode_pb2_grpc.DecodeServicer):
    def __init__(
        self,
        manager: TurnManager,
        log: SessionLog,
        engine: Engine,
        manifest: Manifest,
        facts: FactsSource,
        edges: EdgeDirectory | None = None,
        trust: EdgeTrust | None = None,
        checks: SpotChecks | None = None,
    ) -> None:
        """`trust`, `checks`: without them every edge's KV is everybody's."""
        self._trust = trust or EdgeTrust(keyed=False, chance=lambda: 1.0, monotonic=lambda: 0.0)
        self._checks = checks
        self._manager = manager
        self._log = log
        self._engine = engine
        self._manifest = manifest
        self._facts = facts
        self._edges = edges or EdgeDirectory()
        self._recipes = manifest.allowed_codecs()

    async def Begin(self, request: dpb.BeginRequest, context: Any) -> dpb.BeginReply:
        bearer = caller_bearer()
        asked = turn_request(request.turn, caller().tenant)
        asked = replace(asked, edge=caller().via, bearer=bearer)
        if caller_is_late() and not request.offline:
            raise expired()
        if request.offline:
            follows = check_id(request.follows, "turn") if request.follows else ""
            asked = replace(asked, offline=True, follows=follows)
        self._check_weights(request.weights_digest)
        await self._log.check_device(asked.session, asked.device, bearer)
        begun = await self._manager.begin(asked, expect_open=True)
        state = await self._log.state(asked.session)
        finished = [turn for turn in state.turns if turn.ended and turn.turn != asked.turn]
        same_life = request.known_generation == state.cursor.generation
        known = request.known_turns if same_life else 0
        first = first_unknown(finished, known, request.known_digest)
        first = max(first, first_seen(finished, asked.turn, begun.context_from))
        return dpb.BeginReply(
            epoch=begun.epoch,
            tail=cursor_message(begun.cursor),
            turns=encode_turns([without_unheard(turn) for turn in finished[first:]]),
            first_turn=first,
            joined=begun.known,
            facts=self._facts.facts(),
            context_from=begun.context_from,
            known_digest=known_digest(finished),
        )

    def _check_weights(self, digest: str) -> None:
        """Raises ModelMismatch: the edge has other weights, and its token ids other meanings."""
        if digest and digest != self._manifest.weights_digest:
            raise ModelMismatch(
                f"This cloud serves {self._manifest.name} with other weights than the edge's.",
                hint="Give both the same --model.",
            )

    def Run(
        self, request_iterator: AsyncIterator[dpb.RunRequest], context: Any
    ) -> AsyncIterator[dpb.RunReply]:
        served: list[TurnOwner] = []
        leaving = self._manager.leaving

        def beat() -> dpb.RunReply:
            stalled = any(owner.stalled for owner in served)
            leaves = leaving.is_set() and any(not owner.ended.is_set() for owner in served)
            return dpb.RunReply(heartbeat=pb.Heartbeat(stalled=stalled, leaving=leaves))

        replies = self._run(aiter(request_iterator), served.append)
        return beating(replies, beat, every_s=TURN_HEARTBEAT_S, news=leaving)

    async def _run(
        self, requests: AsyncIterator[dpb.RunRequest], serve: Callable[[TurnOwner], None]
    ) -> AsyncIterator[dpb.RunReply]:
        message = await _first(requests)
        sizes = self._manifest.geometry
        spec = owned_turn(message, caller().tenant, vocabulary=sizes.vocab, context=sizes.context)
        spec = replace(spec, via=edge_calling())
        # What the log has to its end is told to each edge whose device may read it.
        ended = await self._ended_turn(spec) if message.takeover else None
        if ended is None:
            await self._check_granted(spec)
        if spec.ship_blocks and message.recipe not in self._recipes:
            raise BadRecipe(
                "The edge's KV comes from a recipe that this model does not allow.",
                hint="Build the same model on both sides (`segue model verify`).",
            )
        if spec.blocks and list(spec.blocks) != block_ids(message.recipe, spec.prompt):
            raise BadBlock("The block ids are not those of the prompt under this recipe.")
        have = self._have(spec)
        announced = spec.blocks[: spec.ship_blocks] if spec.shape is Shape.SHIP else ()
        if ended is not None:
            for reply in self._replay(ended, have):
                yield reply
            return
        owner, attached = await self._own(spec, message)
        serve(owner)
        intake = self._intake(spec, announced, have)
        stream = RunStream(
            owner,
            intake,
            self._engine,
            attached=attached,
            # an edge that delivers what it served offline ends the turn itself
            goes_on=message.takeover and message.shape != Shape.EDGE.value,
            limits=self._manager.limits,
        )
        opened = dpb.Opened(
            epoch=owner.spec.key.epoch,
            have_blocks=have,
            facts=self._facts.facts(),
            next_index=owner.next_index,
            attached=attached,
        )
        async for reply in stream.serve(requests, opened):
            yield reply

    def _have(self, spec: OwnedTurn) -> int:
        """Blocks that the edge need not ship: those that are there for this tenant and edge; all,
        where what it ships would not be used."""
        if self._trust.refuses(spec.via):
            return len(spec.blocks)
        domains = self._trust.domains(spec.key.session.tenant, spec.via)
        return self._engine.have_blocks(spec.blocks, domains)

    def _intake(self, spec: OwnedTurn, announced: tuple[bytes, ...], have: int) -> KvIntake:
        tenant, edge = spec.key.session.tenant, spec.via
        places = {block: place for place, block in enumerate(announced, 1)}

        def shipped(block: KvBlock) -> None:
            if self._checks is not None:
                tokens = spec.prompt[: places[block.id] * KV_BLOCK_TOKENS]
                self._checks.offer(Shipped(edge, tenant, tokens, block))

        return KvIntake(
            self._engine,
            self._manifest.geometry.kv,
            self._recipes,
            announced,
            announced[have:],
            domain=None if self._trust.refuses(edge) else self._trust.shipped_into(tenant, edge),
            shipped=shipped,
        )

    async def Probe(self, request: dpb.ProbeRequest, context: Any) -> dpb.ProbeReply:
        who = caller()
        url = check_public_url(request.public_url) if request.public_url else ""
        self._edges.heard(url, who.name if who.kind is Kind.EDGE else "", time.monotonic())
        return dpb.ProbeReply(
            received_bytes=len(request.payload),
            facts=self._facts.facts(),
            **revoked_since(gate_here(), request),
        )

    async def _check_granted(self, spec: OwnedTurn) -> None:
        """An edge with a certificate gives tokens and KV of such turns alone as it began itself.

        Raises:
            PermissionDenied: another edge, or nobody, was granted the turn.
            UnknownTurn: the log has no such turn.
        """
        who = caller()
        if not who.via:
            return
        turn = find_turn(await self._log.state(spec.key.session), spec.key.turn)
        if turn is None:
            raise UnknownTurn(f"Turn {spec.key.turn} never began.", hint="Begin it first.")
        if (turn.edge, turn.device) != (who.via, who.name):
            raise PermissionDenied(
                f"Turn {spec.key.turn} was not granted to this edge for this device.",
                hint="The edge that began the turn runs it; others follow it.",
                turn=spec.key.turn,
            )

    async def _own(self, spec: OwnedTurn, message: dpb.TurnSpec) -> tuple[TurnOwner, bool]:
        if message.takeover:
            return await self._manager.take_over(spec, tuple(message.known_tokens))
        return self._manager.open(spec)

    async def _ended_turn(self, spec: OwnedTurn) -> TurnState | None:
        state = await self._log.state(spec.key.session)
        turn = find_turn(state, spec.key.turn)
        return turn if turn is not None and turn.ended else None

    def _replay(self, turn: TurnState, have: int) -> list[dpb.RunReply]:
        opened = dpb.Opened(
            epoch=turn.epoch,
            have_blocks=have,
            facts=self._facts.facts(),
            next_index=len(turn.tokens),
        )
        events = (to_reply(event) for event in turn_events(turn))
        return [dpb.RunReply(opened=opened), *(reply for reply in events if reply is not None)]


async def _first(requests: AsyncIterator[dpb.RunRequest]) -> dpb.TurnSpec:
    try:
        async with asyncio.timeout(RPC_TIMEOUT_S):
            request = await anext(requests, None)
    except TimeoutError as error:
        raise DeadlineExceeded("The stream was opened and nothing came.") from error
    if request is None or request.WhichOneof("kind") != "open":
        raise InvalidArgument("A turn's stream begins with `open`.")
    return request.open
