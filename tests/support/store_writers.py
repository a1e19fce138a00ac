"""Writers of sessions over a store that fails, and what has to be true of their logs afterwards."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from segue_cloud.sessions.port import LogOp, Producer, Status
from segue_cloud.sessions.store import RedisStore
from segue_contract.errors import StoreUnavailable
from segue_contract.ids import SessionName
from segue_contract.sync import ops
from segue_contract.sync.state import Cursor

HALF_WAY = 20


@dataclass
class Writer:
    """Of one session.

    Attributes:
        ops: the bytes that the store said it had put at each (generation, offset).
        half_way: HALF_WAY appends were acknowledged.
        goes_on: so was one under a later generation than the first one.
    """

    name: SessionName
    ops: dict[tuple[int, int], bytes] = field(default_factory=dict)
    half_way: asyncio.Event = field(default_factory=asyncio.Event)
    goes_on: asyncio.Event = field(default_factory=asyncio.Event)

    async def write(self, store: RedisStore, enough: asyncio.Event) -> None:
        """Append until `enough`, as a device does: what was not acknowledged is sent again."""
        opened = await store.open_session(self.name, producer="p")
        producer, seq, first = opened.epoch, 1, opened.tail.generation
        while not enough.is_set():
            data = LogOp.of(ops.Set(id=f"{self.name.session}.{seq}", name="n", value=b"1")).data
            try:
                result = await store.append(self.name, Producer("p", producer, seq), [data])
            except StoreUnavailable:
                continue  # repeated as it was: it may have been taken
            if result.status is Status.GAP:  # what was acknowledged is lost, and this says so
                seq = result.expected_seq
                continue
            if result.status is Status.MISSING:  # the whole session is
                opened = await store.open_session(self.name, producer="p")
                producer, seq = opened.epoch, 1
                continue
            assert result.status in (Status.OK, Status.DUP), result
            self.ops[result.generation, result.first_offset] = data
            seq += 1
            if seq > HALF_WAY:
                self.half_way.set()
            if result.generation > first:
                self.goes_on.set()


async def check_log(store: RedisStore, one: Writer) -> int:
    """How many acknowledged ops are lost. Each of them was told: the generation changed."""
    page = await store.read(one.name, Cursor(0, 0), 100_000)
    found = {entry.cursor.offset: entry.op for entry in page.entries}
    assert sorted(found) == list(range(1, page.tail.offset + 1))
    lost = 0
    for (generation, offset), data in one.ops.items():
        if found.get(offset) == data:
            continue
        lost += 1
        assert generation < page.tail.generation, f"{offset} was lost and nobody told"
        judged = await store.read(one.name, Cursor(generation, offset), 1, judged=True)
        assert judged.status.value == "lost"
    return lost
