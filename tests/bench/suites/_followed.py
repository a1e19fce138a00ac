"""Rows of the load suite about followed sessions: 10,000 of them on one cloud, nearly all idle.

Two measurements, each with a real store and broker:

- the hub and the publisher's sweep by themselves, in this process, with a follower per session: how
  much of a core they take while nothing is appended;
- a real cloud with devices that follow over MQTT, in a process of their own: how much of a core all
  this takes of the cloud, what an append to one of these sessions costs, and when it is seen.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import psutil

import segue
from segue.local.parts import Program, module_command
from segue_cloud.log.session_log import SessionLog
from segue_cloud.mqtt.publisher import Publisher
from segue_cloud.sessions.port import LogOp, Producer
from segue_cloud.sessions.store import RedisStore
from segue_contract.ids import SessionName
from segue_contract.limits import SHUTDOWN_GRACE_S
from segue_contract.servers import Broker, ChildProcess, Valkey
from segue_contract.sync.ops import Set
from tests.bench.harness import ROOT, Report

SESSIONS = 10_000
PER_DEVICE = 250
APPENDS = 2000
APPENDS_PER_S = 100.0
WRITERS = 50  # of the followed sessions that are appended to
IDLE_S = 10.0
START_TIMEOUT_S = 900.0


async def followed_rows(report: Report, quick: bool) -> None:
    sessions = 200 if quick else SESSIONS
    async with Valkey.start() as valkey, Broker.start() as broker:
        share = await _hub_share(valkey.url, broker.url, sessions, 0.5 if quick else IDLE_S)
    report.row(
        "hub_and_sweep_idle_core_share",
        share,
        "of a core",
        target=None if quick else 0.05,
        better="lower",
        note=f"{sessions} followers in this process, each session written to before",
    )
    await _cloud_rows(report, quick, sessions)


def _value() -> Set:
    return Set(id="written", device="writer", name="asked", value=b"0")


async def _hub_share(redis_url: str, mqtt_url: str, sessions: int, seconds: float) -> float:
    store = await RedisStore.connect(redis_url)
    names = [SessionName("default", f"s{number}") for number in range(sessions)]
    async with AsyncExitStack() as stack:
        stack.push_async_callback(store.close)
        publisher = await stack.enter_async_context(Publisher(mqtt_url, store))
        log = await stack.enter_async_context(SessionLog(store, publisher))
        for name in names:
            await log.open_session(name)
            following = await stack.enter_async_context(log.follow(name))
            await anext(following)
            # Written to lately, so the sweep looks at it.
            opened = await log.open_session(name, producer="writer")
            await log.append(name, Producer("writer", opened.epoch), [LogOp.of(_value())])
        await asyncio.sleep(min(seconds, SHUTDOWN_GRACE_S))  # heads and marks are on their way
        before, began = time.process_time(), time.monotonic()
        await asyncio.sleep(seconds)
        return (time.process_time() - before) / (time.monotonic() - began)


@asynccontextmanager
async def _cloud(redis_url: str, mqtt_url: str) -> AsyncIterator[Program]:
    with tempfile.TemporaryDirectory(prefix="segue-followed-") as folder:
        program = Program(
            "cloud",
            module_command("segue", "cloud", "--port", "0"),
            log=Path(folder) / "cloud.log",
            env={**os.environ, "SEGUE_REDIS_URL": redis_url, "SEGUE_MQTT_URL": mqtt_url},
        )
        await program.start()
        try:
            yield program
        finally:
            await program.stop()


async def _cloud_rows(report: Report, quick: bool, sessions: int) -> None:
    idle_s = 1.0 if quick else IDLE_S
    appends = 50 if quick else APPENDS
    note = f"{sessions} sessions followed over MQTT, {PER_DEVICE} by a device"
    async with (
        Valkey.start() as valkey,
        Broker.start() as broker,
        _cloud(valkey.url, broker.url) as cloud,
    ):
        alone = await _core_share(cloud.pid, idle_s)
        lines: list[str] = []
        devices = await ChildProcess.start(
            "devices",
            [sys.executable, "-m", "tests.bench.suites._followers", cloud.address,
             str(sessions), str(PER_DEVICE), str(appends)],
            ready=lambda line: line == "ready",
            cwd=ROOT,
            timeout_s=START_TIMEOUT_S,
            on_line=lines.append,
        )  # fmt: skip
        try:
            followed = await _core_share(cloud.pid, idle_s)
            waits = await _appends(cloud.address, sessions, appends)
            async with asyncio.timeout(60):
                status = await devices.wait()
        finally:
            await devices.stop()
        assert status == 0, devices.log_tail()
    seen = json.loads(lines[-1])
    row = report.row
    row("cloud_idle_core_share", alone, "of a core", note="nobody follows")
    row("cloud_followed_core_share", followed, "of a core", better="lower", note=note)
    row("sessions_10k_append_p50_ms", _quantile(waits, 0.5), "ms", better="lower")
    row(
        "sessions_10k_append_p99_ms",
        _quantile(waits, 0.99),
        "ms",
        target=None if quick else 20.0,
        better="lower",
        note=f"{APPENDS_PER_S:.0f} appends a second; {note}",
    )
    lags = seen["lags_ms"]
    row("sessions_10k_seen_p50_ms", _quantile(lags, 0.5), "ms", note="to the follower")
    row("sessions_10k_seen_p99_ms", _quantile(lags, 0.99), "ms", better="lower")
    row("sessions_10k_over_mqtt", seen["over_mqtt"], "followers", note="as they began")


async def _core_share(pid: int, seconds: float) -> float:
    """How much of one core a process takes for so long, once it has come to rest."""
    process = psutil.Process(pid)
    await asyncio.sleep(min(seconds, SHUTDOWN_GRACE_S))
    before, began = process.cpu_times(), time.monotonic()
    await asyncio.sleep(seconds)
    after, seconds = process.cpu_times(), time.monotonic() - began
    return (after.user + after.system - before.user - before.system) / seconds


async def _appends(address: str, sessions: int, count: int) -> list[float]:
    """How long each append took, ms; at a steady pace, whatever the ones before take."""
    waits: list[float] = []
    async with segue.Client(address, device="writer") as client:
        every = max(1, sessions // WRITERS)
        writers = [await client.session(f"s{number}") for number in range(0, sessions, every)]

        async def append(number: int) -> None:
            began = time.monotonic_ns()
            await writers[number % len(writers)].append(
                Set(id="", name="asked", value=str(began).encode())
            )
            waits.append((time.monotonic_ns() - began) / 1e6)

        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number in range(count):
                await asyncio.sleep(max(0.0, began + number / APPENDS_PER_S - time.monotonic()))
                group.create_task(append(number))
    return waits


def _quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
