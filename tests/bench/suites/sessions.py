"""Sessions to keep: reading one of a million ops, and that nothing acknowledged is missing.

Valkey is real and on loopback. The large session is a conversation (turns of 100 ops) with named
values in between; what reads it is a second instance, which knows nothing of it yet.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from pathlib import Path
from random import Random
from typing import TypeVar

from segue_cloud.log.session_log import SessionLog
from segue_cloud.sessions.port import LogOp, Producer
from segue_cloud.sessions.reader import Page
from segue_cloud.sessions.store import RedisStore
from segue_contract.ids import SessionName
from segue_contract.limits import MAX_READ_ENTRIES, MAX_SESSIONS_LISTED
from segue_contract.model.home import model_directory
from segue_contract.model.manifest import DEFAULT_MODEL
from segue_contract.servers import Valkey
from segue_contract.sync.ops import Frame, Op, Set, TurnEnded, TurnStarted, UserMessage
from segue_contract.sync.state import Cursor, encode_state
from tests.bench.harness import Report
from tests.support.acknowledged import append_under_faults
from tests.support.cloud_rpc import cloud_rpc
from tests.support.scripted_engine import ScriptedEngine

OPS = 1_000_000
QUICK_OPS = 9_000
CALLS = 10_000
QUICK_CALLS = 60
SESSIONS = 10_000
QUICK_SESSIONS = 300
FRAMES_PER_TURN = 96
VALUES_PER_TURN = 1
PAGE_MS = 100.0
SEED = 7
S = SessionName("bench", "long")
T = TypeVar("T")


def run(report: Report, quick: bool) -> None:
    asyncio.run(_run(report, quick))


async def _run(report: Report, quick: bool) -> None:
    async with Valkey.start() as valkey:
        await _long_session(report, valkey.url, QUICK_OPS if quick else OPS)
        await _list(report, valkey.url, QUICK_SESSIONS if quick else SESSIONS)
    async with Valkey.start() as valkey:
        await _acknowledged(report, valkey.url, QUICK_CALLS if quick else CALLS)


async def _long_session(report: Report, url: str, ops: int) -> None:
    writing = await RedisStore.connect(url)
    async with SessionLog(writing) as log:
        appends = await _write(log, ops)
        tail = (await log.tails([S]))[0]
        assert tail is not None
        note = f"turns of {FRAMES_PER_TURN} frames"
        report.row("session_ops", tail.cursor.offset, "ops", note=note)
        slowest = max(appends) * 1000
        note = "one call appends a turn's frames; the log is folded meanwhile"
        report.row("append_ms_max", slowest, "ms", note=note)
    await writing.close()
    reading = await RedisStore.connect(url)
    async with SessionLog(reading) as log:
        first_s, state = await _timed(log.state(S))
        report.row("cold_state_ms", first_s * 1000, "ms", note="by an instance that had none of it")
        size = len(encode_state(state))
        report.row("state_mib", size / 2**20, "MiB", note=f"{len(state.turns)} turns")
        pages = await _read_all(log, Cursor())
        note = f"{len(pages)} pages, from the beginning"
        report.row("read_page_ms_max", max(pages) * 1000, "ms", PAGE_MS, "lower", note)
        near = Cursor(state.cursor.generation, max(state.cursor.offset - 1000, 0))
        pages = await _read_all(log, near)
        report.row("read_tail_page_ms_max", max(pages) * 1000, "ms", PAGE_MS, "lower")
        again_s, _ = await _timed(log.state(S))
        report.row("state_ms", again_s * 1000, "ms", PAGE_MS, "lower", "folded already")
    await reading.close()


async def _write(log: SessionLog, ops: int) -> list[float]:
    """Turns until there are `ops` entries; how long each append of a turn took, seconds."""
    epoch = (await log.open_session(S, device="phone", producer="p")).epoch
    seconds: list[float] = []
    seq, written, number = 1, 0, 0
    while written < ops:
        turn = f"t{number}"
        claim = await log.begin_turn(S, turn, _opening(turn), 30.0)
        batch: list[Op] = [
            Frame(
                id=f"{turn}.{index}", turn=turn, epoch=claim.epoch, index=2 * index,
                tokens=(1000 + index, 2000 + index), pieces=(" some", "thing"),
            )
            for index in range(FRAMES_PER_TURN)
        ]  # fmt: skip
        batch.append(TurnEnded(id=f"{turn}.end", turn=turn, epoch=claim.epoch, reason="stop"))
        took, _ = await _timed(log.append_turn(S, claim.hold(turn), 1, batch, ends=True))
        seconds.append(took)
        value = LogOp.of(Set(id=f"s{number}", device="phone", name=f"n{number % 100}", value=b"v"))
        await log.append(S, Producer("p", epoch, seq), [value])
        seq += 1
        written += 2 + len(batch) + VALUES_PER_TURN
        number += 1
    return seconds


def _opening(turn: str) -> list[Op]:
    text = "What is there to be seen from the lighthouse?"
    return [
        UserMessage(id=f"{turn}.user", device="phone", turn=turn, text=text),
        TurnStarted(id=f"{turn}.started", turn=turn, epoch=1, max_tokens=2 * FRAMES_PER_TURN),
    ]


async def _read_all(log: SessionLog, after: Cursor) -> list[float]:
    """Seconds of each page up to the tail."""
    seconds: list[float] = []
    while True:
        took, page = await _timed(log.read(S, after, MAX_READ_ENTRIES))
        seconds.append(took)
        end: Cursor | None = page.end if isinstance(page, Page) else None
        if end is None or end.offset >= page.tail.offset:
            return seconds
        after = end


async def _list(report: Report, url: str, sessions: int) -> None:
    """Pages of a tenant's list."""
    store = await RedisStore.connect(url)
    for number in range(sessions):
        await store.open_session(SessionName("bench", f"s{number}"))
    seconds: list[float] = []
    listed, after = 0, ""
    while True:
        took, (page, after) = await _timed(
            store.keeper.list_sessions("bench", MAX_SESSIONS_LISTED, after)
        )
        seconds.append(took)
        listed += len(page)
        if not after:
            break
    await store.close()
    note = f"{listed} sessions in {len(seconds)} pages"
    report.row("list_page_ms_max", max(seconds) * 1000, "ms", PAGE_MS, "lower", note)


async def _acknowledged(report: Report, url: str, calls: int) -> None:
    model: Path = model_directory(DEFAULT_MODEL)
    began = time.monotonic()
    async with cloud_rpc(url, model, ScriptedEngine([]), folds=False) as cloud:
        found = await append_under_faults(cloud.address, "trip", calls, Random(SEED))
    note = f"{calls} calls of three clients of one device, links cut, in "
    note += f"{time.monotonic() - began:.0f} s"
    report.row("acknowledged_ops", found.acknowledged, "ops", note=note)
    report.row("missing_ops", len(found.missing) + len(found.moved), "ops", 0, "lower")
    report.row("doubled_ops", len(found.doubled), "ops", 0, "lower")


async def _timed(call: Awaitable[T]) -> tuple[float, T]:
    began = time.perf_counter()
    result = await call
    return time.perf_counter() - began, result
