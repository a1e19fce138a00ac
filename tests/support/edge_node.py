"""An edge node of the product around the tiny model, and a device that talks to it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from segue_contract.ids import DEFAULT_TENANT, SessionName
from segue_contract.limits import EdgeTurnLimits
from segue_contract.plan import PlanReport, decode_plan
from segue_contract.transport.bearer import bearer
from segue_contract.transport.channel import open_channel
from segue_contract.transport.gate import Tokens
from segue_contract.transport.status import error_from_rpc
from segue_contract.v1 import agent_pb2 as pb
from segue_contract.v1 import agent_pb2_grpc
from segue_edge.config import EdgeConfig
from segue_edge.node import EdgeNode
from tests.support.scripted_cloud import ScriptedCloud, scripted_cloud
from tests.support.tiny_edge import TinyModel, tiny_tokenizer

LONG_PROMPT = "Tell me of the sea. " * 20  # six full blocks and a tail


@asynccontextmanager
async def edge_node(
    *clouds: str,
    model: TinyModel | None = None,
    limits: EdgeTurnLimits = EdgeTurnLimits(),
    tokens: Tokens | None = None,
    **settings: Any,
) -> AsyncIterator[EdgeNode]:
    """A node on a free port that uses these clouds."""
    tiny = model or TinyModel()
    config = EdgeConfig(port=0, cloud=",".join(clouds), **settings)
    async with EdgeNode(config, lambda _: (tiny, tiny_tokenizer()), limits, tokens) as node:
        yield node


@dataclass
class Told:
    """What a device was told of one turn."""

    events: list[pb.TurnEvent] = field(default_factory=list)

    def take(self, event: pb.TurnEvent) -> None:
        if event.WhichOneof("kind") != "heartbeat":
            self.events.append(event)

    @property
    def kinds(self) -> list[str]:
        return [str(event.WhichOneof("kind")) for event in self.events]

    @property
    def frames(self) -> list[pb.TokenFrame]:
        return [event.frame for event in self.events if event.WhichOneof("kind") == "frame"]

    @property
    def text(self) -> str:
        """As a device shows it: frames by index, rewinds taken back; nothing may come twice."""
        pieces: list[str] = []
        for event in self.events:
            kind = event.WhichOneof("kind")
            if kind == "rewound":
                del pieces[event.rewound.index :]
            elif kind == "frame":
                assert event.frame.index == len(pieces), "a gap, or tokens shown twice"
                pieces += event.frame.pieces
        return "".join(pieces)

    @property
    def ended(self) -> pb.TurnEnded:
        assert self.kinds[-1] == "ended"
        assert self.kinds.count("ended") == 1
        return self.events[-1].ended

    @property
    def plan(self) -> PlanReport:
        return decode_plan(self.ended.plan)


class Device:
    """A device's calls; failures come as the product's own errors."""

    def __init__(self, address: str, name: str = "phone", token: str = "") -> None:
        self.name = name
        self._metadata = bearer(token)
        self._channel = open_channel(address)
        self.stub: Any = agent_pb2_grpc.AgentStub(self._channel)

    async def open(self, session: str = "trip", **more: Any) -> pb.OpenSessionReply:
        request = pb.OpenSessionRequest(session=session, device=self.name, **more)
        return await self.call("OpenSession", request)

    async def call(self, method: str, request: Any) -> Any:
        try:
            return await getattr(self.stub, method)(request, timeout=20, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error

    def stream(self, turn: str = "t1", prompt: str = LONG_PROMPT, **more: Any) -> Any:
        fields: dict[str, Any] = {"session": "trip", "max_tokens": 12, **more}
        request = pb.RunTurnRequest(device=self.name, turn=turn, prompt=prompt, **fields)
        return self.stub.RunTurn(request, timeout=60, metadata=self._metadata)

    async def run(self, turn: str = "t1", prompt: str = LONG_PROMPT, **more: Any) -> Told:
        told = Told()
        try:
            async for event in self.stream(turn, prompt, **more):
                told.take(event)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        return told

    async def close(self) -> None:
        await self._channel.close(None)


@asynccontextmanager
async def device_of(node: EdgeNode, name: str = "phone", token: str = "") -> AsyncIterator[Device]:
    device = Device(node.server.address, name, token)
    try:
        yield device
    finally:
        await device.close()


@dataclass
class TwoClouds:
    """An edge node of two scripted clouds, and a device of it."""

    a: ScriptedCloud
    b: ScriptedCloud
    node: EdgeNode
    device: Device

    def ranked(self, session: str = "trip") -> tuple[ScriptedCloud, ScriptedCloud]:
        """The session's cloud, and the other one."""
        first = self.a.address == self.node.clouds.best(SessionName(DEFAULT_TENANT, session)).target
        return (self.a, self.b) if first else (self.b, self.a)


@asynccontextmanager
async def two_clouds() -> AsyncIterator[TwoClouds]:
    async with (
        scripted_cloud("cloud-a") as a,
        scripted_cloud("cloud-b") as b,
        edge_node(a.address, b.address) as node,
        device_of(node) as device,
    ):
        yield TwoClouds(a, b, node, device)


@asynccontextmanager
async def serving(
    model: TinyModel | None = None, **settings: Any
) -> AsyncIterator[tuple[ScriptedCloud, EdgeNode, Device]]:
    """A scripted cloud, a node that uses it, and a device of that node."""
    async with (
        scripted_cloud() as cloud,
        edge_node(cloud.address, model=model, **settings) as node,
        device_of(node) as device,
    ):
        yield cloud, node, device
