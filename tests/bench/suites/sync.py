"""From one device to the others: a frame handed to the log until the last device has applied it.

Valkey and the broker are real and on loopback; five devices, each with a replica, live in another
process. Peers in the same run: Redis pub/sub and a blocking read of a stream, both without
fencing, cursor, or anything for a device that was away.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from collections.abc import Awaitable, Callable
from importlib.util import find_spec

import redis.asyncio as redis

from segue_cloud.log.session_log import SessionLog
from segue_cloud.mqtt.publisher import Publisher
from segue_cloud.sessions.port import TurnHold
from segue_cloud.sessions.store import RedisStore
from segue_contract.ids import SessionName
from segue_contract.servers import Broker, ChildProcess, Valkey
from segue_contract.sync import ops
from tests.bench.harness import ROOT, Report
from tests.support.producers import producer

DEVICES = 5
RATE_HZ = 60.0
SECONDS = 20.0
PEER_SECONDS = 6.0
WARM_FRAMES = 30
MS = 1e6

Send = Callable[[int], Awaitable[None]]


def run(report: Report, quick: bool) -> None:
    asyncio.run(_run(report, quick))


async def _run(report: Report, quick: bool) -> None:
    frames = int((1.0 if quick else SECONDS) * RATE_HZ)
    peer_frames = int((0.5 if quick else PEER_SECONDS) * RATE_HZ)
    async with Valkey.start() as valkey:
        async with Broker.start() as broker:
            note = f"{DEVICES} devices, {RATE_HZ:.0f} frames/s, {broker.kind}"
            delays, appends = await _segue(valkey, broker, "bench", frames)
        report.row(
            "device_to_device_ms_p99", _quantile(delays, 0.99) / MS, "ms", 10.0, "lower", note
        )
        report.row("device_to_device_ms_p50", _quantile(delays, 0.5) / MS, "ms")
        report.row("device_to_device_ms_max", max(delays) / MS, "ms")
        if find_spec("iotcore") is not None and broker.kind != "iotcore":
            async with Broker.start(kind="iotcore") as other:
                delays, _ = await _segue(valkey, other, "bench-iotcore", peer_frames)
            note = "the embedded broker"
            report.row("iotcore_ms_p99", _quantile(delays, 0.99) / MS, "ms", note=note)
            report.row("iotcore_ms_p50", _quantile(delays, 0.5) / MS, "ms", note=note)
        report.row("append_ms_p50", _quantile(appends, 0.5) / MS, "ms")
        report.row("append_ms_p99", _quantile(appends, 0.99) / MS, "ms")
        report.row("appends_per_s_1", await _appends_per_s(valkey, 1, quick), "1/s")
        report.row("appends_per_s_16", await _appends_per_s(valkey, 16, quick), "1/s")
        async with redis.from_url(valkey.url) as client:

            async def publish(number: int) -> None:
                await client.publish("peer", ops.encode_op(_frame(number)))

            async def add(number: int) -> None:
                await client.xadd("peer-stream", {"o": ops.encode_op(_frame(number))})

            for mode, name, send in (
                ("pubsub", "peer", publish),
                ("xread", "peer-stream", add),
            ):
                delays = await _measure(mode, valkey.url, name, peer_frames, send)
                report.row(f"{mode}_ms_p50", _quantile(delays, 0.5) / MS, "ms", note="peer")
                report.row(f"{mode}_ms_p99", _quantile(delays, 0.99) / MS, "ms", note="peer")


async def _segue(
    valkey: Valkey, broker: Broker, session: str, frames: int
) -> tuple[list[int], list[int]]:
    """Delays to the last device, and how long each append took; ns."""
    store = await RedisStore.connect(valkey.url)
    appends: list[int] = []
    name = SessionName("default", session)
    hold = TurnHold("t", 0, "")
    async with Publisher(broker.url, store) as publisher, SessionLog(store, publisher) as log:
        await log.open_session(name)
        assert await publisher.wait_connected()

        async def send(number: int) -> None:
            nonlocal hold
            began = time.monotonic_ns()
            if number == 0:
                opening = [
                    ops.UserMessage(id="u", turn="t", text="hello"),
                    ops.TurnStarted(id="s", turn="t", epoch=1),
                ]
                hold = (await log.begin_turn(name, "t", opening)).hold("t")
            await log.append_turn(name, hold, number + 1, [_frame(number)])
            appends.append(time.monotonic_ns() - began)

        delays = await _measure("segue", broker.url, session, frames, send)
        state = await log.state(name)
        assert state.turns[0].text == "".join(f"word{i} " for i in range(WARM_FRAMES + frames))
    await store.close()
    return delays, appends[WARM_FRAMES:]


async def _measure(mode: str, url: str, name: str, frames: int, send: Send) -> list[int]:
    """Delays in ns of `frames` frames at a steady pace, each to the last device."""
    total = WARM_FRAMES + frames
    lines: list[str] = []
    devices = await ChildProcess.start(
        "devices",
        [sys.executable, "-m", "tests.bench.suites._sync_devices", mode, url, name,
         str(DEVICES), str(total)],
        ready=lambda line: line == "ready",
        cwd=ROOT,
        on_line=lines.append,
    )  # fmt: skip
    handed: list[int] = []
    gc.collect()
    gc.freeze()  # as a server does after its start: no long collections later
    began = time.monotonic()
    for number in range(total):
        await asyncio.sleep(max(0.0, began + number / RATE_HZ - time.monotonic()))
        handed.append(time.monotonic_ns())
        await send(number)
    async with asyncio.timeout(30):
        status = await devices.wait()
    await devices.stop()
    assert status == 0, devices.log_tail()
    applied: list[list[int]] = json.loads(lines[-1])
    last = [max(times) for times in zip(*applied, strict=True)]
    assert len(last) == total
    return [done - start for start, done in zip(handed, last, strict=True)][WARM_FRAMES:]


async def _appends_per_s(valkey: Valkey, writers: int, quick: bool) -> float:
    """Appends that `writers` tasks get done in a second, each to a session of its own."""
    store = await RedisStore.connect(valkey.url)
    until = time.monotonic() + (0.2 if quick else 2.0)
    data = ops.encode_op(_frame(1))

    async def write(session: str) -> int:
        name = SessionName("default", session)
        await store.open_session(name)
        done = 0
        while time.monotonic() < until:
            done += 1
            await store.append(name, await producer(store, name, "p", done), [data])
        return done

    began = time.monotonic()
    counts = await asyncio.gather(*(write(f"w{writers}.{i}") for i in range(writers)))
    seconds = time.monotonic() - began
    await store.close()
    return sum(counts) / seconds


def _frame(number: int) -> ops.Frame:
    return ops.Frame(
        id=f"t.1.{number}", device="phone", at_ms=number, turn="t", epoch=1, index=number,
        tokens=(number,), pieces=(f"word{number} ",),
    )  # fmt: skip


def _quantile(values: list[int], share: float) -> float:
    ordered = sorted(values)
    return float(ordered[min(len(ordered) - 1, int(share * len(ordered)))])
