"""Following a session while its broker dies, hangs, is away, or brings nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import cast

import pytest

import segue
from segue._inbox import Inbox, Link, Tail
from segue._nodes import Nodes
from segue._tails import Tails, TailSink
from segue_contract.errors import (
    PermissionDenied,
    Revoked,
    Unauthenticated,
    Unreachable,
)
from segue_contract.limits import ClientLimits
from segue_contract.servers import Broker
from segue_contract.sync.state import Cursor
from segue_contract.v1 import agent_pb2 as pb
from tests.support.fake_agent import FakeAgent, FakeLog
from tests.support.followers import WAIT_S, Seen, following, op, publishing


async def test_broker_dies_and_comes_back(broker: Broker) -> None:
    log = FakeLog("trip")
    async with (
        FakeAgent(log, mqtt_url=broker.url) as agent,
        following([agent.address]) as seen,
    ):
        log.append(op(1))
        async with publishing(broker, log) as cloud:
            await cloud.entries(1)
            await seen.until_offset(1)
        broker.process.kill()
        await broker.process.wait()
        for number in range(2, 12):
            log.append(op(number))
            await seen.until_offset(number)
            assert seen.lives[-1] == "grpc"
        await broker.restart()
        async with publishing(broker, log) as cloud:
            number = 11
            while seen.lives[-1] != "mqtt":
                number += 1
                log.append(op(number))
                await cloud.entries(number)
                await seen.until_offset(number)
            log.append(op(number + 1))
            await cloud.entries(number + 1)
            await seen.until_offset(number + 1)
        assert seen.offsets == list(range(1, number + 2))
        assert agent.attaches == 1


async def test_an_unreachable_broker_is_no_reason_to_wait() -> None:
    log = FakeLog("trip")
    log.append(op(1))
    async with (
        FakeAgent(log, mqtt_url="mqtt://127.0.0.1:1") as agent,
        following([agent.address]) as seen,
    ):
        log.append(op(2))
        await seen.until_offset(2)
        assert seen.offsets == [2]
        assert seen.lives[-1] == "grpc"


async def test_what_the_broker_does_not_bring_comes_from_the_log_and_then_by_grpc(
    broker: Broker,
) -> None:
    """The cloud publishes into another broker, or into none: this one is silent and well."""
    log = FakeLog("trip")
    async with (
        FakeAgent(log, mqtt_url=broker.url) as agent,
        following([agent.address], limits=ClientLimits(beside_min_s=0.0)) as seen,
    ):
        assert seen.follower.live == "mqtt"
        log.append(op(1))
        await seen.until_offset(1)
        log.append(op(2))
        await seen.until_offset(2)
        assert seen.lives[-1] == "grpc"
        assert agent.attaches == 1
        async with publishing(broker, log) as cloud:
            number = 2
            while seen.lives[-1] != "mqtt":  # it brings everything again
                number += 1
                log.append(op(number))
                await cloud.entries(number)
                await seen.until_offset(number)
        assert seen.offsets == list(range(1, number + 1))


async def test_a_cloud_that_cannot_publish_says_so(broker: Broker) -> None:
    log = FakeLog("trip")
    async with FakeAgent(log, mqtt_url=broker.url) as agent:
        agent.publishing = False
        async with following([agent.address]) as seen:
            async with asyncio.timeout(WAIT_S):
                while not agent.attaches:  # noqa: ASYNC110 - the agent tells nobody
                    await asyncio.sleep(0.01)
            log.append(op(1))
            await seen.until_offset(1)
            assert seen.lives[-1] == "grpc"


class Sessions:
    """`Tails` of several sessions, whose own follower each is; only some may be asked for."""

    def __init__(self, error: Exception, *refused: str) -> None:
        self.error, self.refused = error, refused
        self.lost: list[str] = []
        self.told: list[str] = []

    async def unary(self, method: str, request: pb.TailsRequest) -> pb.TailsReply:
        if any(one in self.refused for one in request.sessions):
            raise self.error
        tails = [pb.Cursor(generation=1, offset=1) for _ in request.sessions]
        return pb.TailsReply(tails=tails, publishing=True)

    def sink(self, session: str) -> TailSink:
        told, lost = self.told, self.lost

        class Sink:
            cursor = Cursor(1, 0)

            def on_tail(self, tail: Tail) -> None:
                told.append(session)

            def on_lost(self) -> None:
                lost.append(session)

        return Sink()


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (Revoked("This device was revoked."), ["b"]),
        (PermissionDenied("Not of this token."), ["b"]),
        (Unauthenticated("The token ran out."), ["a", "b", "c", "d", "e"]),
        (Unreachable("Nobody answers."), []),
        (KeyError("The app's token function failed."), []),
    ],
)
async def test_a_refused_question_reaches_the_followers_that_it_concerns(
    error: Exception, lost: list[str]
) -> None:
    sessions = Sessions(error, "b")
    tails = Tails(cast(Nodes, sessions), "phone", uniform=lambda _low, _high: 0.0)
    for name in "abcde":
        tails.add(name, sessions.sink(name))
    await tails._ask(list("abcde"))
    await tails.close()
    assert sessions.lost == lost
    assert set(sessions.told) == (set("abcde") - set(lost) if len(lost) == 1 else set())


async def test_a_revoked_device_reads_no_further_over_mqtt(broker: Broker) -> None:
    log = FakeLog("trip")
    async with (
        FakeAgent(log, mqtt_url=broker.url) as agent,
        segue.Client([agent.address], device="laptop") as client,
    ):
        seen = Seen((await client.session("trip")).follow())
        running = asyncio.ensure_future(seen.run())
        await seen.until(lambda one: bool(one.items))
        assert seen.follower.live == "mqtt"
        agent.fail_once["Read"] = agent.tails_error = Revoked("This device was revoked.")
        with pytest.raises(Revoked):
            await asyncio.wait_for(running, WAIT_S)


async def test_a_broker_that_hangs_holds_up_nobody(broker: Broker) -> None:
    log = FakeLog("trip")
    async with (
        FakeAgent(log, mqtt_url=broker.url) as agent,
        following([agent.address]) as seen,
    ):
        os.kill(broker.process.pid, signal.SIGSTOP)
        try:
            for number in range(1, 4):
                log.append(op(number))
                await seen.until_offset(number)
            assert seen.lives[-1] == "grpc"
            assert agent.attaches == 1
        finally:
            os.kill(broker.process.pid, signal.SIGCONT)


async def test_a_reader_that_sleeps_finds_one_word_about_the_link_not_one_for_each_second() -> None:
    inbox = Inbox()
    for number in range(1000):
        inbox.put(Link(False))
        inbox.put(Tail(Cursor(1, number), True))
    assert await inbox.get(0.0) == Link(False)
    assert await inbox.get(0.0) == Tail(Cursor(1, 999), True)
    assert await inbox.get(0.0) is None


async def test_nothing_of_the_mqtt_library_reaches_a_terminal(broker: Broker) -> None:
    """Many sessions at once, an unsubscription whose answer is late, a broker that is killed."""
    program = """
import asyncio, os, signal, sys
from segue._mqtt import Broker

class Sink:
    def on_message(self, topic, payload): pass
    def on_link(self, up): self.up.set() if up else None
    def __init__(self): self.up = asyncio.Event()

async def main(url, pid):
    broker, sinks = Broker(url), [Sink() for _ in range(150)]
    await asyncio.gather(*(broker.add([f"t/{n}"], sink) for n, sink in enumerate(sinks)))
    await asyncio.gather(*(sink.up.wait() for sink in sinks))
    await asyncio.gather(*(broker.add([f"u/{n}"], sink) for n, sink in enumerate(sinks)))
    os.kill(pid, signal.SIGSTOP)
    await asyncio.gather(*(broker.remove([f"u/{n}"], sink) for n, sink in enumerate(sinks)))
    os.kill(pid, signal.SIGCONT)
    await asyncio.sleep(0.3)
    os.kill(pid, signal.SIGKILL)
    await asyncio.sleep(0.3)
    await broker.close()

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, broker.url, str(broker.process.pid),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    said, _ = await asyncio.wait_for(child.communicate(), 60)
    assert (child.returncode, said.decode()) == (0, "")


IDLE = ClientLimits(use_s=0.0)  # a session that nobody uses: only its own news are a use


async def _asked_again(agent: FakeAgent, seen: Seen) -> None:
    """The link's loss is known, and the log's tail was asked for since."""
    async with asyncio.timeout(WAIT_S):
        while seen.follower.live != "grpc":  # noqa: ASYNC110 - no event says it
            await asyncio.sleep(0.01)
        asked = agent.tail_calls
        while agent.tail_calls < asked + 2:  # noqa: ASYNC110 - the agent tells nobody
            await asyncio.sleep(0.01)


async def test_a_session_that_nobody_uses_needs_no_stream_when_the_broker_dies(
    broker: Broker,
) -> None:
    log = FakeLog("trip")
    async with (
        FakeAgent(log, mqtt_url=broker.url) as agent,
        following([agent.address], limits=IDLE) as seen,
    ):
        broker.process.kill()
        await broker.process.wait()
        await _asked_again(agent, seen)
        assert agent.attaches == 0
        log.append(op(1))
        await seen.until_offset(1)
        assert agent.attaches == 1, "its news opened one"
        reads = agent.reads
        await broker.restart()
        async with publishing(broker, log) as cloud:
            async with asyncio.timeout(WAIT_S):
                while seen.follower.live != "mqtt":  # noqa: ASYNC110 - no event says it
                    await asyncio.sleep(0.01)
            log.append(op(2))
            await cloud.entries(2)
            await seen.until_offset(2)
        assert seen.offsets == [1, 2]
        assert agent.reads == reads, "what was missed would have shown in the tail"


async def test_a_cloud_that_cannot_publish_opens_no_stream_for_a_session_that_nobody_uses(
    broker: Broker,
) -> None:
    log = FakeLog("trip")
    async with FakeAgent(log, mqtt_url=broker.url) as agent:
        agent.publishing = False
        async with following([agent.address], limits=IDLE) as seen:
            async with asyncio.timeout(WAIT_S):
                while agent.tail_calls < 3:  # noqa: ASYNC110 - the agent tells nobody
                    await asyncio.sleep(0.01)
            assert agent.attaches == 0
            log.append(op(1))
            await seen.until_offset(1)
            assert seen.lives[-1] == "grpc"


async def test_without_broker_and_tails_even_an_unused_session_has_a_stream(
    broker: Broker,
) -> None:
    log = FakeLog("trip")
    async with (
        FakeAgent(log, mqtt_url=broker.url) as agent,
        following([agent.address], limits=IDLE) as seen,
    ):
        agent.tails_error = Unreachable("This node cannot say.")
        broker.process.kill()
        await broker.process.wait()
        async with asyncio.timeout(WAIT_S):
            while not agent.attaches:  # noqa: ASYNC110 - the agent tells nobody
                await asyncio.sleep(0.01)
        log.append(op(1))
        await seen.until_offset(1)
