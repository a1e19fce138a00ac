"""`timeout`, `max_retries` and `with_options`."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import pytest

import segue
from segue import errors
from segue.options import Options, Timeout
from segue_contract.errors import SegueError
from segue_contract.v1 import agent_pb2 as pb
from tests.support.fake_agent import FakeAgent, FakeLog, Wait, ended, frame, started

SOON_S = 0.05  # a deadline that passes in the test; nothing depends on when


@pytest.mark.parametrize("wrong", [0, -1, float("inf"), float("nan")])
def test_a_deadline_is_a_time(wrong: float) -> None:
    with pytest.raises(errors.InvalidArgument, match="idle"):
        Timeout(idle=wrong)
    with pytest.raises(errors.InvalidArgument, match="total"):
        segue.Client("127.0.0.1:1", timeout=wrong)
    with pytest.raises(errors.InvalidArgument, match="max_retries"):
        segue.Client("127.0.0.1:1", max_retries=-1)


def test_what_is_not_given_stays() -> None:
    options = Options().changed(2.0, 5)
    assert options == Options(Timeout(total=2.0), 5)
    assert options.changed(None, None) == options
    assert options.changed(Timeout(idle=1), 0) == Options(Timeout(idle=1), 0)


def test_what_is_repeated() -> None:
    three = Options(max_retries=3)
    assert three.may_repeat(errors.Unreachable("x"), 2)
    assert not three.may_repeat(errors.Unreachable("x"), 3)
    assert not Options().may_repeat(errors.Unreachable("x"), 0)
    assert three.may_repeat(errors.QuotaExceeded("rate", retry_after_s=1.0), 0)
    assert not three.may_repeat(errors.QuotaExceeded("full"), 0)
    assert not three.may_repeat(errors.Overloaded("x", retry_after_s=3600.0), 0)
    assert not three.may_repeat(errors.InvalidArgument("x"), 0)


@pytest.fixture
def mute() -> Iterator[str]:
    """An address where connections are taken, and nothing is ever said."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


async def test_connect(mute: str) -> None:
    client = segue.Client(mute, device="phone", timeout=Timeout(connect=SOON_S))
    with pytest.raises(errors.Unreachable, match=r"within 0\.05 s") as caught:
        async with client:
            pass
    assert caught.value.fields["timeout"] == "connect"
    async with FakeAgent(FakeLog("trip")) as agent:
        both = [mute, agent.address]
        limit = Timeout(connect=0.2)
        async with segue.Client(both, device="p", timeout=limit, max_retries=50) as client:
            assert (await client.session("trip")).name == "trip"


async def test_total_of_a_call() -> None:
    async with (
        asyncio.timeout(60),
        FakeAgent(FakeLog("trip")) as agent,
        segue.Client(agent.address, device="phone", max_retries=50) as client,
    ):
        agent.held = asyncio.Event()
        with pytest.raises(errors.DeadlineExceeded) as caught:
            await client.with_options(timeout=SOON_S).sessions()
        assert caught.value.fields == {"timeout": "total", "limit_s": SOON_S}
        assert caught.value.hint


@pytest.mark.parametrize(
    "error",
    [
        errors.Overloaded("full", retry_after_s=0.01),
        errors.QuotaExceeded("too fast", retry_after_s=0.01),
        errors.StoreUnavailable("away"),
        errors.Unreachable("the cloud is away"),
    ],
    ids=lambda error: error.code,
)
async def test_calls_are_repeated_as_often_as_asked(error: SegueError) -> None:
    async with (
        FakeAgent(FakeLog("trip")) as agent,
        segue.Client(agent.address, device="phone", max_retries=2) as client,
    ):
        agent.fail_times["ListSessions"] = [error] * 2
        assert len(await client.sessions()) == 1
        assert agent.calls == 3
        agent.fail_times["ListSessions"] = [error] * 3
        with pytest.raises(type(error)):
            await client.sessions()
        agent.calls = 0
        agent.fail_times["ListSessions"] = [error]
        with pytest.raises(type(error)):
            await client.with_options(max_retries=0).sessions()
        assert agent.calls == 1


async def test_an_open_session_bears_what_passes_unless_told_otherwise() -> None:
    async with (
        FakeAgent(FakeLog("trip")) as agent,
        segue.Client(agent.address, device="phone") as client,
    ):
        session = await client.session("trip")
        away = errors.Unreachable("the cloud is away")
        agent.fail_times["Append"] = [away]
        await session.set("a", "1")
        agent.fail_times["Append"] = [away]
        with pytest.raises(errors.Unreachable):
            await session.with_options(max_retries=0).set("a", "2")


async def test_copies_of_a_session_are_one_writer() -> None:
    async with (
        FakeAgent(FakeLog("trip")) as agent,
        segue.Client(agent.address, device="phone") as client,
    ):
        session = await client.with_options(timeout=20.0).session("trip")
        hurried = session.with_options(timeout=10.0)
        await asyncio.gather(*((session, hurried)[n % 2].set("n", str(n)) for n in range(8)))
        assert [one.first_seq for one in agent.appends] == list(range(1, 9))
        assert len({(one.producer, one.epoch) for one in agent.appends}) == 1


async def test_a_copy_of_a_client_ends_nothing() -> None:
    async with (
        FakeAgent(FakeLog("trip")) as agent,
        segue.Client(agent.address, device="phone") as client,
    ):
        async with client.with_options(timeout=5.0) as copy:
            assert (await copy.session("trip")).name == "trip"
        await copy.close()
        assert len(await client.sessions()) == 1


async def _whole(turn: segue.Turn) -> None:
    async with turn:
        await turn.result()


@pytest.mark.parametrize("which", ["first_token", "total", "idle"])
async def test_a_turn_out_of_time_runs_on(which: str) -> None:
    go_on = asyncio.Event()

    def script(request: pb.RunTurnRequest) -> list[pb.TurnEvent | Wait]:
        head = [frame(0, "one")] if which == "idle" and not request.from_index else []
        return [started("t1"), *head, Wait(go_on), frame(1 if head else request.from_index, "two"),
                ended(2 if which == "idle" else 1)]  # fmt: skip

    async with (
        asyncio.timeout(60),
        FakeAgent(FakeLog("trip"), script) as agent,
        segue.Client(agent.address, device="phone", timeout=30.0) as client,
    ):
        session = await client.session("trip")
        limit = Timeout(**{which: SOON_S})
        # the deadline may pass before the turn is accepted as well as after
        turn = session.run("go", turn="t1", timeout=limit)
        with pytest.raises(errors.DeadlineExceeded) as caught:
            await _whole(turn)
        assert caught.value.fields == {"timeout": which, "limit_s": SOON_S}
        assert "t1" in caught.value.message
        assert not agent.stops
        go_on.set()
        async with session.run("go", turn="t1") as again:
            assert (await again.result()).text.endswith("two ")


async def test_a_refused_turn_is_asked_for_again() -> None:
    error: list[SegueError] = []

    def script(request: pb.RunTurnRequest) -> list[pb.TurnEvent | SegueError]:
        if error:
            return [error.pop()]
        return [started(request.turn), frame(0, "yes"), ended(1)]

    async with (
        asyncio.timeout(60),
        FakeAgent(FakeLog("trip"), script) as agent,
        segue.Client(agent.address, device="phone", max_retries=2) as client,
    ):
        session = await client.session("trip")
        for one in (
            errors.Overloaded("full", retry_after_s=0.01),
            errors.QuotaExceeded("tokens", retry_after_s=0.01),
            errors.Unreachable("away"),
        ):
            error[:] = [one, one]
            async with session.run("go") as turn:
                assert (await turn.result()).text == "yes "
            error[:] = [one] * 3
            with pytest.raises(type(one)):
                async with session.run("go"):
                    pass
            error[:] = [one]
            with pytest.raises(type(one)):
                async with session.run("go", max_retries=0):
                    pass
        error[:] = [errors.SessionBusy("another turn runs")]
        with pytest.raises(errors.SessionBusy):
            async with session.run("go", when_busy="refuse"):
                pass
        error[:] = [errors.Overloaded("full", retry_after_s=20.0)]
        with pytest.raises(errors.Overloaded):  # the wait does not fit: the reason is told at once
            async with session.run("go", timeout=5.0):
                pass


async def test_another_node_is_no_repetition() -> None:
    def full(_: pb.RunTurnRequest) -> list[pb.TurnEvent | SegueError]:
        return [errors.Overloaded("full", retry_after_s=5.0)]

    def serves(request: pb.RunTurnRequest) -> list[pb.TurnEvent]:
        return [started(request.turn), frame(0, "yes"), ended(1)]

    log = FakeLog("trip")
    async with (
        asyncio.timeout(60),
        FakeAgent(log, full) as first,
        FakeAgent(log, serves) as second,
        segue.Client([first.address, second.address], device="p", max_retries=0) as client,
    ):
        session = await client.session("trip")
        async with session.run("go") as turn:
            assert (await turn.result()).text == "yes "
