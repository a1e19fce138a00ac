"""A large state is read, written, sent and dropped while others go on: by the order of events."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from segue_cloud.rpc.convert import snapshot_parts
from segue_cloud.sessions.port import Producer, Status
from segue_cloud.sessions.reader import LogReader
from segue_cloud.sessions.slices import decoded, encoded
from segue_cloud.sessions.store import RedisStore
from segue_contract.ids import SessionName
from segue_contract.limits import STATE_SLICE_BYTES
from segue_contract.servers import Valkey
from segue_contract.sync.ops import UserMessage, encode_op
from segue_contract.sync.state import (
    Cursor,
    SessionState,
    TurnState,
    decode_state,
    encode_state,
)

LARGE = SessionState(
    cursor=Cursor(1, 500),
    turns=[
        TurnState(turn=f"t{number}", tokens=[number] * 2000, pieces=[" some"] * 2000, reason="stop")
        for number in range(100)
    ],
)
SLICES = len(encode_state(LARGE)) // STATE_SLICE_BYTES // 2


class Others:
    """How often other tasks of the loop had their turn."""

    turns = 0


@asynccontextmanager
async def others() -> AsyncIterator[Others]:
    counted = Others()

    async def go_on() -> None:
        while True:
            counted.turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(go_on())
    try:
        yield counted
    finally:
        task.cancel()


async def test_others_go_on_while_it_is_coded() -> None:
    assert SLICES > 3
    async with others() as counted:
        data = await encoded(LARGE)
        assert counted.turns >= SLICES
        assert decode_state(data) == LARGE
        counted.turns = 0
        assert await decoded(data) == LARGE
        assert counted.turns >= SLICES
        counted.turns = 0
        parts = [part async for part in snapshot_parts(LARGE, 0)]
        assert counted.turns >= SLICES
        assert decode_state(b"".join(part.state for part in parts)) == LARGE


async def _write(store: RedisStore, session: SessionName) -> None:
    """300 messages of 1 KiB."""
    opened = await store.open_session(session, device="phone", producer="p")
    ops = [
        encode_op(UserMessage(id=f"o{number}", device="phone", turn=f"t{number}", text="x" * 1000))
        for number in range(300)
    ]
    for first in range(0, len(ops), 50):
        producer = Producer("p", opened.epoch, first + 1)
        result = await store.append(session, producer, ops[first : first + 50])
        assert result.status is Status.OK


async def test_what_is_evicted_while_it_is_read_is_whole(valkey: Valkey) -> None:
    """Readers of many sessions with room for one: each drops what another one reads."""
    store = await RedisStore.connect(valkey.url)
    names = [SessionName("default", f"s{number}") for number in range(4)]
    for name in names:
        await _write(store, name)
    reader = LogReader(store, max_sessions=1)
    for _ in range(3):
        states = await asyncio.gather(*(reader.state(name) for name in [*names, *names]))
        assert [len(state.turns) for state in states] == [300] * 8
    await store.close()


async def test_a_program_that_is_loaded_is_not_looked_through_again() -> None:
    program = (
        "import gc, segue_cloud.rpc.agent\n"
        "from segue_contract.transport.process import keep_loaded\n"
        "keep_loaded()\n"
        "print(gc.get_freeze_count() > 10 * len(gc.get_objects()))"
    )
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE
    )
    said, _ = await asyncio.wait_for(child.communicate(), 60)
    assert said.strip() == b"True"
    assert gc.get_freeze_count() == 0, "not in this process"
