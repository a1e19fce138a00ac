"""Finds edges, measures how far each is, and has the nearest asked first."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from random import Random

from segue._nearest import Nearest
from segue._nodes import Nodes
from segue_contract.errors import InvalidArgument
from segue_contract.limits import (
    FIND_FIRST_S,
    FIND_INTERVAL_S,
    FIND_ROUNDS,
    MAX_EDGES_MEASURED,
)
from segue_contract.v1 import agent_pb2 as pb

Sleep = Callable[[float], Awaitable[object]]


class Finding:
    """`first` looks once; `run` goes on looking until it is cancelled.

    Args:
        given: the addresses that the app named.
    """

    def __init__(
        self,
        nodes: Nodes,
        given: Sequence[str],
        *,
        sleep: Sleep = asyncio.sleep,
        random: Random | None = None,
    ) -> None:
        self._nodes = nodes
        self._given = tuple(given)
        self._nearest = Nearest(given)
        self._watched = list(self._given)
        self._sleep = sleep
        self._random = random or Random(os.urandom(8))

    async def first(self) -> None:
        """Look, for a moment: what is not known by then is found later."""
        try:
            async with asyncio.timeout(FIND_FIRST_S):
                await self.look(ask=True)
        except TimeoutError:
            pass

    async def run(self) -> None:
        rounds = 1
        while True:
            await self._sleep(FIND_INTERVAL_S * self._random.uniform(0.8, 1.0))
            await self.look(ask=rounds % FIND_ROUNDS == 0)
            rounds += 1

    async def look(self, *, ask: bool) -> None:
        """Measure those that matter; `ask`: the nodes, which ones there are, first."""
        if ask:
            await self._ask()
        found = await asyncio.gather(*(self._measured_s(one) for one in self._watched))
        for address, round_trip_s in zip(self._watched, found, strict=True):
            self._nearest.saw(address, round_trip_s)
        order = self._nearest.order()
        await self._nodes.prefer(order)
        if ask:
            self._watched = order
            self._nearest.keep(order)
            await self._nodes.forget_spares()

    async def _ask(self) -> None:
        """Where no node answers, the ones that are known go on being watched."""
        try:
            reply: pb.NodesReply = await self._nodes.unary("Nodes", pb.NodesRequest())
        except Exception:  # also what the app's token function raises
            return
        told = {one.url for one in reply.edges} - {*self._watched}
        usable = [one for one in sorted(told) if self._usable(one)]
        chosen = self._random.sample(usable, min(len(usable), MAX_EDGES_MEASURED))
        self._watched = [*self._watched, *chosen]

    def _usable(self, address: str) -> bool:
        try:
            self._nodes.node_at(address)
        except InvalidArgument:  # no address, or a token would go there in the open
            return False
        return True

    async def _measured_s(self, address: str) -> float | None:
        try:
            return await self._nodes.round_trip_s(self._nodes.node_at(address))
        except Exception:  # also what the app's token function raises
            return None
