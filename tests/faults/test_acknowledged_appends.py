"""What a device was told is in the log is there, once: the real SDK, cloud and store."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from random import Random

import segue
from segue.errors import SegueError
from segue_contract.servers import Valkey
from segue_contract.sync.ops import Set
from tests.support.cloud_rpc import cloud_rpc
from tests.support.scripted_engine import ScriptedEngine
from tests.support.slow_proxy import SlowProxy

WRITERS, EACH = 6, 60


async def test_no_acknowledged_append_is_missing_or_doubled(
    valkey: Valkey, model_dir: Path
) -> None:
    """Three clients of one device, each with two sessions opened at once; connections that are cut
    at every step; calls that are cancelled. (No clock has a part in it.)"""
    seed = int(os.environ.get("SEGUE_SEED") or int.from_bytes(os.urandom(4), "big"))
    print("SEGUE_SEED =", seed)
    random = Random(seed)
    acknowledged: dict[str, int] = {}
    async with (
        cloud_rpc(valkey.url, model_dir, ScriptedEngine([])) as cloud,
        SlowProxy(int(cloud.address.rsplit(":", 1)[1]), lambda: random.uniform(0, 0.001)) as proxy,
    ):
        address = f"127.0.0.1:{proxy.port}"
        clients = [segue.Client(address, device="phone") for _ in range(WRITERS // 2)]
        sessions = [
            one
            for client in clients
            for one in await asyncio.gather(client.session("trip"), client.session("trip"))
        ]
        writing = True

        async def cutter() -> None:
            while writing:
                await asyncio.sleep(random.uniform(0.05, 0.25))
                proxy.cut()

        async def write(number: int, session: segue.Session) -> None:
            for count in range(EACH):
                name = f"w{number}.{count}"
                call = asyncio.ensure_future(session.append(Set(id=name, name=name, value=b"1")))
                if random.random() < 0.1:
                    await asyncio.wait([call], timeout=random.uniform(0, 0.003))
                    call.cancel()
                try:
                    acknowledged[name] = (await call).offset
                except (SegueError, asyncio.CancelledError):
                    continue  # nobody was told that it is there

        cutting = asyncio.ensure_future(cutter())
        await asyncio.gather(*(write(number, one) for number, one in enumerate(sessions)))
        writing = False
        await cutting
        for client in clients:
            await client.close()
        async with segue.Client(cloud.address, device="reader") as reader:
            log = await (await reader.session("trip")).read()
    places: dict[str, list[int]] = {}
    for entry in log:
        assert isinstance(entry, segue.Entry)
        places.setdefault(entry.op.id, []).append(entry.offset)
    assert [name for name, at in places.items() if len(at) > 1] == []
    assert {name: [at] for name, at in acknowledged.items()} == {
        name: places.get(name) for name in acknowledged
    }
    assert len(acknowledged) > WRITERS * EACH // 2, "nothing was tested"
