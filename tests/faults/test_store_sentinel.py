"""A store that fails over under Sentinels, with real processes: killed, and standing still.

Sessions are appended to and a turn runs meanwhile. What was acknowledged is there, or the next
append tells that it is not; the turn ends once, and devices show the log's text.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from redis.exceptions import ReadOnlyError

import segue
from segue.local.probes import probe_store
from segue_cloud.sessions.node import Connections, Node
from segue_cloud.sessions.store import RedisStore
from segue_contract.errors import StoreUnavailable, Unreachable
from segue_contract.ids import SessionName
from segue_contract.limits import StoreLimits
from segue_contract.servers import Valkey
from segue_contract.store_url import parse_store_url
from segue_contract.sync import ops
from segue_contract.sync.state import Cursor, find_turn
from tests.support.cloud_rpc import CloudRpc, cloud_rpc
from tests.support.scripted_engine import ScriptedEngine
from tests.support.sentinels import NAME, Sentinel, Watched, watched_pair
from tests.support.servers import require_valkey
from tests.support.store_writers import Writer, check_log
from tests.support.tiny_edge import MANIFEST, tiny_tokenizer

pytestmark = pytest.mark.asyncio(loop_scope="module")

SESSIONS = 8
REPLY = tuple(b"the keeper of the light counts ships and waves") * 2
WAIT_S = 60.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def watched() -> AsyncIterator[Watched]:
    require_valkey()
    with tempfile.TemporaryDirectory() as folder:
        async with watched_pair(Path(folder)) as group:
            yield group


async def ask(session: segue.Session, cloud: CloudRpc, struck: asyncio.Event) -> segue.Turn:
    """One whole reply; the engine makes its second half once `struck`."""
    turn = session.run("Tell me of the sea.", max_tokens=len(REPLY))
    cloud.engine.allow(len(REPLY) // 2)
    async with turn:
        async for event in turn:
            if isinstance(event, segue.Frame) and event.next_index == len(REPLY) // 2:
                await struck.wait()
                cloud.engine.allow(len(REPLY))
    return turn


async def test_a_server_that_became_a_replica_is_not_used(watched: Watched) -> None:
    """Sentinels may name it for a moment longer."""
    primary = await watched.primary()
    replica = next(one for one in watched.servers if one is not primary)
    connections = Connections(parse_store_url(replica.url), connect_timeout_s=5.0)
    node = Node(connections.to_url(), scripts={}, max_connections=1, primary_only=True)
    with pytest.raises(ReadOnlyError, match="replica"):
        await node.attempt([("PING",)], 5.0)
    assert not node.has_free


@pytest.mark.parametrize("how", ["kill", "pause"])
async def test_a_primary_that_dies_or_hangs_in_the_middle_of_everything(
    watched: Watched, how: str, tmp_path: Path
) -> None:
    old = await watched.primary()
    engine = ScriptedEngine(REPLY, free=False)
    name = SessionName("default", f"turn-{how}")
    writers = [Writer(SessionName("default", f"{how}{i}")) for i in range(SESSIONS)]
    struck, enough = asyncio.Event(), asyncio.Event()
    async with (
        asyncio.timeout(WAIT_S),
        cloud_rpc(
            watched.url, tmp_path, engine, manifest=MANIFEST, tokenizer=tiny_tokenizer()
        ) as cloud,
        segue.Client(cloud.address, device="phone") as client,
        asyncio.TaskGroup() as group,
    ):
        store = await RedisStore.connect(watched.url)
        session = await client.session(name.session)
        asking = group.create_task(ask(session, cloud, struck))
        for one in writers:
            group.create_task(one.write(store, enough))
        await asyncio.gather(*(one.half_way.wait() for one in writers))
        await watched.in_step(old)
        old.process.kill() if how == "kill" else old.process.pause()
        struck.set()
        new = await watched.failed_over_from(old)
        began = time.monotonic()
        await asyncio.gather(*(one.goes_on.wait() for one in writers))
        print(f"after {how}: all sessions go on {time.monotonic() - began:.2f} s after "
              "the new primary was named")  # fmt: skip
        turn = await asking
        if how == "kill":
            await old.restart()
        else:
            old.process.resume()  # it takes itself for a primary until the Sentinels tell it
        enough.set()
        lost = sum([await check_log(store, one) for one in writers])
        print(f"{lost} of {sum(len(one.ops) for one in writers)} acknowledged ops lost, all told")
        state = find_turn(await cloud.log.state(name), turn.id)
        assert state is not None
        assert (turn.tokens, tuple(state.tokens)) == (REPLY, REPLY)
        assert turn.text == state.text == bytes(REPLY).decode()
        page = await store.read(name, Cursor(0, 0), 10_000)
        entries = [ops.decode_op(entry.op) for entry in page.entries]
        assert sum(isinstance(one, ops.TurnEnded) for one in entries) == 1
        (tail,) = await store.tails([name])
        assert tail is not None
        assert tail.cursor == page.tail
        assert new is await watched.primary()
        await store.close()
    if how == "kill":
        await watched.mend(old)


async def test_the_doctor_asks_the_sentinels(watched: Watched) -> None:
    assert (await probe_store(watched.url)).seconds
    with pytest.raises(Unreachable, match="nobody"):
        await probe_store(f"redis+sentinel://{watched.places}/nobody")


async def test_a_primary_that_no_sentinel_knows_is_named(watched: Watched) -> None:
    with pytest.raises(StoreUnavailable, match="nobody") as caught:
        await RedisStore.connect(
            f"redis+sentinel://{watched.places}/nobody", limits=StoreLimits(timeout_s=0.5)
        )
    assert "SEGUE_REDIS_URL" in caught.value.hint


async def test_the_sentinels_have_a_password_of_their_own(tmp_path: Path) -> None:
    async with (
        Valkey.start(options=("--requirepass", "of-the-store")) as primary,
        Sentinel(
            tmp_path / "one", primary.port, password="of-sentinels", primary_password="of-the-store"
        ) as sentinel,
    ):
        url = f"redis+sentinel://:of-the-store@127.0.0.1:{sentinel.port}/{NAME}"
        store = await RedisStore.connect(f"{url}?sentinel_password=of-sentinels")
        assert (await store.open_session(SessionName("default", "s"))).created
        assert (await probe_store(f"{url}?sentinel_password=of-sentinels")).seconds
        await store.close()
        with pytest.raises(StoreUnavailable, match="names a primary") as caught:
            await RedisStore.connect(
                f"{url}?sentinel_password=wrong", limits=StoreLimits(timeout_s=0.5)
            )
        assert "of-the-store" not in str(caught.value)
        with pytest.raises(Unreachable, match="refuses this user and password"):
            await probe_store(f"{url}?sentinel_password=wrong")
