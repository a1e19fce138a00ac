"""Every kind of caller, every verb of every service, its own session and others, its own tenant and
another: over a real server, with real tokens. What should come of each, the table's row says."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from segue_contract.errors import (
    InvalidArgument,
    PermissionDenied,
    Revoked,
    SegueError,
    Unauthenticated,
    Unreachable,
)
from segue_contract.identity.keys import IssuerKey, KeySet
from segue_contract.identity.principal import Kind, Right
from segue_contract.identity.rights import RULES, Scope
from segue_contract.identity.tokens import issue
from segue_contract.limits import MAX_TAILS
from segue_contract.transport.bearer import bearer
from segue_contract.transport.channel import open_channel
from segue_contract.transport.gate import Gate, caller
from segue_contract.transport.server import start_server
from segue_contract.transport.status import error_from_rpc
from segue_contract.transport.tenant_keys import TenantKeys
from segue_contract.v1 import agent_pb2, agent_pb2_grpc, decode_pb2, decode_pb2_grpc

NODE = "x-test-node"  # stands for the certificate of the connection
OURS, THEIRS = "acme", "umbrella"
SESSION, OTHER = "trip", "other"
NODES = {
    Kind.EDGE: "edge/here/one",
    Kind.CLOUD: "cloud/one",
    Kind.OPERATOR: "operator/ann",
}
SERVICES = {
    **agent_pb2.DESCRIPTOR.services_by_name,
    **decode_pb2.DESCRIPTOR.services_by_name,
    **health_pb2.DESCRIPTOR.services_by_name,
    **reflection_pb2.DESCRIPTOR.services_by_name,
}
KEYS = {tenant: IssuerKey.new(tenant, os.urandom) for tenant in (OURS, THEIRS)}
DAMAGED = "eyJhbGciOiJFZERTQSJ9.e30.AAAA"


@dataclass(frozen=True)
class Caller:
    """`node`: its certificate. `tenant` of its token, "" for none, with these rights."""

    name: str
    kind: Kind | None
    node: str = ""
    tenant: str = ""
    rights: frozenset[Right] = frozenset(Right)
    sessions: tuple[str, ...] = (SESSION,)
    token: str = ""  # instead of a good one

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        token = self.token
        if self.tenant:
            token = issue(
                KEYS[self.tenant],
                device="phone",
                sessions=self.sessions,
                rights=self.rights,
                lifetime_s=60,
                now_s=time.time(),
                token_id="t1",
            )
        return (*(bearer(token) or ()), *(((NODE, self.node),) if self.node else ()))


CALLERS = (
    Caller("nobody", None),
    Caller("damaged token", None, token=DAMAGED),
    Caller("damaged token through an edge", None, NODES[Kind.EDGE], token=DAMAGED),
    Caller("token through a cloud", None, NODES[Kind.CLOUD], OURS),
    Caller("certificate of another form", None, "edge/one"),
    Caller("device", Kind.DEVICE, tenant=OURS),
    Caller("device, all sessions", Kind.DEVICE, tenant=OURS, sessions=("*",)),
    Caller("device of another tenant", Kind.DEVICE, tenant=THEIRS, sessions=("*",)),
    *(
        Caller(f"device with {right}", Kind.DEVICE, tenant=OURS, rights=frozenset({right}))
        for right in Right
    ),
    Caller("device through an edge", Kind.EDGE, NODES[Kind.EDGE], OURS),
    Caller("device of another tenant through an edge", Kind.EDGE, NODES[Kind.EDGE], THEIRS),
    *(Caller(f"{kind} alone", kind, node) for kind, node in NODES.items()),
)


class Served:
    """Answers every verb of a service with nothing; keeps who called for which session."""

    def __init__(self, seen: list[tuple[str, str]], service: Any) -> None:
        self._seen = seen
        for method in service.methods:
            setattr(self, method.name, self._serving(method))

    def _serving(self, method: Any) -> Any:
        reply = _message(method.output_type)

        async def read(request: Any) -> None:
            if not method.client_streaming:
                self._seen.append((caller().tenant, _named(request)))
                return
            async for part in request:
                self._seen.append((caller().tenant, _named(part)))
                return

        async def one(request: Any, context: Any) -> Any:
            await read(request)
            return reply()

        async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
            await read(request)
            yield reply()

        return stream if method.server_streaming else one


@dataclass
class Place:
    address: str
    gate: Gate
    channel: grpc.aio.Channel
    seen: list[tuple[str, str]] = field(default_factory=list)

    async def ask(self, verb: str, request: Any, metadata: Iterable[Any]) -> SegueError | None:
        """Why the call was refused; None where it was served. gRPC may hide a status that comes
        while a message is being written: then it is asked again."""
        for _ in range(20):
            error = await self._ask(verb, request, metadata)
            if not isinstance(error, Unreachable):
                break
        return error

    async def _ask(self, verb: str, request: Any, metadata: Iterable[Any]) -> SegueError | None:
        method = _method(verb)
        kinds = ("unary", "stream")
        shape = f"{kinds[method.client_streaming]}_{kinds[method.server_streaming]}"
        make = getattr(self.channel, shape)
        call = make(
            verb,
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=_message(method.output_type).FromString,
        )
        given = iter([request]) if method.client_streaming else request
        running = call(given, timeout=20, metadata=tuple(metadata))
        try:
            if method.server_streaming:
                await running.read()
            else:
                await running
        except grpc.aio.AioRpcError as error:
            return error_from_rpc(error)
        finally:
            running.cancel()
        return None


def _message(descriptor: Any) -> Any:
    return descriptor._concrete_class


def _method(verb: str) -> Any:
    _, service, name = verb.split("/")
    return SERVICES[service.rpartition(".")[2]].methods_by_name[name]


def _named(request: Any) -> str:
    for holder in ("open", "turn"):
        inner = getattr(request, holder, None)
        if hasattr(inner, "DESCRIPTOR"):
            return _named(inner)
    sessions = getattr(request, "sessions", None)
    return sessions[0] if sessions else getattr(request, "session", "")


def request_of(verb: str, session: str, device: str = "phone") -> Any:
    """One that names the session and the device wherever it can."""
    request = _message(_method(verb).input_type)()
    named = request
    for holder in ("open", "turn"):
        inner = getattr(request, holder, None)
        if hasattr(inner, "DESCRIPTOR"):
            named = inner
    names = named.DESCRIPTOR.fields_by_name
    if "sessions" in names:
        named.sessions.append(session)
    if "session" in names:
        named.session = session
    if "device" in names:
        named.device = device
    if "file_by_filename" in names:  # of reflection
        request.list_services = ""
    return request


def expected(who: Caller, verb: str, session: str) -> type[SegueError] | None:
    rule = RULES[verb]
    if who.kind is None:
        return Unauthenticated
    allowed = who.kind in rule.kinds
    if rule.scope is not Scope.NONE:
        allowed = allowed and bool(who.tenant)
    if rule.rights:
        allowed = allowed and bool(who.tenant) and bool(rule.rights & who.rights)
    if rule.per_session:
        allowed = allowed and (who.sessions == ("*",) or session in who.sessions)
    if rule.scope is Scope.TENANT:
        allowed = allowed and who.sessions == ("*",)
    return None if allowed else PermissionDenied


@asynccontextmanager
async def serving(gate: Gate) -> AsyncIterator[Place]:
    seen: list[tuple[str, str]] = []
    agent = Served(seen, agent_pb2.DESCRIPTOR.services_by_name["Agent"])
    decode = Served(seen, decode_pb2.DESCRIPTOR.services_by_name["Decode"])
    server = await start_server(
        "127.0.0.1",
        0,
        [
            ("segue.v1.Agent", lambda s: agent_pb2_grpc.add_AgentServicer_to_server(agent, s)),
            ("segue.v1.Decode", lambda s: decode_pb2_grpc.add_DecodeServicer_to_server(decode, s)),
        ],
        gate=gate,
    )
    channel = open_channel(server.address)
    try:
        yield Place(server.address, gate, channel, seen)
    finally:
        await channel.close()
        await server.stop(0)


def guarded(tmp_path: Path) -> Gate:
    file = tmp_path / "tenants.json"
    keys = KeySet()
    for key in KEYS.values():
        keys = keys.with_key(key.public(time.time()))
    file.write_text(keys.text())
    return Gate(
        "default",
        TenantKeys(file),
        peer_name=lambda context: dict(context.invocation_metadata()).get(NODE, ""),
    )


def test_every_verb_has_a_row_and_every_row_a_verb() -> None:
    verbs = {
        f"/{service.full_name}/{method.name}"
        for service in SERVICES.values()
        for method in service.methods
    }
    assert verbs == set(RULES)


@pytest.mark.parametrize("who", CALLERS, ids=lambda who: who.name)
async def test_what_each_caller_may_do(who: Caller, tmp_path: Path) -> None:
    wrong = []
    async with serving(guarded(tmp_path)) as place:
        for verb in RULES:
            for session in (SESSION, OTHER):
                place.seen.clear()
                error = await place.ask(verb, request_of(verb, session), who.metadata)
                wanted = expected(who, verb, session)
                if not isinstance(error, wanted or type(None)):
                    wrong.append((verb, session, error, wanted))
                if wanted is not None and place.seen:
                    wrong.append((verb, session, "reached its handler", place.seen[:]))
                if wanted is None and verb.startswith("/segue.v1."):
                    # whatever a request says, the tenant is the token's
                    named = place.seen == [(who.tenant, _named(request_of(verb, session)))]
                    if not named:
                        wrong.append((verb, session, "seen as", place.seen[:]))
    assert wrong == []


async def test_on_an_open_loopback_everybody_may_do_everything(tmp_path: Path) -> None:
    async with serving(Gate("ours")) as place:
        for verb in RULES:
            for metadata in ((), (NODE, "edge/here/one"), ("authorization", f"Bearer {DAMAGED}")):
                place.seen.clear()
                given = (metadata,) if metadata else ()
                assert await place.ask(verb, request_of(verb, OTHER), given) is None, verb
                assert all(tenant == "ours" for tenant, _ in place.seen)


async def test_a_device_speaks_in_its_own_name_alone(tmp_path: Path) -> None:
    device = Caller("device through an edge", Kind.EDGE, NODES[Kind.EDGE], OURS)
    async with serving(guarded(tmp_path)) as place:
        for verb in RULES:
            request = request_of(verb, SESSION, "laptop")
            if b"laptop" not in request.SerializeToString():
                continue
            assert isinstance(await place.ask(verb, request, device.metadata), PermissionDenied)
            assert place.seen == []


async def test_a_verb_without_a_rule_is_denied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verb = "/segue.v1.Agent/Read"
    rules = {name: rule for name, rule in RULES.items() if name != verb}
    monkeypatch.setattr("segue_contract.identity.rights.RULES", rules)
    for gate in (Gate("ours"), guarded(tmp_path)):
        async with serving(gate) as place:
            device = Caller("device", Kind.DEVICE, tenant=OURS)
            error = await place.ask(verb, request_of(verb, SESSION), device.metadata)
            assert isinstance(error, PermissionDenied)
            assert place.seen == []


async def test_a_key_that_is_revoked_in_the_file_counts_no_more(tmp_path: Path) -> None:
    gate = guarded(tmp_path)
    device = Caller("device", Kind.DEVICE, tenant=OURS)
    verb = "/segue.v1.Agent/Read"
    file = tmp_path / "tenants.json"
    clock = [0.0]
    gate = Gate("default", TenantKeys(file, monotonic=lambda: clock[0]), peer_name=lambda _: "")
    async with serving(gate) as place:
        metadata = device.metadata
        assert await place.ask(verb, request_of(verb, SESSION), metadata) is None
        good = file.read_text()
        file.write_text("not yet whole")
        clock[0] += 10
        assert await place.ask(verb, request_of(verb, SESSION), metadata) is None
        keys = KeySet.read(good)
        file.write_text(keys.revoked(KEYS[OURS].kid, time.time()).text())
        clock[0] += 10
        error = await place.ask(verb, request_of(verb, SESSION), metadata)
        assert isinstance(error, Unauthenticated)
        assert not isinstance(error, Revoked)


async def test_a_list_of_names_is_counted_before_each_is_looked_at(tmp_path: Path) -> None:
    """Everybody else's calls wait meanwhile."""
    async with serving(Gate("ours")) as place:
        many = agent_pb2.TailsRequest(device="phone", sessions=["a"] * (MAX_TAILS + 1))
        error = await place.ask("/segue.v1.Agent/Tails", many, ())
        assert isinstance(error, InvalidArgument)
        assert str(MAX_TAILS) in error.hint
        assert not place.seen
