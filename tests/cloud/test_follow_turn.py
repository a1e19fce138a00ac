"""A turn followed through the log, also through a log that lost some of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from segue_cloud.hub.hub import Following
from segue_cloud.rpc.follow_turn import follow_turn
from segue_contract.ids import SessionName
from segue_contract.sync.state import Cursor, SessionState, TurnState
from segue_contract.turn.events import Ended, Frame, Rewound, Started, TurnEvent
from segue_contract.turn.merge import Merger

S = SessionName("default", "trip")


class Log:
    """Followers see `steps`, one after another."""

    def __init__(self, *steps: SessionState) -> None:
        self._steps = steps

    @asynccontextmanager
    async def follow(
        self, session: SessionName, after: Cursor | None = None
    ) -> AsyncIterator[AsyncIterator[Following]]:
        async def steps() -> AsyncIterator[Following]:
            for state in self._steps:
                yield Following([], state)

        yield steps()


def state(generation: int, tokens: list[int], reason: str = "") -> SessionState:
    turn = TurnState(
        turn="t1", epoch=1, tokens=tokens, pieces=[f"{token} " for token in tokens], reason=reason
    )
    return SessionState(cursor=Cursor(generation, 9), turns=[turn])


async def events(log: Any) -> list[TurnEvent]:
    return [event async for event in follow_turn(log, S, "t1", 0)]


async def test_tokens_that_the_log_lost_are_taken_back() -> None:
    log = Log(state(1, [1, 2, 3]), state(2, [1]), state(2, [1, 7, 8], "stop"))
    merger = Merger()
    found = await events(log)
    for event in found:
        if isinstance(event, Frame):
            merger.push(event)
        elif isinstance(event, Rewound):
            merger.rewind(event.epoch, event.index)
    assert any(isinstance(event, Rewound) for event in found)
    assert isinstance(found[-1], Ended)
    assert merger.tokens == [1, 7, 8]


async def test_a_turn_that_the_log_lost_ends_the_stream_without_an_end() -> None:
    log = Log(state(1, [1, 2]), SessionState(cursor=Cursor(2, 0)))
    assert [type(event) for event in await events(log)] == [Started, Frame]
