"""Turns of one cloud instance over a real store and a scripted engine, without gRPC."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from segue_cloud.log.session_log import SessionLog
from segue_cloud.sessions.running import RunningTurns
from segue_cloud.sessions.store import RedisStore
from segue_cloud.turns.manager import Begun, TurnManager
from segue_cloud.turns.opening import TurnRequest
from segue_cloud.turns.owner import OwnerDeps, TurnOwner
from segue_cloud.turns.spec import OwnedTurn
from segue_cloud.turns.writer import TurnKey
from segue_contract.chat import ChatTokenizer
from segue_contract.ids import SessionName
from segue_contract.limits import (
    StoreLimits,
    TurnLimits,
)
from segue_contract.plan import Shape
from segue_contract.sync.ops import Sampling
from segue_contract.sync.state import TurnState, find_turn
from segue_contract.turn.events import Frame, TurnEvent
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tokenizers import tokenizer_of

SESSION = SessionName("default", "trip")
OTHER = SessionName("default", "work")
WAIT_S = 20.0


@dataclass
class Bench:
    """One instance's turns over a real store and a scripted engine."""

    manager: TurnManager
    log: SessionLog
    engine: ScriptedEngine
    tokenizer: ChatTokenizer
    running: RunningTurns

    def request(self, turn: str = "t1", **changes: object) -> TurnRequest:
        values: dict[str, object] = {
            "session": SESSION, "device": "phone", "turn": turn,
            "prompt": "Hello", "max_tokens": 100, "sampling": Sampling(),
        }  # fmt: skip
        return TurnRequest(**(values | changes))  # type: ignore[arg-type]

    async def begin(self, turn: str = "t1", **changes: object) -> Begun:
        return await self.manager.begin(self.request(turn, **changes), expect_open=False)

    def spec(self, begun: Begun, turn: str = "t1", **changes: object) -> OwnedTurn:
        values: dict[str, object] = {
            "key": TurnKey(SESSION, turn, begun.epoch, "phone", begun.nonce),
            "prompt": (1, 2, 3), "max_tokens": 100, "sampling": Sampling(), "stop": (),
            "shape": Shape.SHIP, "has_edge": True,
        }  # fmt: skip
        return OwnedTurn(**(values | changes))  # type: ignore[arg-type]

    async def turn(self, turn: str = "t1") -> TurnState:
        state = await self.log.state(SESSION)
        found = find_turn(state, turn)
        assert found is not None
        return found

    async def ended(self, owner: TurnOwner) -> TurnState:
        async with asyncio.timeout(WAIT_S):
            await owner.ended.wait()
        return await self.turn(owner.spec.key.turn)


@asynccontextmanager
async def bench_on(
    url: str,
    model_dir: Path,
    engine: ScriptedEngine,
    *,
    max_turns: int = 8,
    model: str = "m",
    store_limits: StoreLimits = StoreLimits(),
    limits: TurnLimits = TurnLimits(),
) -> AsyncIterator[Bench]:
    tokenizer = tokenizer_of(model_dir)
    store = await RedisStore.connect(url, limits=store_limits)
    async with SessionLog(store) as log:
        deps = OwnerDeps(
            log, engine, tokenizer, frozenset({2}), 8192, 49152,
            lambda: time.time_ns() // 1_000_000, time.monotonic, limits,
        )  # fmt: skip
        running = store.running_turns(model)
        manager = TurnManager(deps, running, model=model, weights="digest", max_turns=max_turns)
        await log.open_session(SESSION, device="phone")
        try:
            yield Bench(manager, log, engine, tokenizer, running)
        finally:
            await manager.close()
            await store.close()


async def shown_tokens(owner: TurnOwner, count: int) -> None:
    async with asyncio.timeout(WAIT_S):
        async for event in owner.feed.read():
            if isinstance(event, Frame) and event.next_index >= count:
                return


def tokens_of(events: Iterable[TurnEvent]) -> list[int]:
    return [token for event in events if isinstance(event, Frame) for token in event.tokens]
