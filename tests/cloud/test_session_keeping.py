"""Sessions as wholes, over real gRPC, a real Valkey and a real broker."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import aiomqtt
import pytest

import segue
from segue.errors import (
    InvalidArgument,
    SessionBusy,
    SessionDeleted,
    UnknownSession,
)
from segue_cloud.log.keeping import expiring
from segue_cloud.sessions.keys import SessionKeys, index_key
from segue_cloud.sessions.store import RedisStore
from segue_contract.chat import ChatTokenizer
from segue_contract.ids import SessionName
from segue_contract.limits import DELETED_MEMORY_S
from segue_contract.servers import Broker, Valkey
from segue_contract.sync.state import Cursor
from segue_contract.topics import head_topic
from tests.support.cloud_rpc import CloudRpc, cloud_rpc
from tests.support.kept_sessions import TRIP, WAIT_S, append_many, talk
from tests.support.scripted_engine import ScriptedEngine

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
    await talk(client)
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
    old = await talk(client)
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
        await talk(phone)
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
        await append_many(store, SessionName("default", name), 3)
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
    for tenant in ("acme", "umbrella"):
        await store.open_session(SessionName(tenant, "s"))
    sweeping = expiring(keeping, lambda: ["default", "acme"], 0.0, every_s=0.01)
    async with asyncio.timeout(WAIT_S), sweeping:
        for tenant in ("default", "acme"):
            while (await store.keeper.list_sessions(tenant, 10))[0]:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    assert (await store.keeper.list_sessions("umbrella", 10))[0]


# -- the command line -------------------------------------------------------------------------


async def test_the_command_line(client: segue.Client, cloud: CloudRpc, tmp_path: Path) -> None:
    await talk(client)
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
