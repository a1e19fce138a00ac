"""A turn seen by the device that asked: merged, resumed, never cancelled by leaving."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

import segue
from segue import errors
from segue_contract.errors import UnknownDevice
from segue_contract.limits import ClientLimits
from segue_contract.plan import PlanReport, encode_plan
from segue_contract.v1 import agent_pb2 as pb
from tests.support.fake_agent import (
    Break,
    FakeAgent,
    FakeLog,
    Step,
    Wait,
    durable,
    ended,
    frame,
    started,
)

REPLY = "Paris is a fine place to walk "


def whole(request: pb.RunTurnRequest) -> Sequence[Step]:
    steps = [frame(i, word) for i, word in enumerate(REPLY.split())]
    return [started(request.turn), *steps[request.from_index :], ended(7)]


def by_attempt(*scripts: Sequence[Step]):
    """One script per attempt; the last one serves all further attempts."""
    attempts = iter(range(len(scripts)))

    def script(request: pb.RunTurnRequest) -> Sequence[Step]:
        return scripts[next(attempts, len(scripts) - 1)]

    return script


async def collect(turn: segue.Turn) -> list[object]:
    return [event async for event in turn]


async def test_events_text_and_result() -> None:
    plan = encode_plan(PlanReport(shape="ship"))
    script = [
        started("x"),
        frame(0, "Paris", durable=False, made_by="edge"),
        durable(1),
        frame(1, "is a fine place to walk"),
        ended(7, plan=plan),
    ]
    async with (
        FakeAgent(FakeLog("trip"), lambda _: script) as agent,
        segue.Client(agent.address, device="phone") as client,
    ):
        session = await client.session("trip")
        async with session.run("Where?", max_tokens=20, seed=7) as turn:
            events = await collect(turn)
            reply = await turn.result()
    kinds = [type(event).__name__ for event in events]
    assert kinds == ["Started", "Frame", "Durable", "Frame", "Ended"]
    assert "".join(event.text for event in events) == REPLY == turn.text == reply.text
    assert reply.reason == "stop"
    assert reply.usage.completion_tokens == 7
    assert reply.plan is not None
    assert reply.plan.shape == "ship"
    assert turn.timing.first_token_by == "edge"
    assert turn.timing.tokens == 7
    sent = agent.runs[0]
    assert (sent.prompt, sent.max_tokens, sent.sampling.seed) == ("Where?", 20, 7)
    assert sent.sampling.top_p == 1.0


async def test_a_device_that_the_log_forgot_runs_its_turn() -> None:
    async with (
        FakeAgent(FakeLog("trip"), whole) as agent,
        segue.Client(agent.address, device="phone") as client,
    ):
        session = await client.session("trip")
        agent.fail_once["RunTurn"] = UnknownDevice("The device never joined.")
        async with session.run("Where?") as turn:
            assert (await turn.result()).text == REPLY
        assert len(agent.runs) == 1


async def test_broken_stream_is_joined_again_at_the_same_node() -> None:
    attempts = by_attempt(
        [started("x"), frame(0, "Paris is"), frame(2, "a", durable=False), Break()],
        [frame(2, "a fine"), Break()],
        [started("x"), frame(4, "place to walk"), ended(7)],
    )
    async with (
        FakeAgent(FakeLog("trip"), attempts) as agent,
        segue.Client(agent.address, device="phone") as client,
    ):
        session = await client.session("trip")
        async with session.run("Where?", plan="ship") as turn:
            events = await collect(turn)
    assert "".join(event.text for event in events) == REPLY == turn.text
    assert [run.from_index for run in agent.runs] == [0, 2, 4]
    assert [run.lost for run in agent.runs] == [False, True, True]
    assert [run.plan for run in agent.runs] == ["ship", "", ""], "a cloud alone cannot force it"
    assert len({run.turn for run in agent.runs}) == 1
    assert not [event for event in events if isinstance(event, segue.Rewound)]


async def test_dead_node_is_replaced_by_the_next_address() -> None:
    log = FakeLog("trip")
    go_on = asyncio.Event()
    async with (
        FakeAgent(log, lambda r: [started(r.turn), frame(0, "Paris is a"), Wait(go_on)]) as first,
        FakeAgent(log, whole, role="cloud") as second,
        segue.Client([first.address, second.address], device="phone") as client,
    ):
        session = await client.session("trip")
        async with session.run("Where?") as turn:
            text = ""
            async for event in turn:
                text += event.text
                if isinstance(event, segue.Frame) and event.next_index == 3:
                    await first.kill()
            assert text == REPLY
            assert second.runs[0].turn == turn.id
            assert second.runs[0].from_index == 3
            assert turn.address == "" or turn.address == second.address


async def test_a_node_that_leaves_is_left_for_one_that_is_ready() -> None:
    log = FakeLog("trip")
    go_on = asyncio.Event()
    async with (
        FakeAgent(log, lambda r: [started(r.turn), frame(0, "Paris is a"), Wait(go_on)]) as first,
        FakeAgent(log, whole, role="cloud") as second,
        segue.Client([first.address, second.address], device="phone") as client,
    ):
        session = await client.session("trip")
        async with session.run("Where?") as turn:
            async for event in turn:
                if isinstance(event, segue.Frame) and event.next_index == 3:
                    first.leaving.set()
        assert turn.text == REPLY
        assert [(one.turn, one.leaving) for one in second.prepared] == [(turn.id, True)]
        assert (second.runs[0].from_index, second.runs[0].lost) == (3, True)
        assert first.prepared == []


async def test_lost_previews_are_rewound() -> None:
    """The edge showed tokens that the log never got; epoch 2 makes others in their place."""
    attempts = by_attempt(
        [
            started("x"),
            frame(0, "Paris is"),
            frame(2, "big and loud", durable=False, made_by="edge"),
            Break(),
        ],
        [started("x", 2), frame(2, "a fine place to walk", epoch=2), ended(7, epoch=2)],
    )
    async with (
        FakeAgent(FakeLog("trip"), attempts) as agent,
        segue.Client(agent.address, device="phone") as client,
    ):
        session = await client.session("trip")
        pieces: list[str] = []
        async with session.run("Where?") as turn:
            async for event in turn:
                if isinstance(event, segue.Frame):
                    pieces += event.pieces
                elif isinstance(event, segue.Rewound):
                    assert event.index == 2
                    del pieces[event.index :]
    assert "".join(pieces) == REPLY == turn.text
    assert agent.runs[1].from_index == 2


async def test_an_end_without_all_tokens_is_not_believed() -> None:
    attempts = by_attempt(
        [started("x"), frame(0, "Paris"), frame(5, "to walk"), ended(7)],
        [frame(1, "is a fine place to walk"), ended(7)],
    )
    async with (
        FakeAgent(FakeLog("trip"), attempts) as agent,
        segue.Client(agent.address, device="phone") as client,
    ):
        session = await client.session("trip")
        async with session.run("Where?") as turn:
            reply = await turn.result()
    assert reply.text == REPLY
    assert len(agent.runs) == 2


async def test_resuming_without_progress_has_an_end() -> None:
    limits = ClientLimits(resume_timeout_s=0.3)
    script = [started("x"), frame(0, "Paris"), Break()]
    async with (
        FakeAgent(FakeLog("trip"), lambda _: script) as agent,
        segue.Client(agent.address, device="phone", limits=limits) as client,
    ):
        session = await client.session("trip")
        async with session.run("Where?") as turn:
            with pytest.raises(errors.Unreachable) as caught:
                await turn.result()
    assert caught.value.fields["turn"] == turn.id
    assert len(agent.runs) < 20  # it waits between its tries
    assert turn.text == "Paris "


async def test_leaving_early_stops_nothing() -> None:
    go_on = asyncio.Event()
    async with (
        FakeAgent(
            FakeLog("trip"), lambda r: [started(r.turn), frame(0, "Paris"), Wait(go_on)]
        ) as agent,
        segue.Client(agent.address, device="phone") as client,
    ):
        session = await client.session("trip")
        async with session.run("Where?") as turn:
            async for event in turn:
                if isinstance(event, segue.Frame):
                    break
        async with asyncio.timeout(5):
            await agent.run_closed.wait()
        assert not agent.stops
        assert await session.stop()
        assert agent.stops[0].turn == ""


async def test_a_cancelled_reader_may_read_on() -> None:
    go_on = asyncio.Event()
    attempts = by_attempt(
        [started("x"), frame(0, "Paris"), Wait(go_on)],
        [frame(1, "is a fine place to walk"), ended(7)],
    )
    async with (
        FakeAgent(FakeLog("trip"), attempts) as agent,
        segue.Client(agent.address, device="phone") as client,
    ):
        session = await client.session("trip")
        async with session.run("Where?") as turn:
            shown = asyncio.Event()

            async def read() -> None:
                async for event in turn:
                    if event.text:
                        shown.set()

            waiting = asyncio.create_task(read())
            await shown.wait()
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert (await turn.result()).text == REPLY
    assert agent.runs[1].from_index == 1


async def test_failed_turn_is_an_event_and_a_typed_error() -> None:
    script = [
        started("x"),
        frame(0, "Paris"),
        ended(1, reason="error", error_code="store_unavailable", error_message="The store died."),
    ]
    async with (
        FakeAgent(FakeLog("trip"), lambda _: script) as agent,
        segue.Client(agent.address, device="phone") as client,
    ):
        session = await client.session("trip")
        async with session.run("Where?") as turn:
            events = await collect(turn)
            with pytest.raises(errors.TurnFailed, match=r"The store died\.") as caught:
                await turn.result()
    assert caught.value.fields["code"] == "store_unavailable"
    last = events[-1]
    assert isinstance(last, segue.Ended)
    assert last.error is not None


async def test_refusals_are_typed_and_raised_on_entry() -> None:
    busy = errors.SessionBusy("Another turn runs.")
    async with (
        FakeAgent(FakeLog("trip"), lambda _: [busy]) as agent,
        segue.Client(agent.address, device="phone") as client,
    ):
        session = await client.session("trip")
        with pytest.raises(errors.SessionBusy):
            async with session.run("Where?", when_busy="refuse"):
                pass
        assert agent.runs[0].when_busy == pb.WHEN_BUSY_REFUSE
        assert len(agent.runs) == 1


@pytest.mark.parametrize(
    "refusal",
    [errors.Overloaded("Full.", retry_after_s=2.0), errors.EngineGone("The engine died.")],
    ids=lambda one: one.code,
)
async def test_a_node_without_room_or_engine_sends_us_to_the_next(
    refusal: errors.SegueError,
) -> None:
    log = FakeLog("trip")
    async with (
        FakeAgent(log, lambda _: [refusal]) as first,
        FakeAgent(log, whole) as second,
    ):
        async with segue.Client([first.address, second.address], device="phone") as client:
            session = await client.session("trip")
            async with session.run("Where?") as turn:
                assert (await turn.result()).text == REPLY
        async with segue.Client(first.address, device="phone") as client:
            session = await client.session("trip")
            with pytest.raises(type(refusal)) as caught:
                async with session.run("Where?"):
                    pass
        assert caught.value.fields == refusal.fields


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"prompt": ""}, errors.EmptyPrompt),
        ({"prompt": " \n"}, errors.EmptyPrompt),
        ({"prompt": "\ud800"}, errors.InvalidArgument),
        ({"prompt": "x" * 300_000}, errors.PromptTooLong),
        ({"max_tokens": 0}, errors.BadSampling),
        ({"max_tokens": -1}, errors.BadSampling),
        ({"max_tokens": 2**40}, errors.BadSampling),
        ({"temperature": float("nan")}, errors.BadSampling),
        ({"temperature": float("inf")}, errors.BadSampling),
        ({"temperature": -0.1}, errors.BadSampling),
        ({"top_p": 0.0}, errors.BadSampling),
        ({"top_p": 1.1}, errors.BadSampling),
        ({"top_k": -1}, errors.BadSampling),
        ({"min_p": float("nan")}, errors.BadSampling),
        ({"seed": -1}, errors.BadSampling),
        ({"seed": 2**64}, errors.BadSampling),
        ({"stop": [""]}, errors.InvalidArgument),
        ({"stop": "one text"}, errors.InvalidArgument),
        ({"stop": ["x"] * 9}, errors.InvalidArgument),
        ({"plan": "magic"}, errors.InvalidArgument),
        ({"when_busy": "maybe"}, errors.InvalidArgument),
        ({"turn": "a/b"}, errors.InvalidArgument),
    ],
)
async def test_bad_input_never_leaves_the_device(
    arguments: dict[str, object], error: type[Exception]
) -> None:
    async with (
        FakeAgent(FakeLog("trip"), whole) as agent,
        segue.Client(agent.address, device="phone") as client,
    ):
        session = await client.session("trip")
        with pytest.raises(error) as caught:
            session.run(**{"prompt": "Where?", **arguments})  # type: ignore[arg-type]
        assert isinstance(caught.value, errors.SegueError)
        assert caught.value.hint
        assert not agent.runs


# -- what becomes of a reply that was made offline ------------------------------------------------


def offline_reply(request: pb.RunTurnRequest) -> list[Step]:
    return [
        started(request.turn, 0),
        frame(0, "Paris is fine", epoch=0, durable=False, made_by="edge"),
    ]


async def settled(*scripts: Sequence[Step]) -> tuple[list[object], segue.Turn, list[bool]]:
    """What a device is told after an offline end; one script per attempt to learn more."""
    limits = ClientLimits(retry_pause_s=0.01)
    attempts = by_attempt(*scripts)

    def script(request: pb.RunTurnRequest) -> Sequence[Step]:
        if request.must_exist:
            return attempts(request)
        return [*offline_reply(request), ended(3, epoch=0, durable=False)]

    async with (
        FakeAgent(FakeLog("trip"), script) as agent,
        segue.Client(agent.address, device="phone", limits=limits) as client,
    ):
        session = await client.session("trip")
        async with session.run("Where to?") as turn:
            await collect(turn)
            assert turn.ended is not None
            assert turn.ended.pending
            told = [event async for event in turn.settled()]
            assert [event async for event in turn.settled()] == []
        return told, turn, [run.must_exist for run in agent.runs]


async def test_a_log_that_keeps_an_offline_reply_makes_it_durable() -> None:
    said = [started("x"), frame(0, "Paris is fine", made_by="edge"), ended(3)]
    told, turn, asked = await settled(said)
    assert [type(event) for event in told] == [segue.Durable, segue.Ended]
    assert turn.text == "Paris is fine "
    assert turn.ended is not None
    assert turn.ended.durable
    assert asked == [False, True]


async def test_a_log_that_went_another_way_takes_an_offline_reply_back() -> None:
    told, turn, _ = await settled([started("x"), frame(0, "Paris was full"), ended(3)])
    assert [type(event) for event in told[:2]] == [segue.Rewound, segue.Frame]
    assert isinstance(told[0], segue.Rewound)
    assert told[0].index == 1
    assert turn.text == "Paris was full "


async def test_a_log_with_a_shorter_reply_takes_the_rest_back() -> None:
    told, turn, _ = await settled([started("x"), frame(0, "Paris is"), ended(2)])
    assert [type(event) for event in told] == [segue.Durable, segue.Rewound, segue.Ended]
    assert turn.text == "Paris is "


async def test_a_log_that_refuses_an_offline_turn_for_good_says_so() -> None:
    request = pb.RunTurnRequest(turn="x")
    end = ended(
        3,
        epoch=0,
        reason="error",
        durable=False,
        error_code="quota_exceeded",
        error_message="The session is full.",
    )
    told, turn, _ = await settled([*offline_reply(request), end])
    (event,) = told
    assert isinstance(event, segue.Ended)
    assert event.error is not None
    assert event.error.fields["code"] == "quota_exceeded"
    assert turn.text == "Paris is fine "


async def test_it_is_waited_for_where_a_node_does_not_know_the_turn_yet() -> None:
    unknown = errors.UnknownTurn("Session trip has no turn x.")
    said = [started("x"), frame(0, "Paris is fine"), ended(3)]
    told, _, asked = await settled([unknown], [Break()], said)
    assert isinstance(told[-1], segue.Ended)
    assert asked == [False, True, True, True]
