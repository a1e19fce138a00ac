"""Many devices' questions go out as few, and each device gets its own answer."""

from __future__ import annotations

import asyncio

import pytest

from segue_contract.errors import Internal, InvalidArgument, StoreUnavailable, Unreachable
from segue_contract.identity.principal import Principal, local
from segue_contract.limits import MAX_TAILS
from segue_contract.transport.gate import acting_as
from segue_contract.v1 import agent_pb2 as pb
from segue_edge.api.tails import JoinedTails

DEADLINE_S = 20


class Clouds:
    """Sessions "a..." lie at cloud a, all others at b, which cannot publish."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.error: Exception | None = None
        self.answers = True

    def of(self, session: str) -> str:
        return "a" if session.startswith("a") else "b"

    async def ask(self, request: pb.TailsRequest) -> pb.TailsReply:
        self.asked.append(list(request.sessions))
        assert len({self.of(session) for session in request.sessions}) == 1
        if not self.answers:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error
        tails = [pb.Cursor(generation=1, offset=int(one[1:])) for one in request.sessions]
        return pb.TailsReply(tails=tails, publishing=request.sessions[0].startswith("a"))


async def ask(joined: JoinedTails, *sessions: str) -> tuple[list[int], bool]:
    return await ask_as(local("default"), "", joined, *sessions)


async def ask_as(
    who: Principal, token: str, joined: JoinedTails, *sessions: str
) -> tuple[list[int], bool]:
    with acting_as(who, token):
        async with asyncio.timeout(DEADLINE_S):
            reply = await joined.tails(sessions)
    return [tail.offset for tail in reply.tails], reply.publishing


async def test_devices_that_ask_together_cost_one_call_a_cloud() -> None:
    clouds = Clouds()
    joined = JoinedTails(clouds.of, clouds.ask, "edge")
    found = await asyncio.gather(
        *(ask(joined, f"a{number}", "a7") for number in range(50)),
        ask(joined, "b3", "a2", "b4"),
        ask(joined),
    )
    assert found[:50] == [([number, 7], True) for number in range(50)]
    assert found[50] == ([3, 2, 4], False)
    assert found[51] == ([], True)
    assert sorted(map(len, clouds.asked)) == [2, 50]
    await ask(joined, "a1")
    assert clouds.asked[-1] == ["a1"], "an answer is of the moment when it was asked for"


async def test_callers_of_other_tenants_or_tokens_are_not_joined() -> None:
    clouds = Clouds()
    joined = JoinedTails(clouds.of, clouds.ask, "edge")
    await asyncio.gather(
        ask_as(local("acme"), "one", joined, "a1"),
        ask_as(local("acme"), "one", joined, "a2"),
        ask_as(local("acme"), "two", joined, "a1"),
        ask_as(local("umbrella"), "one", joined, "a1"),
    )
    assert sorted(clouds.asked) == [["a1"], ["a1"], ["a1", "a2"]]


async def test_no_call_names_more_sessions_than_a_cloud_answers() -> None:
    clouds = Clouds()
    joined = JoinedTails(clouds.of, clouds.ask, "edge")
    names = [f"a{number}" for number in range(MAX_TAILS + 10)]
    found = await asyncio.gather(*(ask(joined, name) for name in names))
    assert found == [([number], True) for number in range(MAX_TAILS + 10)]
    assert list(map(len, clouds.asked)) == [MAX_TAILS, 10]


async def test_an_error_reaches_all_who_asked_and_nobody_later() -> None:
    clouds = Clouds()
    joined = JoinedTails(clouds.of, clouds.ask, "edge")
    clouds.error = StoreUnavailable("away")
    found = await asyncio.gather(
        *(ask(joined, f"a{number}") for number in range(3)), return_exceptions=True
    )
    assert [type(one) for one in found] == [StoreUnavailable] * 3
    clouds.error = None
    assert await ask(joined, "a5") == ([5], True)


async def test_one_bad_name_is_refused_before_it_joins_the_others() -> None:
    clouds = Clouds()
    joined = JoinedTails(clouds.of, clouds.ask, "edge")
    found = await asyncio.gather(ask(joined, "a1"), ask(joined, "no name"), return_exceptions=True)
    assert found[0] == ([1], True)
    assert isinstance(found[1], InvalidArgument)
    assert clouds.asked == [["a1"]]


async def test_an_answer_for_other_sessions_is_an_error() -> None:
    async def short(request: pb.TailsRequest) -> pb.TailsReply:
        return pb.TailsReply(publishing=True)

    with pytest.raises(Internal, match="0 of 1"):
        await ask(JoinedTails(lambda _: "a", short, "edge"), "a1")


async def test_a_node_that_stops_sends_its_devices_elsewhere() -> None:
    clouds = Clouds()
    clouds.answers = False
    joined = JoinedTails(clouds.of, clouds.ask, "edge")
    asking = asyncio.create_task(ask(joined, "a1"))
    async with asyncio.timeout(DEADLINE_S):
        while not clouds.asked:  # noqa: ASYNC110 - a list has no event
            await asyncio.sleep(0.005)
        joined.close()
        with pytest.raises(Unreachable):
            await asking
