"""A turn's tokens reach the log once and in order, whatever the store loses or fails to answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segue_cloud.turns.frames import Chunk
from segue_cloud.turns.writer import TurnKey, TurnWriter
from segue_contract.errors import StaleEpoch, StoreUnavailable
from segue_contract.ids import SessionName
from segue_contract.limits import TurnLimits
from segue_contract.sync.ops import Frame, Op, TurnEnded, TurnStarted, UserMessage
from segue_contract.sync.state import find_turn
from tests.support.model_log import ModelLog

S = SessionName("default", "trip")
OPENING: tuple[Op, ...] = (
    UserMessage(id="u", turn="t1", text="Hello"),
    TurnStarted(id="s", turn="t1", epoch=1),
)


class FailingLog(ModelLog):
    """Each call takes the next fault: lost before it, not answered (done or not done), or none."""

    def __init__(self, faults: Sequence[tuple[str, int]]) -> None:
        super().__init__()
        self._faults = list(faults)

    async def _faulty(self, call: Any, *args: Any, **named: Any) -> Any:
        fault, size = self._faults.pop(0) if self._faults else ("", 0)
        if fault == "lose":
            self.lose(size)
        if fault == "refused":
            raise StoreUnavailable("The store is away.")
        result = await call(*args, **named)
        if fault == "unanswered":
            raise StoreUnavailable("The store did not answer in time.")
        return result

    async def append_turn(self, *args: Any, **named: Any) -> Any:
        return await self._faulty(super().append_turn, *args, **named)

    async def renew_turn(self, *args: Any, **named: Any) -> Any:
        return await self._faulty(super().renew_turn, *args, **named)

    async def state(self, *args: Any, **named: Any) -> Any:
        return await self._faulty(super().state, *args, **named)


FAULTS = st.tuples(st.sampled_from(["", "lose", "refused", "unanswered"]), st.integers(0, 6))


NO_PAUSES = TurnLimits(store_pause_s=0.0)


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=12),
    st.integers(0, 3),
    st.lists(FAULTS, max_size=10),
)
@settings(max_examples=150, deadline=None)
def test_the_log_ends_with_the_whole_reply_and_readers_saw_each_token_once(
    sizes: list[int], takeovers: int, faults: list[tuple[str, int]]
) -> None:
    asyncio.run(_write(sizes, takeovers, faults))


async def _write(sizes: list[int], takeovers: int, faults: list[tuple[str, int]]) -> None:
    log = FailingLog(faults)
    claim = await log.begin_turn(S, "t1", OPENING, 1.0)
    for _ in range(takeovers):
        claim = await log.take_over(S, "t1", 1.0)
    seen: list[int] = []

    def durable(frame: Frame, offset: int) -> None:
        assert frame.index == len(seen), "a token twice, or one left out"
        seen.extend(frame.tokens)

    writer = TurnWriter(
        TurnKey(S, "t1", claim.epoch, "phone", claim.nonce),
        log,
        generation=claim.cursor.generation,
        opening=OPENING,
        made=None,
        on_durable=durable,
        on_stop=lambda: None,
        now_ms=lambda: 0,
        limits=NO_PAUSES,
    )
    running = asyncio.create_task(writer.run())
    at = 0
    for size in sizes:
        tokens = tuple(range(at, at + size))
        writer.add(at, tokens, tuple(f"{t} " for t in tokens), "cloud" if at % 3 else "edge")
        at += size
        await asyncio.sleep(0)
    writer.close()
    await asyncio.wait_for(running, 10)
    end = TurnEnded(id="e", turn="t1", epoch=writer.hold.epoch, reason="stop")
    try:
        await asyncio.wait_for(writer.end(end), 10)
    except StaleEpoch:
        # Its end was appended, not acknowledged, and the loss was noticed then.
        assert any(isinstance(op, TurnEnded) for op in log.ops)
    turn = find_turn(await ModelLog.state(log, S), "t1")
    assert turn is not None
    assert seen == list(range(at))
    assert turn.reason == "stop"
    assert turn.prompt == "Hello"
    assert turn.tokens == seen


async def test_what_the_log_lost_is_put_back_and_goes_on_after_it() -> None:
    log = ModelLog()
    claim = await log.begin_turn(S, "t1", OPENING, 1.0)
    shown: list[int] = []
    writer = TurnWriter(
        TurnKey(S, "t1", claim.epoch, "phone", claim.nonce),
        log,
        generation=1,
        opening=OPENING,
        made=None,
        on_durable=lambda frame, offset: shown.extend(frame.tokens),
        on_stop=lambda: None,
        now_ms=lambda: 0,
        limits=NO_PAUSES,
    )
    running = asyncio.create_task(writer.run())
    for token in range(3):
        writer.add(token, (token,), ("x",), "cloud")
        while len(shown) <= token:  # noqa: ASYNC110
            await asyncio.sleep(0)
    log.lose(2)
    writer.add(3, (3,), ("x",), "cloud")
    writer.close()
    await asyncio.wait_for(running, 10)
    assert shown == [0, 1, 2, 3]
    turn = find_turn(await log.state(S), "t1")
    assert turn is not None
    assert turn.tokens == [0, 1, 2, 3]


async def test_a_reply_that_went_another_way_is_left_to_its_owner() -> None:
    log = ModelLog()
    claim = await log.begin_turn(S, "t1", OPENING, 1.0)
    writer = TurnWriter(
        TurnKey(S, "t1", claim.epoch, "phone", claim.nonce),
        log,
        generation=1,
        opening=OPENING,
        made=Chunk(0, (1, 2), ("a", "b"), ""),
        on_durable=lambda frame, offset: None,
        on_stop=lambda: None,
        now_ms=lambda: 0,
        limits=NO_PAUSES,
    )
    other = await log.take_over(S, "t1", 1.0)
    frame = Frame(id="f", turn="t1", epoch=2, index=0, tokens=(7,), pieces=("z",))
    await log.append_turn(S, other.hold("t1"), 1, [frame])
    log.lose(0)
    writer.add(2, (3,), ("c",), "cloud")
    with pytest.raises(StaleEpoch):
        await asyncio.wait_for(writer.run(), 10)
    turn = find_turn(await log.state(S), "t1")
    assert turn is not None
    assert turn.tokens == [7]
