"""The cloud's metrics endpoint and the turns beside it."""

from __future__ import annotations

import asyncio

import pytest

from segue_cloud.metrics import CloudMetrics
from segue_contract.errors import PortInUse
from segue_contract.servers.process import free_port
from tests.support.scripted_engine import ScriptedEngine


class _Turns:
    running = 0


def _metrics() -> CloudMetrics:
    return CloudMetrics(ScriptedEngine(()), _Turns(), dict, {})  # type: ignore[arg-type]


async def test_closing_it_holds_up_nothing_else() -> None:
    """Its server takes up to half a second to end, in which turns go on decoding."""
    listening = _metrics().listening(free_port())
    await listening.__aenter__()
    closing = asyncio.ensure_future(listening.__aexit__(None, None, None))
    turns = 0
    while not closing.done():
        await asyncio.sleep(0)
        turns += 1
    await closing
    assert turns > 10


async def test_a_port_that_is_taken_is_named() -> None:
    port = free_port()
    async with _metrics().listening(port):
        with pytest.raises(PortInUse, match=str(port)):
            async with _metrics().listening(port):
                pass
