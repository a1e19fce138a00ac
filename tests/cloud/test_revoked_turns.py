"""A turn that a device asked for before it was revoked, and that has not begun by then."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from segue_cloud.sessions.port import Bearer, Status
from segue_contract.errors import Revoked
from segue_contract.servers import Valkey
from segue_contract.sync.ops import TurnStarted
from segue_contract.transport.bearer import bearer
from segue_contract.v1 import agent_pb2 as pb
from tests.support.keyed_clouds import TRIP, end_of, keyed_clouds, opened
from tests.support.scripted_engine import ScriptedEngine
from tests.support.turn_bench import SESSION, WAIT_S, bench_on


async def test_a_turn_that_waits_leaves_the_queue_and_never_begins(
    valkey: Valkey, tmp_path: Path
) -> None:
    engine = ScriptedEngine([*b"words"], free=False)
    async with keyed_clouds(valkey.url, tmp_path, engine, clouds=1) as here:
        tokens = {name: here.token(name) for name in ("phone", "laptop")}
        (cloud,) = here.clouds

        def run(device: str, turn: str) -> Any:
            asked = pb.RunTurnRequest(
                session="trip", device=device, turn=turn, prompt="Hi", max_tokens=9
            )
            return cloud.agent.RunTurn(asked, metadata=bearer(tokens[device]))

        async def waiting(turns: int) -> None:
            async with asyncio.timeout(WAIT_S):
                while cloud.manager.waiting != turns:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)

        for name, token in tokens.items():
            await opened(here, token, name)
        first = run("laptop", "t1")
        async with asyncio.timeout(WAIT_S):
            while not engine.turns:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        lost = run("phone", "t2")
        await waiting(1)
        behind = run("laptop", "t3")
        await waiting(2)
        asked = pb.RevokeRequest(session="trip", revoked="phone")
        await here.call(0, tokens["laptop"], "Revoke", asked)
        assert type(await end_of(lost)) is Revoked
        await waiting(1)
        engine.allow(100)
        for stream in (first, behind):
            assert [event.WhichOneof("kind") async for event in stream][-1] == "ended"
        assert [turn.turn for turn in (await cloud.log.state(TRIP)).turns] == ["t1", "t3"]


async def test_the_log_compares_as_a_turn_begins(
    valkey: Valkey, model_dir: Path, words: list[int]
) -> None:
    before = Bearer("phone", int((time.time() - 60) * 1000))
    async with bench_on(valkey.url, model_dir, ScriptedEngine(words)) as bench:
        until_ms = (await bench.log.revoke(SESSION, "phone")).before_ms
        opening = [TurnStarted(id="t1.started", turn="t1", epoch=1)]
        begin = bench.log.begin_turn
        assert (await begin(SESSION, "t1", opening, bearer=before)).status is Status.REVOKED
        for mode in ("look", "join"):
            stands = await bench.log.wait_turn(SESSION, "t1", "", mode, bearer=before)
            assert stands.status is Status.REVOKED
        other = Bearer("laptop", before.issued_ms)
        stands = await bench.log.wait_turn(SESSION, "t1", "", "look", bearer=other)
        assert (stands.status, stands.known) == (Status.OK, False)
        later = Bearer("phone", until_ms)
        assert (await begin(SESSION, "t1", opening, bearer=later)).status is Status.OK
