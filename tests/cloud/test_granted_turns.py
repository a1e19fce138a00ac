"""An edge gives tokens and KV of those turns alone that it began, for a device whose token was
valid then. A real server and log; certificates' names and tokens as the gate is told of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from segue_contract.errors import (
    PermissionDenied,
    SegueError,
    StaleEpoch,
    Unauthenticated,
    UnknownTurn,
    Unreachable,
)
from segue_contract.ids import SessionName
from segue_contract.limits import OUTBOX_TOKEN_AGE_S
from segue_contract.servers import Valkey
from segue_contract.sync.state import find_turn
from segue_contract.transport.bearer import bearer
from segue_contract.transport.gate import Gate
from segue_contract.transport.status import error_from_rpc
from segue_contract.v1 import agent_pb2 as pb
from segue_contract.v1 import decode_pb2 as dpb
from tests.support.cloud_rpc import CloudRpc, cloud_rpc
from tests.support.principals import KnownTokens
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tiny_edge import MANIFEST, tiny_tokenizer

NODE = "x-test-node"  # stands for the certificate of the connection
TOKEN_ENDS_S = 1000.0
ONE, OTHER = "edge/here/one", "edge/here/other"


@dataclass
class Place:
    cloud: CloudRpc
    tokens: KnownTokens
    now_s: float = 0.0

    async def begin(self, token: str, edge: str, turn: str = "t1", **more: Any) -> dpb.BeginReply:
        asked = pb.RunTurnRequest(
            session="trip", device="phone", turn=turn, prompt="Hello", max_tokens=5
        )
        request = dpb.BeginRequest(turn=asked, **more)
        try:
            reply: dpb.BeginReply = await self.cloud.decode.Begin(
                request, timeout=20, metadata=said(token, edge)
            )
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        return reply

    async def run(
        self,
        token: str,
        edge: str,
        epoch: int,
        turn: str = "t1",
        device: str = "phone",
        *,
        takeover: bool = False,
    ) -> SegueError | None:
        """Why the stream was refused; None where the cloud answered for the turn. gRPC may hide a
        status that comes while a message is being written: then it is asked again."""
        spec = dpb.TurnSpec(
            session="trip",
            device=device,
            turn=turn,
            epoch=epoch,
            prompt=[1, 2, 3],
            max_tokens=5,
            sampling=pb.Sampling(),
            shape="edge",
            takeover=takeover,
        )
        for _ in range(20):
            error = await self._run(spec, said(token, edge))
            if not isinstance(error, Unreachable):
                break
        return error

    async def ended(self, turn: str = "t1") -> bool:
        found = find_turn(await self.cloud.log.state(SessionName("acme", "trip")), turn)
        return found is not None and found.ended

    async def _run(
        self, spec: dpb.TurnSpec, metadata: tuple[tuple[str, str], ...]
    ) -> SegueError | None:
        call = self.cloud.decode.Run(timeout=20, metadata=metadata)
        try:
            await call.write(dpb.RunRequest(open=spec))
            reply = await call.read()
            assert reply.WhichOneof("kind") == "opened"
        except grpc.aio.AioRpcError as error:
            return error_from_rpc(error)
        finally:
            call.cancel()
        return None


def said(token: str, edge: str) -> tuple[tuple[str, str], ...]:
    return (*(bearer(token) or ()), *(((NODE, edge),) if edge else ()))


@pytest.fixture
async def here(valkey: Valkey, tmp_path: Path) -> AsyncIterator[Place]:
    tokens = KnownTokens()
    place: Place
    gate = Gate(
        "default",
        tokens,
        peer_name=lambda context: dict(context.invocation_metadata()).get(NODE, ""),
        now_s=lambda: place.now_s,
    )
    async with cloud_rpc(
        valkey.url,
        tmp_path,
        ScriptedEngine([*b"words"]),
        manifest=MANIFEST,
        tokenizer=tiny_tokenizer(),
        gate=gate,
    ) as cloud:
        place = Place(cloud, tokens)
        yield place


async def opened(here: Place, tenant: str = "acme") -> str:
    token = here.tokens.device(tenant, expires_s=TOKEN_ENDS_S)
    request = pb.OpenSessionRequest(session="trip", device="phone")
    await here.cloud.agent.OpenSession(request, timeout=20, metadata=said(token, ONE))
    return token


async def test_only_the_edge_that_began_a_turn_runs_it(here: Place) -> None:
    token = await opened(here)
    epoch = (await here.begin(token, ONE)).epoch
    assert isinstance(await here.run(token, OTHER, epoch), PermissionDenied)
    laptop = here.tokens.device("acme", "laptop")
    assert isinstance(await here.run(laptop, ONE, epoch, device="laptop"), PermissionDenied)
    assert isinstance(await here.run(laptop, ONE, epoch, device="phone"), PermissionDenied)
    assert isinstance(await here.run(token, ONE, epoch, turn="never"), UnknownTurn)
    elsewhere = await opened(here, "umbrella")
    assert isinstance(await here.run(elsewhere, ONE, epoch), UnknownTurn)
    assert isinstance(await here.run("", ONE, epoch), PermissionDenied)
    assert isinstance(await here.run(token, "", epoch), PermissionDenied)
    assert isinstance(await here.run(token, ONE, epoch + 1), StaleEpoch)
    assert await here.run(token, ONE, epoch) is None


async def test_what_a_turn_became_is_told_to_another_edge_of_its_device(here: Place) -> None:
    """One that served the same turn out of the log's reach learns what the log has."""
    token = await opened(here)
    epoch = (await here.begin(token, ONE)).epoch
    assert isinstance(await here.run(token, OTHER, epoch, takeover=True), PermissionDenied)
    assert await here.run(token, ONE, epoch) is None
    async with asyncio.timeout(20):
        while not await here.ended():  # noqa: ASYNC110 - the log says when
            await asyncio.sleep(0.01)
    assert await here.run(token, OTHER, epoch, takeover=True) is None
    laptop = here.tokens.device("acme", "laptop", sessions=("elsewhere",))
    assert isinstance(await here.run(laptop, OTHER, epoch, takeover=True), PermissionDenied)


async def test_what_was_granted_is_served_after_the_token_ran_out(here: Place) -> None:
    token = await opened(here)
    epoch = (await here.begin(token, ONE)).epoch
    here.now_s = TOKEN_ENDS_S + 1
    with pytest.raises(Unauthenticated):
        await here.begin(token, ONE, "t2")
    assert await here.run(token, ONE, epoch) is None
    assert isinstance(await here.run(token, OTHER, epoch), PermissionDenied)
    assert isinstance(await here.run(token, "", epoch), Unauthenticated)


async def test_an_edge_vouches_for_what_was_said_offline_for_a_time(here: Place) -> None:
    token = await opened(here)
    here.now_s = TOKEN_ENDS_S + OUTBOX_TOKEN_AGE_S - 1
    with pytest.raises(Unauthenticated):
        await here.begin(token, "", "t1", offline=True)
    assert (await here.begin(token, ONE, "t1", offline=True)).epoch == 1
    here.now_s = TOKEN_ENDS_S + OUTBOX_TOKEN_AGE_S
    with pytest.raises(Unauthenticated):
        await here.begin(token, ONE, "t2", offline=True)
