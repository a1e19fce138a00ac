"""What a gate ends before its time, and whom it refuses unread: over a real server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from segue_contract.errors import Overloaded, Revoked, SegueError, Unauthenticated
from segue_contract.identity.keys import IssuerKey, KeySet
from segue_contract.identity.principal import Right
from segue_contract.identity.tokens import issue
from segue_contract.limits import BAD_TOKENS_BURST, BAD_TOKENS_PER_S
from segue_contract.transport.bearer import bearer
from segue_contract.transport.channel import open_channel
from segue_contract.transport.gate import Gate, Tokens, caller
from segue_contract.transport.server import start_server
from segue_contract.transport.status import error_from_rpc
from segue_contract.transport.tenant_keys import TenantKeys
from segue_contract.v1 import agent_pb2 as pb
from segue_contract.v1 import agent_pb2_grpc
from tests.support.principals import KnownTokens

WAIT_S = 20.0
KEY = IssuerKey.new("acme", lambda count: bytes(range(count)))


class _Agent(agent_pb2_grpc.AgentServicer):
    async def Attach(self, request: Any, context: Any) -> AsyncIterator[pb.AttachEvent]:
        """As much as the reader takes; of session "still", one event."""
        entry = pb.LogEntry(op=b"x" * 100_000)
        while True:
            yield pb.AttachEvent(entries=pb.EntryBatch(entries=[entry]))
            if request.session == "still":
                await asyncio.get_running_loop().create_future()

    async def ListSessions(self, request: Any, context: Any) -> pb.ListSessionsReply:
        return pb.ListSessionsReply(sessions=[pb.SessionInfo(session=caller().name)])


@dataclass
class Place:
    gate: Gate
    stub: Any
    clock: list[float] = field(default_factory=list)

    async def ask(self, token: str) -> str:
        try:
            reply = await self.stub.ListSessions(
                pb.ListSessionsRequest(), timeout=WAIT_S, metadata=bearer(token)
            )
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        return str(reply.sessions[0].session)

    async def attach(self, token: str, session: str = "still") -> Any:
        request = pb.AttachRequest(session=session)
        stream = self.stub.Attach(request, timeout=WAIT_S, metadata=bearer(token))
        try:
            await stream.read()
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        return stream


@asynccontextmanager
async def serving(tokens: Tokens) -> AsyncIterator[Place]:
    clock = [0.0]
    gate = Gate("default", tokens, peer_name=lambda _: "", monotonic=lambda: clock[0])
    add = agent_pb2_grpc.add_AgentServicer_to_server
    server = await start_server(
        "127.0.0.1", 0, [("segue.v1.Agent", lambda s: add(_Agent(), s))], gate=gate
    )
    channel = open_channel(server.address)
    try:
        yield Place(gate, agent_pb2_grpc.AgentStub(channel), clock)
    finally:
        await channel.close()
        await server.stop(0)


async def end_of(stream: Any) -> SegueError:
    try:
        while await stream.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError as error:
        return error_from_rpc(error)
    raise AssertionError("it ended without an error")


async def test_a_reader_that_takes_nothing_is_told_why_its_stream_ended() -> None:
    tokens = KnownTokens()
    token = tokens.device("acme", "phone", issued_s=1.0)
    async with serving(tokens) as place:
        stream = await place.attach(token, "flood")
        place.gate.revoke("acme", "flood", "phone", 2.0)
        async with asyncio.timeout(WAIT_S):
            while place.gate.calls:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert type(await end_of(stream)) is Revoked


@pytest.mark.parametrize("revoked", ["still", "st*", "*"])
async def test_a_revocation_is_for_a_session_or_for_all_that_begin_so(revoked: str) -> None:
    tokens = KnownTokens()
    old = [
        tokens.device("acme", "phone", sessions=(pattern,), issued_s=1.0)
        for pattern in ("st*", "still", "*")
    ]
    others = [tokens.device("acme", "laptop", issued_s=1.0), tokens.device("b", "phone")]
    async with serving(tokens) as place:
        ends = [await place.attach(token) for token in old]
        goes_on = [await place.attach(token) for token in others]
        place.gate.revoke("acme", revoked, "phone", 2.0)
        for stream in ends:
            assert type(await end_of(stream)) is Revoked
        assert not any(stream.done() for stream in goes_on)
        for token in old:
            with pytest.raises(Revoked):
                await place.attach(token)
        covered = {"still": [old[1]], "st*": old[:2], "*": old}[revoked]
        for token in old:  # where all that a token covers is void, so is the token
            if token in covered:
                with pytest.raises(Revoked):
                    await place.ask(token)
            else:
                assert await place.ask(token) == "phone"
        later = tokens.device("acme", "phone", issued_s=2.0)
        (await place.attach(later)).cancel()
        assert await place.ask(later) == "phone"


def token_of(device: str) -> str:
    return issue(
        KEY,
        device=device,
        sessions=["*"],
        rights=Right,
        lifetime_s=600,
        now_s=time.time() - 60,
        token_id="t",
    )


async def test_a_revoked_key_ends_the_streams_of_its_tokens(tmp_path: Path) -> None:
    file = tmp_path / "tenants.json"
    other = IssuerKey.new("acme", lambda count: bytes(count))
    keys = KeySet().with_key(KEY.public(1.0)).with_key(other.public(1.0))
    file.write_text(keys.text())
    clock = [0.0]
    async with serving(TenantKeys(file, monotonic=lambda: clock[0])) as place:
        lost = await place.attach(token_of("phone"))
        kept = await place.attach(
            issue(
                other,
                device="tablet",
                sessions=["*"],
                rights=Right,
                lifetime_s=600,
                now_s=time.time(),
                token_id="t",
            )
        )
        file.write_text(keys.revoked_before(KEY.kid, time.time()).text())
        clock[0] += 10
        assert type(await end_of(lost)) is Unauthenticated
        assert not kept.done()
        kept.cancel()


async def test_bad_tokens_of_one_address_are_refused_unread_after_some() -> None:
    looked: list[str] = []

    class Counted(KnownTokens):
        def knows(self, token: str) -> bool:
            return token in seen

        def principal(self, token: str, now_s: float, *, late_s: float = 0.0) -> Any:
            looked.append(token)
            found = super().principal(token, now_s, late_s=late_s)
            seen.add(token)
            return found

    seen: set[str] = set()
    tokens = Counted()
    good, new = tokens.device("acme", "phone"), tokens.device("acme", "laptop")
    async with serving(tokens) as place:
        assert await place.ask(good) == "phone"
        for _ in range(3):  # the same one again is no work
            with pytest.raises(Unauthenticated):
                await place.ask("bad")
        assert looked.count("bad") == 1
        for number in range(BAD_TOKENS_BURST - 1):
            with pytest.raises(Unauthenticated):
                await place.ask(f"bad-{number}")
        looked.clear()
        for token in ("worse", new):
            with pytest.raises(Overloaded) as refused:
                await place.ask(token)
            assert 0 < refused.value.fields["retry_after_s"] <= 1 / BAD_TOKENS_PER_S
        assert looked == []
        assert await place.ask(good) == "phone"  # known devices go on
        place.clock[0] += 1 / BAD_TOKENS_PER_S
        assert await place.ask(new) == "laptop"
