"""Clouds on one store whose callers show tokens; the gates' clock is the test's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from segue_contract.errors import SegueError
from segue_contract.ids import SessionName
from segue_contract.transport.bearer import bearer
from segue_contract.transport.gate import Gate
from segue_contract.transport.status import error_from_rpc
from segue_contract.v1 import agent_pb2 as pb
from tests.support.cloud_rpc import CloudRpc, cloud_rpc
from tests.support.principals import KnownTokens
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tiny_edge import MANIFEST, tiny_tokenizer

TRIP = SessionName("acme", "trip")
WAIT_S = 20.0


@dataclass
class Place:
    tokens: KnownTokens
    clouds: list[CloudRpc] = field(default_factory=list)
    now_s: float = field(default_factory=time.time)

    def token(self, name: str, age_s: float = 60.0, **more: Any) -> str:
        return self.tokens.device("acme", name, issued_s=time.time() - age_s, **more)

    async def call(self, at: int, token: str, method: str, request: Any) -> Any:
        return await call(getattr(self.clouds[at].agent, method), request, token)

    async def attach(self, at: int, token: str, device: str) -> Any:
        """A stream that stands."""
        request = pb.AttachRequest(session="trip", device=device)
        stream = self.clouds[at].agent.Attach(request, metadata=bearer(token))
        assert (await stream.read()).WhichOneof("kind") == "snapshot"
        return stream


async def call(method: Any, request: Any, token: str) -> Any:
    try:
        return await method(request, timeout=WAIT_S, metadata=bearer(token))
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from error


async def end_of(stream: Any) -> SegueError:
    """Why a stream ended, whatever it said before."""
    try:
        async with asyncio.timeout(WAIT_S):
            while await stream.read() is not grpc.aio.EOF:
                pass
    except grpc.aio.AioRpcError as error:
        return error_from_rpc(error)
    raise AssertionError("it ended without an error")


@asynccontextmanager
async def keyed_clouds(
    url: str, directory: Path, engine: ScriptedEngine | None = None, *, clouds: int = 2, **more: Any
) -> AsyncIterator[Place]:
    place = Place(KnownTokens())
    engine = engine or ScriptedEngine([*b"words"])
    async with AsyncExitStack() as stack:
        for _ in range(clouds):
            gate = Gate("default", place.tokens, now_s=lambda: place.now_s, peer_name=lambda _: "")
            cloud = cloud_rpc(
                url,
                directory,
                engine,
                manifest=MANIFEST,
                tokenizer=tiny_tokenizer(),
                gate=gate,
                **more,
            )
            place.clouds.append(await stack.enter_async_context(cloud))
        yield place


async def opened(here: Place, token: str, device: str) -> pb.OpenSessionReply:
    request = pb.OpenSessionRequest(session="trip", device=device, producer=device)
    return await here.call(0, token, "OpenSession", request)  # type: ignore[no-any-return]
