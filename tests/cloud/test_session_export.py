"""Sessions that travel as files, over real gRPC and a real Valkey."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import segue
from segue.errors import (
    BadExport,
    SessionNotEmpty,
    TurnFailed,
)
from segue_cloud.log.keeping import SessionKeeping
from segue_cloud.sessions.store import RedisStore
from segue_contract.errors import Overloaded
from segue_contract.ids import SessionName
from segue_contract.sync.export import ExportHead, ExportWriter, read_export
from segue_contract.sync.ops import TurnStarted, TurnWaiting, UserMessage, encode_op
from tests.support.cloud_rpc import CloudRpc
from tests.support.kept_sessions import TRIP, WAIT_S, append_many, said, talk


@pytest.mark.parametrize("compacted", [False, True])
async def test_an_exported_session_comes_back_whole(
    client: segue.Client, cloud: CloudRpc, store: RedisStore, tmp_path: Path, compacted: bool
) -> None:
    session = await talk(client)
    await append_many(store, TRIP, 60)
    if compacted:
        state, written = await cloud.log._reader.folded(TRIP)
        await store.compact(TRIP, state, state.cursor.offset - 10, written)
        await session.set("after", "the fold")
    before = await session.state()
    file = tmp_path / "trip.segue"
    found = await client.export_session("trip", file)
    assert os.listdir(tmp_path) == ["trip.segue"]
    assert (found.head.folded > 0) is compacted
    assert read_export([file.read_bytes()]) == found

    made = await client.import_session(file, "again")
    assert (made.session, made.turns, made.cursor.offset) == ("again", 1, before.cursor.offset)
    again = await client.session("again", must_exist=True)
    assert again.tail == made.cursor
    assert made.cursor.generation > before.cursor.generation
    assert said(await again.state()) == said(before)
    assert [item.offset for item in await again.read(found.first)] == list(
        range(found.first + 1, made.cursor.offset + 1)
    )
    if not compacted:  # the digest of those ops, as whoever saw all of them has it
        original, copy = await store.tails([TRIP, SessionName("default", "again")])
        assert original is not None
        assert copy is not None
        assert copy.digest == original.digest != b""
    listed = {one.session: one for one in await client.sessions()}
    assert (listed["again"].title, listed["again"].turns) == ("Hello", 1)
    # It goes on like any other: turns, appends, its turns' ids.
    async with again.run("Hello", max_tokens=6, turn="t1") as running:
        assert (await running.result()).text == before.turns[0].text  # joined
    async with again.run("And now?", max_tokens=4) as running:
        await running.result()
    await again.set("theme", "light")
    assert len((await again.state()).turns) == 2
    # Exporting it again gives the same entries.
    second = await client.export_session("again", tmp_path / "second")
    assert second.entries[: len(found.entries)] == found.entries


async def test_its_old_name_serves_once_it_is_deleted(client: segue.Client, tmp_path: Path) -> None:
    session = await talk(client)
    file = tmp_path / "trip.segue"
    before = said(await session.state())
    await client.export_session("trip", file)
    with pytest.raises(SessionNotEmpty):
        await client.import_session(file)
    assert said(await session.state()) == before
    await client.delete_session("trip")
    await client.session("trip")  # opened, and empty
    made = await client.import_session(file)
    assert made.session == "trip"
    assert said(await (await client.session("trip")).state()) == before


async def test_followers_of_an_empty_session_see_the_import(
    client: segue.Client, tmp_path: Path
) -> None:
    await talk(client)
    file = tmp_path / "trip.segue"
    await client.export_session("trip", file)
    empty = await client.session("empty")
    async with asyncio.timeout(WAIT_S):
        following = empty.follow()
        async for item in following:
            if item.offset == 0:
                made = await client.import_session(file, "empty")
            elif following.cursor == made.cursor:
                assert following.state.turns[0].ended
                assert following.state.values == {"theme": b"dark"}
                return


async def test_nothing_is_written_of_a_bad_file(
    client: segue.Client, cloud: CloudRpc, store: RedisStore, tmp_path: Path
) -> None:
    await talk(client)
    file = tmp_path / "trip.segue"
    await client.export_session("trip", file)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    (before,) = await store._wire.call(("DBSIZE",))
    with pytest.raises(BadExport):
        await client.import_session(file, "again")

    # Nor where the client did not look.
    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(data), 100):
            yield bytes(data[start : start + 100])

    with pytest.raises(BadExport):
        await cloud.log.keeping.import_(SessionName("default", "again"), pieces())
    assert await store._wire.call(("DBSIZE",)) == [before]


def _file_with_running_turn() -> bytes:
    writer = ExportWriter()
    ops = [
        encode_op(UserMessage(id="t9.user", device="phone", turn="t9", text="Hi")),
        encode_op(TurnStarted(id="t9.started", turn="t9", epoch=3, max_tokens=4)),
        encode_op(TurnWaiting(id="t10.waiting", device="laptop", turn="t10", text="And")),
    ]
    head = ExportHead(session="cut", generation=5, folded=0, tail=3, title="Hi", turns=1)
    return writer.head(head) + writer.entries(1, ops) + writer.end()


async def test_a_turn_that_ran_when_it_was_exported_ends_as_failed(
    client: segue.Client, tmp_path: Path
) -> None:
    file = tmp_path / "cut.segue"
    file.write_bytes(_file_with_running_turn())
    made = await client.import_session(file)
    assert made.cursor.offset == 5
    session = await client.session("cut", must_exist=True)
    state = await session.state()
    assert state.waiting == []
    (turn,) = state.turns
    assert (turn.reason, turn.error_code) == ("error", "turn_failed")
    async with session.run("Hi", max_tokens=4, turn="t9") as running:
        with pytest.raises(TurnFailed):
            await running.result()
    async with session.run("Hi", max_tokens=4) as running:
        assert (await running.result()).text


async def test_an_import_that_stops_half_way_leaves_no_session(
    cloud: CloudRpc, store: RedisStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    real = store.keeper._wire.call

    async def call(*commands):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls += 1
        if calls > 2:
            raise ConnectionError
        return await real(*commands)

    keeping = SessionKeeping(store, cloud.log._reader, now_ms=lambda: 1, on_deleted=lambda _: None)

    async def pieces() -> AsyncIterator[bytes]:
        yield _file_with_running_turn()

    cut = SessionName("default", "cut")
    with monkeypatch.context() as patched:
        patched.setattr(store.keeper._wire, "call", call)
        with pytest.raises(ConnectionError):
            await keeping.import_(cut, pieces())
    assert await store.tails([cut]) == [None]
    (left,) = await store._wire.call(("KEYS", "*cut*"))
    assert left
    for key, ttl in zip(
        left, await store._wire.call(*(("PTTL", one) for one in left)), strict=True
    ):
        assert ttl > 0, key
    tail, _ = await keeping.import_(cut, pieces())
    assert tail.offset == 5


async def test_only_so_many_at_a_time(cloud: CloudRpc, store: RedisStore) -> None:
    await append_many(store, TRIP, 3)
    keeping = SessionKeeping(
        store, cloud.log._reader, now_ms=lambda: 1, on_deleted=lambda _: None, max_transfers=1
    )
    first = aiter(keeping.export(TRIP))
    await anext(first)
    with pytest.raises(Overloaded):
        await anext(aiter(keeping.export(TRIP)))
    data = [piece async for piece in first]
    assert data
    assert [piece async for piece in keeping.export(TRIP)]


async def test_a_session_of_many_pages_travels(
    client: segue.Client, store: RedisStore, tmp_path: Path
) -> None:
    await append_many(store, TRIP, 3000, size=2000)
    file = tmp_path / "trip.segue"
    found = await client.export_session("trip", file)
    assert len(found.entries) == 3000
    await client.import_session(file, "again")
    before = await (await client.session("trip")).state()
    assert said(await (await client.session("again")).state()) == said(before)
