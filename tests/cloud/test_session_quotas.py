"""What one session may hold: refused by name before anything is written."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from segue_cloud.log.session_log import SessionLog
from segue_cloud.sessions.port import AppendResult, LogOp, Producer, Status
from segue_cloud.sessions.store import RedisStore
from segue_contract.errors import QuotaExceeded
from segue_contract.ids import SessionName
from segue_contract.limits import SessionQuotas
from segue_contract.servers import Valkey
from segue_contract.sync.ops import Doc, Feedback, Op, Set, ToolClaim, ToolResult, UserMessage

S = SessionName("default", "trip")
QUOTAS = SessionQuotas(bytes=4096, values=3, docs=2, kept_ops=6)


class Writer:
    def __init__(self, log: SessionLog, epoch: int) -> None:
        self.log, self.epoch, self.seq = log, epoch, 1

    async def append(self, *ops: Op, seq: int = 0) -> AppendResult:
        producer = Producer("p", self.epoch, seq or self.seq)
        result = await self.log.append(S, producer, [LogOp.of(op) for op in ops])
        assert result.status in (Status.OK, Status.DUP)
        self.seq = max(self.seq, producer.first_seq + len(ops))
        return result

    async def refused(self, what: str, *ops: Op) -> None:
        before = await self.log._store.tails([S])
        with pytest.raises(QuotaExceeded) as raised:
            await self.append(*ops)
        assert raised.value.fields == {"what": what, "limit": getattr(QUOTAS, what)}
        assert raised.value.hint
        assert await self.log._store.tails([S]) == before


@pytest.fixture
async def log(valkey: Valkey) -> AsyncIterator[SessionLog]:
    store = await RedisStore.connect(valkey.url)
    store.quotas = QUOTAS
    async with SessionLog(store, compact_after=4, compact_keep=1) as running:
        yield running
    await store.close()


@pytest.fixture
async def writer(log: SessionLog) -> Writer:
    return Writer(log, (await log.open_session(S, device="phone", producer="p")).epoch)


def value(name: str) -> Op:
    return Set(id="s", name=name, value=b"x")


def doc(name: str) -> Op:
    return Doc(id="d", name=name, update=b"x")


async def test_so_many_values(writer: Writer) -> None:
    await writer.append(value("a"), value("b"), value("a"))
    await writer.refused("values", value("c"), value("d"))  # one would do: all or none
    await writer.append(value("c"))
    await writer.refused("values", value("d"))
    for _ in range(8):  # set anew as often as one likes, also when the log was folded
        await writer.append(value("a"), value("b"), value("c"))
    await writer.refused("values", value("d"))


async def test_so_many_documents_and_updates(writer: Writer) -> None:
    await writer.append(doc("a"), doc("b"), doc("a"))
    await writer.refused("docs", doc("c"))
    await writer.append(ToolClaim(id="c", call="1"), ToolResult(id="r", call="1"), doc("a"))
    await writer.refused("kept_ops", doc("a"))
    await writer.refused("kept_ops", value("v"), ToolClaim(id="c", call="2"))
    await writer.append(value("v"))  # the refused batch took nothing
    await writer.append(Feedback(id="f", turn="t", value="up"))


async def test_so_many_bytes(writer: Writer) -> None:
    large = Set(id="s", name="a", value=b"x" * 3000)
    await writer.append(large)
    await writer.refused("bytes", Set(id="s", name="b", value=b"x" * 3000))
    message = UserMessage(id="t.user", turn="t", text="x" * 3000)
    with pytest.raises(QuotaExceeded):
        await writer.log.begin_turn(S, "t", [message])


async def test_what_was_appended_before_counts_once(writer: Writer) -> None:
    await writer.append(value("a"), value("b"))
    repeated = await writer.append(value("a"), value("b"), seq=1)
    assert repeated.status is Status.DUP
    # The batch goes on behind what was known: only its last op is new.
    longer = await writer.append(value("a"), value("b"), value("c"), seq=1)
    assert longer.appended == 1
    await writer.refused("values", value("d"))


async def test_an_import_counts_as_well(writer: Writer) -> None:
    await writer.append(value("a"), value("b"), doc("x"), doc("y"), doc("x"))
    keeping = writer.log.keeping
    pieces = [piece async for piece in keeping.export(S)]
    assert await keeping.delete(S)

    async def again() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    await keeping.import_(S, again())
    opened = await writer.log.open_session(S, device="phone", producer="p")
    writer.epoch, writer.seq = opened.epoch, 1
    await writer.append(value("a"), value("b"), value("c"))
    await writer.refused("values", value("d"))
    await writer.refused("docs", doc("z"))
    await writer.append(doc("x"), doc("x"), doc("x"))
    await writer.refused("kept_ops", doc("x"))
