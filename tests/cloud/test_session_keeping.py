"""Sessions as wholes, over real gRPC, a real Valkey and a real broker."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiomqtt
import pytest

import segue
from segue.errors import (
    BadExport,
    InvalidArgument,
    SessionBusy,
    SessionDeleted,
    SessionNotEmpty,
    TurnFailed,
    UnknownSession,
)
from segue_cloud.log.keeping import SessionKeeping, expiring
from segue_cloud.sessions.keys import SessionKeys, index_key
from segue_cloud.sessions.port import Producer
from segue_cloud.sessions.store import RedisStore
from segue_contract.chat import ChatTokenizer
from segue_contract.errors import Overloaded
from segue_contract.ids import SessionName
from segue_contract.limits import DELETED_MEMORY_S
from segue_contract.model.manifest import read_manifest
from segue_contract.servers import Broker, Valkey
from segue_contract.sync.export import ExportHead, ExportWriter, read_export
from segue_contract.sync.ops import Set, TurnStarted, TurnWaiting, UserMessage, encode_op
from segue_contract.sync.state import Cursor, SessionState
from segue_contract.topics import head_topic
from tests.support.cloud_rpc import CloudRpc, cloud_rpc
from tests.support.scripted_engine import ScriptedEngine

WAIT_S = 20.0
TRIP = SessionName("default", "trip")


@pytest.fixture
async def store(valkey: Valkey) -> AsyncIterator[RedisStore]:
    store = await RedisStore.connect(valkey.url)
    yield store
    await store.close()


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> ChatTokenizer:
    """Loading it takes longer than the tests that use it."""
    return ChatTokenizer.load(model_dir, read_manifest(model_dir))


@pytest.fixture
async def cloud(
    valkey: Valkey, model_dir: Path, tokenizer: ChatTokenizer
) -> AsyncIterator[CloudRpc]:
    engine = ScriptedEngine(range(100, 110))
    async with cloud_rpc(valkey.url, model_dir, engine, tokenizer=tokenizer) as running:
        yield running


@pytest.fixture
async def client(cloud: CloudRpc) -> AsyncIterator[segue.Client]:
    async with segue.Client(cloud.address, device="phone") as client:
        yield client


async def _talk(client: segue.Client, name: str = "trip", turn: str = "t1") -> segue.Session:
    session = await client.session(name)
    async with session.run("Hello", max_tokens=6, turn=turn) as running:
        await running.result()
    await session.set("theme", "dark")
    return session


def _said(state: SessionState) -> dict[str, object]:
    """What a session holds, without where in which log it stands."""
    return {
        "turns": [(turn.turn, turn.prompt, turn.tokens, turn.text, turn.reason) for turn in
                  state.turns],
        "values": state.values,
        "docs": state.docs,
    }  # fmt: skip


async def _append(store: RedisStore, session: SessionName, count: int, size: int = 8) -> None:
    opened = await store.open_session(session, device="phone", producer="p")
    for start in range(0, count, 100):
        ops = [
            encode_op(Set(id=f"s{i}", device="phone", name=f"n{i % 7}", value=b"v" * size))
            for i in range(start, min(start + 100, count))
        ]
        await store.append(session, Producer("p", opened.epoch, start + 1), ops)


# -- lists ------------------------------------------------------------------------------------


async def test_a_list_pages_without_end(store: RedisStore) -> None:
    names = [f"s{number:03}" for number in range(57)]
    for name in names:  # many of them within one millisecond
        await store.open_session(SessionName("default", name))
    for size in (1, 5, 57, 100):
        found: list[str] = []
        after = ""
        while True:
            page, after = await store.keeper.list_sessions("default", size, after)
            assert len(page) <= size
            found += [one.session for one in page]
            if not after:
                break
        assert sorted(found) == names
    with pytest.raises(InvalidArgument):
        await store.keeper.list_sessions("default", 5, "not a place")


async def test_sessions_that_come_to_the_front_move_no_page(store: RedisStore) -> None:
    for number in range(9):
        await store.open_session(SessionName("default", f"s{number}"))
    first, after = await store.keeper.list_sessions("default", 3)
    for number in range(20):
        await store.open_session(SessionName("default", f"new{number}"))
    rest: list[str] = []
    while after:
        page, after = await store.keeper.list_sessions("default", 2, after)
        rest += [one.session for one in page]
    assert sorted([*rest, *(one.session for one in first)]) == [f"s{n}" for n in range(9)]


async def test_a_client_gets_all_of_them(client: segue.Client) -> None:
    for number in range(7):
        await client.session(f"s{number}")
    assert {one.session async for one in client.all_sessions(page=2)} == {
        f"s{number}" for number in range(7)
    }
    assert len(await client.sessions(5)) == 5


# -- deletion ---------------------------------------------------------------------------------


async def test_nothing_is_left_of_a_deleted_session(
    client: segue.Client, store: RedisStore
) -> None:
    await _talk(client)
    assert await client.delete_session("trip")
    keys = SessionKeys.of(TRIP)
    left = await store._wire.call(
        *(("EXISTS", key) for key in keys.all), ("ZSCORE", index_key("default"), "trip"),
        ("PTTL", keys.snapshot),
    )  # fmt: skip
    *exists, score, ttl_ms = left
    assert exists == [0, 0, 0, 0, 0, 1]  # of the last one, only that it was deleted
    assert score is None
    assert 0 < ttl_ms <= DELETED_MEMORY_S * 1000
    assert await client.sessions() == []
    assert await client.delete_session("trip")  # the reply was lost: it is gone
    assert not await client.delete_session("never")
    with pytest.raises(SessionDeleted):
        await client.session("trip", must_exist=True)
    with pytest.raises(UnknownSession):
        await client.session("never", must_exist=True)


async def test_its_name_may_be_used_again_in_a_later_life(
    client: segue.Client, store: RedisStore
) -> None:
    old = await _talk(client)
    known = old.tail.generation
    keys = SessionKeys.of(TRIP)
    ahead = known + 10**12  # as after a clock that was set back since
    await store._wire.call(("HSET", keys.meta, "gen", ahead))
    assert await client.delete_session("trip")
    new = await client.session("trip")
    assert new.created
    assert new.tail == Cursor(new.tail.generation, 0)
    assert new.tail.generation > ahead
    # A device that still holds the old one reaches the new one, under new numbers.
    await old.set("theme", "light")
    state = await new.state()
    assert state.turns == []
    assert state.values == {"theme": b"light"}
    async with new.run("Hello again", max_tokens=4, turn="t1") as running:
        assert (await running.result()).text


async def test_a_session_with_a_running_turn_is_not_deleted(
    valkey: Valkey, model_dir: Path, tokenizer: ChatTokenizer
) -> None:
    engine = ScriptedEngine(range(100, 400), free=False)
    async with (
        cloud_rpc(valkey.url, model_dir, engine, tokenizer=tokenizer) as cloud,
        segue.Client(cloud.address, device="phone") as client,
    ):
        session = await client.session("trip")
        async with session.run("Hello", max_tokens=200, turn="t1") as running:
            await anext(aiter(running))
            with pytest.raises(SessionBusy) as busy:
                await client.delete_session("trip")
            assert busy.value.fields["turn"] == "t1"
            await session.stop()
            engine.allow(2)
            assert (await running.result()).reason == "cancelled"
        assert await client.delete_session("trip")


async def _until_deleted(session: segue.Session, started: asyncio.Event) -> None:
    async for _ in session.follow():
        started.set()


@pytest.mark.parametrize("over", ["grpc", "mqtt"])
async def test_followers_are_told_and_the_head_is_cleared(
    valkey: Valkey, broker: Broker, model_dir: Path, tokenizer: ChatTokenizer, over: str
) -> None:
    engine = ScriptedEngine(range(100, 110))
    url = broker.url if over == "mqtt" else ""
    async with (
        cloud_rpc(valkey.url, model_dir, engine, mqtt_url=url, tokenizer=tokenizer) as here,
        cloud_rpc(valkey.url, model_dir, engine, mqtt_url=url, tokenizer=tokenizer) as there,
        segue.Client(here.address, device="phone") as phone,
        segue.Client(there.address, device="laptop") as laptop,
    ):
        await _talk(phone)
        started = [asyncio.Event(), asyncio.Event()]
        following = [
            asyncio.create_task(_until_deleted(await one.session("trip"), event))
            for one, event in zip((phone, laptop), started, strict=True)
        ]
        async with asyncio.timeout(WAIT_S):
            for event in started:
                await event.wait()
            assert await phone.delete_session("trip")
            for task in following:
                with pytest.raises(SessionDeleted):
                    await task
            if not url:
                return
            async with aiomqtt.Client(
                "127.0.0.1", int(broker.url.rsplit(":", 1)[1]), protocol=aiomqtt.ProtocolVersion.V5
            ) as watch:
                await watch.subscribe(head_topic(TRIP), qos=1)
                await watch.subscribe("done", qos=1)
                await watch.publish("done", b"", qos=1)
                async for message in watch.messages:  # a retained head would come first
                    if str(message.topic) == "done":
                        return
                    assert not message.retain


# -- expiry -----------------------------------------------------------------------------------


async def test_only_idle_sessions_expire(client: segue.Client, store: RedisStore) -> None:
    for name in ("old", "opened", "written"):
        await _append(store, SessionName("default", name), 3)
    then = 1_000_000_000_000
    for name in ("old", "opened", "written"):
        keys = SessionKeys.of(SessionName("default", name))
        await store._wire.call(
            ("ZADD", index_key("default"), then, name),
            ("HSET", keys.meta, "u", then),
            ("ZADD", keys.devices, then, "phone"),
        )
    await client.session("opened")  # from an old list it still looks idle
    await store._wire.call(("ZADD", index_key("default"), then, "opened"))
    keys = SessionKeys.of(SessionName("default", "written"))
    await store._wire.call(("HSET", keys.meta, "u", 4_000_000_000_000))
    await store._wire.call(("ZADD", index_key("default"), then, "ghost"))
    assert await client.expire_sessions(3600.0) == ["old"]
    names, _ = await store.keeper.list_sessions("default", 10)
    assert {one.session for one in names} == {"opened", "written"}
    assert await store.keeper.oldest("default", 3600.0, 10) == []
    with pytest.raises(InvalidArgument):
        await client.expire_sessions(0)


async def test_the_policy_deletes_some_at_a_time(cloud: CloudRpc, store: RedisStore) -> None:
    for number in range(5):
        await store.open_session(SessionName("default", f"s{number}"))
    keeping = cloud.log.keeping
    gone, more = await keeping.expire("default", 0.0, 2)
    assert (len(gone), more) == (2, True)
    async with asyncio.timeout(WAIT_S), expiring(keeping, "default", 0.0, every_s=0.01):
        while (await store.keeper.list_sessions("default", 10))[0]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


# -- export and import ------------------------------------------------------------------------


@pytest.mark.parametrize("compacted", [False, True])
async def test_an_exported_session_comes_back_whole(
    client: segue.Client, cloud: CloudRpc, store: RedisStore, tmp_path: Path, compacted: bool
) -> None:
    session = await _talk(client)
    await _append(store, TRIP, 60)
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
    assert _said(await again.state()) == _said(before)
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
    session = await _talk(client)
    file = tmp_path / "trip.segue"
    before = _said(await session.state())
    await client.export_session("trip", file)
    with pytest.raises(SessionNotEmpty):
        await client.import_session(file)
    assert _said(await session.state()) == before
    await client.delete_session("trip")
    await client.session("trip")  # opened, and empty
    made = await client.import_session(file)
    assert made.session == "trip"
    assert _said(await (await client.session("trip")).state()) == before


async def test_followers_of_an_empty_session_see_the_import(
    client: segue.Client, tmp_path: Path
) -> None:
    await _talk(client)
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
    await _talk(client)
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
    await _append(store, TRIP, 3)
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
    await _append(store, TRIP, 3000, size=2000)
    file = tmp_path / "trip.segue"
    found = await client.export_session("trip", file)
    assert len(found.entries) == 3000
    await client.import_session(file, "again")
    before = await (await client.session("trip")).state()
    assert _said(await (await client.session("again")).state()) == _said(before)


# -- the command line -------------------------------------------------------------------------


async def test_the_command_line(client: segue.Client, cloud: CloudRpc, tmp_path: Path) -> None:
    await _talk(client)
    file = str(tmp_path / "trip.segue")

    async def segue_(*args: str) -> tuple[int | None, str]:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "segue", *args, "--address", cloud.address,
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        said, _ = await process.communicate()
        return process.returncode, said.decode()

    code, said = await segue_("session", "export", "trip", file, "-o", "json")
    assert (code, json.loads(said)["turns"]) == (0, 1)
    code, said = await segue_("session", "import", file, "again", "-o", "json")
    assert (code, json.loads(said)["session"]) == (0, "again")
    code, said = await segue_("session", "delete", "trip", "--yes", "-o", "json")
    assert (code, json.loads(said)) == (0, {"session": "trip", "deleted": True})
    code, said = await segue_("session", "expire", "--idle", "30", "-o", "json")
    assert (code, json.loads(said)) == (0, {"deleted": []})
    assert [one.session for one in await client.sessions()] == ["again"]
