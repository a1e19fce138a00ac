"""Heartbeats in long streams, and readers that take silence for a loss."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segue_contract.errors import Overloaded, Unreachable
from segue_contract.limits import STALL_FACTOR, STALL_LOOK_S, STALL_S
from segue_contract.liveness import Silence, StallWatch, UsualTime
from segue_contract.transport.heartbeat import EOF, Listening, answered, beating
from segue_contract.transport.stalls import StallMonitor
from segue_contract.v1 import agent_pb2 as pb

BEAT = pb.TurnEvent(heartbeat=pb.Heartbeat())
LEAVING = pb.TurnEvent(heartbeat=pb.Heartbeat(leaving=True))
STALLED = pb.TurnEvent(heartbeat=pb.Heartbeat(stalled=True))
FRAME = pb.TurnEvent(frame=pb.TokenFrame(index=1))


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 9))
def test_a_peer_is_lost_after_so_many_looks_in_a_row(heard: list[bool], looks: int) -> None:
    silence = Silence(looks)
    quiet = 0
    for one in heard:
        if one:
            silence.heard()
            quiet = 0
        else:
            quiet += 1
            assert silence.look() == (quiet >= looks)
        assert silence.lost == (quiet >= looks)


async def test_every_item_comes_once_and_in_order_with_beats_where_it_is_quiet() -> None:
    go_on = asyncio.Event()

    async def source() -> AsyncIterator[str]:
        for number in range(100):
            yield str(number)
        await go_on.wait()
        yield "last"

    found = []
    async for item in beating(source(), lambda: "beat", every_s=0.01):
        found.append(item)
        if found.count("beat") == 3:
            go_on.set()
    assert [item for item in found if item != "beat"] == [str(n) for n in range(100)] + ["last"]
    assert found[:100] == [str(n) for n in range(100)]


async def test_the_source_s_error_comes_behind_its_items_and_leaving_ends_it() -> None:
    closed = asyncio.Event()

    async def source(fails: bool) -> AsyncIterator[int]:
        try:
            yield 1
            if fails:
                raise Overloaded("Too much.")
            await asyncio.Event().wait()
        finally:
            closed.set()

    failing = beating(source(True), lambda: 0)
    assert await anext(failing) == 1
    with pytest.raises(Overloaded):
        await anext(failing)
    closed.clear()
    stream = beating(source(False), lambda: 0)
    assert await anext(stream) == 1
    await stream.aclose()
    assert closed.is_set()


async def test_a_source_is_read_no_further_than_its_reader_is() -> None:
    last = 0

    async def source() -> AsyncIterator[int]:
        nonlocal last
        for last in range(100):
            yield last

    stream = beating(source(), lambda: -1)
    for number in range(3):
        assert await anext(stream) == number
        for _ in range(10):
            await asyncio.sleep(0)
        assert last == number
    await stream.aclose()


class ScriptedCall:
    """A stream call: says `script`, then nothing."""

    def __init__(self, *script: Any) -> None:
        self.messages: asyncio.Queue[Any] = asyncio.Queue()
        for message in script:
            self.messages.put_nowait(message)
        self.cancelled = False
        self._reading: asyncio.Task[Any] | None = None

    async def read(self) -> Any:
        self._reading = asyncio.create_task(self.messages.get())
        return await self._reading

    def cancel(self) -> None:
        self.cancelled = True
        if self._reading is not None:
            self._reading.cancel()


async def test_silence_ends_a_call_and_heartbeats_do_not_reach_the_reader() -> None:
    call = ScriptedCall(BEAT, FRAME, BEAT)
    listening = Listening(call, silence_s=0.12)
    assert await listening.read() == FRAME
    with pytest.raises(Unreachable, match="said nothing"):
        await listening.read()
    assert listening.silent
    assert call.cancelled


async def test_who_does_not_read_hears_no_silence() -> None:
    call = ScriptedCall(FRAME)
    listening = Listening(call, silence_s=0.03)
    await asyncio.sleep(0.1)
    assert await listening.read() == FRAME
    assert not listening.silent
    listening.cancel()


async def test_a_peer_whose_compute_hangs_is_left_where_another_can_go_on() -> None:
    call = ScriptedCall()
    call.messages.put_nowait(FRAME)
    call.messages.put_nowait(STALLED)
    listening = Listening(call, others=True)
    assert await listening.read() == FRAME
    with pytest.raises(Unreachable, match="no progress"):
        await listening.read()
    assert listening.silent
    assert call.cancelled


async def test_alone_it_is_waited_for() -> None:
    call = ScriptedCall()
    listening = Listening(call, silence_s=0.3)
    for message in (STALLED, STALLED, FRAME):
        call.messages.put_nowait(message)
    assert await listening.read() == FRAME
    listening.cancel()


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 12)), max_size=12),
    st.sampled_from([0.01, 0.15, 0.4, math.inf]),
)
def test_only_one_step_for_long_is_a_hang(runs: list[tuple[int, int]], usual_s: float) -> None:
    """`runs`: a step's number (0: none runs) and how many looks find it, one after another."""
    watch = StallWatch()
    seen, looks = 0, 0
    bound = max(STALL_S, STALL_FACTOR * usual_s)
    for step, count in runs:
        for _ in range(count):
            looks = looks + 1 if step and step == seen else 0
            seen = step
            assert watch.look(float(step), usual_s) == (looks * STALL_LOOK_S >= bound)


@given(st.lists(st.floats(0.001, 10.0), min_size=1, max_size=50))
def test_the_usual_time_is_no_less_than_any_of_the_last_steps(times: list[float]) -> None:
    usual = UsualTime()
    assert math.isinf(usual.seconds)
    for seconds in times:
        usual.took(seconds)
        assert seconds <= usual.seconds <= max(times)
    assert all(usual.seconds >= 0.9 * seconds for seconds in times[-5:])


async def test_a_monitor_says_when_a_thread_hangs_and_when_it_goes_on() -> None:
    step = 1.0
    monitor = StallMonitor(lambda: (step, 0.001), "test", every_s=0.001)
    monitor.start()
    with pytest.raises(Overloaded, match="no progress"):
        await asyncio.wait_for(monitor.guard(asyncio.sleep(60)), 20)
    assert monitor.stalled
    step = 0.0
    async with asyncio.timeout(20):
        while monitor.stalled:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert await monitor.guard(asyncio.sleep(0, "done")) == "done"
    await monitor.close()


async def test_a_loop_that_stood_still_is_not_the_peer_s_silence() -> None:
    import time

    call = ScriptedCall()
    listening = Listening(call, silence_s=0.3)
    reading = asyncio.create_task(listening.read())
    await asyncio.sleep(0)
    time.sleep(0.6)  # noqa: ASYNC251 - as a machine that schedules nobody
    call.messages.put_nowait(FRAME)
    assert await reading == FRAME
    listening.cancel()


async def test_who_slept_knows_it_for_as_long_as_the_peer_may_have_given_up() -> None:
    import time

    call = ScriptedCall(FRAME, FRAME)
    listening = Listening(call, silence_s=0.1)
    assert await listening.read() == FRAME
    assert not listening.slept
    time.sleep(0.3)  # noqa: ASYNC251 - as a process that was stopped
    assert listening.slept
    assert await listening.read() == FRAME, "what the peer said before it gave up"
    assert listening.slept
    async with asyncio.timeout(20):
        while listening.slept:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    listening.cancel()


async def test_the_end_and_being_cancelled_stay_what_they_are() -> None:
    listening = Listening(ScriptedCall(FRAME, EOF))
    assert [message async for message in listening] == [FRAME]
    listening = Listening(ScriptedCall())
    reading = asyncio.create_task(listening.read())
    await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert not listening.silent


async def test_a_slow_answer_is_waited_for_while_there_are_signs_of_life() -> None:
    pings = 0
    enough = asyncio.Event()

    async def ping(timeout_s: float) -> None:
        nonlocal pings
        pings += 1
        if pings == 3:
            enough.set()

    async def slow() -> str:
        await enough.wait()
        return "at last"

    assert await answered(slow(), ping, silence_s=0.02) == "at last"
    assert await answered(slow(), ping, silence_s=0.02) == "at last"


async def test_no_answer_and_no_sign_of_life_is_a_loss() -> None:
    async def ping(timeout_s: float) -> None:
        raise grpc.aio.AioRpcError(
            grpc.StatusCode.DEADLINE_EXCEEDED, grpc.aio.Metadata(), grpc.aio.Metadata()
        )

    never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    with pytest.raises(Unreachable, match="did not answer"):
        await answered(never, ping, silence_s=0.02)
    assert never.cancelled()
    with pytest.raises(Overloaded):
        await answered(_refuse(), ping)


async def _refuse() -> None:
    raise Overloaded("Too much.")


async def test_news_are_told_at_once_though_the_stream_is_never_quiet() -> None:
    news = asyncio.Event()

    async def source() -> AsyncIterator[str]:
        for number in range(1000):
            await asyncio.sleep(0)
            if number == 5:
                news.set()
            yield str(number)

    stream = beating(source(), lambda: f"leaving: {news.is_set()}", every_s=600.0, news=news)
    found = [item async for item in stream]
    assert found.count("leaving: True") == 1
    assert found.index("leaving: True") < 20
    assert [item for item in found if "leaving" not in item] == [str(n) for n in range(1000)]


async def test_a_peer_that_leaves_is_left_once_somebody_else_is_ready() -> None:
    ready = asyncio.Event()
    asked: list[bool] = []

    async def prepare(leaving: bool) -> None:
        asked.append(leaving)
        await ready.wait()

    call = ScriptedCall(FRAME, LEAVING, LEAVING, FRAME)
    listening = Listening(call, silence_s=60.0, prepare=prepare)
    assert [await listening.read(), await listening.read()] == [FRAME, FRAME]
    reading = asyncio.create_task(listening.read())
    await asyncio.sleep(0.01)
    assert not reading.done(), "it goes on until then"
    ready.set()
    with pytest.raises(Unreachable, match="being stopped"):
        await reading
    assert asked == [True]
    assert not listening.silent


async def test_where_nobody_can_get_ready_a_leaving_peer_is_read_to_its_end() -> None:
    async def prepare(leaving: bool) -> None:
        raise Unreachable("There is no other node.")

    listening = Listening(ScriptedCall(LEAVING, FRAME, FRAME, EOF), prepare=prepare)
    assert [message async for message in listening] == [FRAME, FRAME]


async def test_somebody_gets_ready_while_a_peer_is_quiet_and_before_it_is_lost() -> None:
    asked: list[bool] = []

    async def prepare(leaving: bool) -> None:
        asked.append(leaving)

    call = ScriptedCall(FRAME)
    listening = Listening(call, silence_s=0.12, prepare=prepare)
    assert await listening.read() == FRAME
    with pytest.raises(Unreachable, match="said nothing"):
        await listening.read()
    assert asked == [False], "once"
    assert listening.silent
