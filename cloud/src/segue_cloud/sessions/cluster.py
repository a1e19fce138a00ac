"""A Cluster: each command goes to the node that serves its key's slot.

The map of slots is read from any node, anew whenever an answer shows that it is old: MOVED, a node
that is down or silent. While a slot moves, its node answers ASK for keys that have gone already
(such a command is sent again at once, to where it says), and TRYAGAIN for scripts whose keys are
on both sides (they are repeated until the move is over).
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from typing import Any

from redis.exceptions import (
    AskError,
    ClusterDownError,
    MovedError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as LinkError

from segue_cloud.sessions.keys import key_slot
from segue_cloud.sessions.node import Connections, NewNode, Node, elsewhere, heard
from segue_cloud.sessions.scripts import Command
from segue_contract.limits import SILENCE_S, STORE_LOOKUP_S
from segue_contract.store_url import Address, StoreUrl

# Commands without a key: any node serves them. PUBLISH reaches the listeners of all.
_KEYLESS = ("PING", "TIME", "CONFIG", "PUBLISH")
_SLOTS: Command = ("CLUSTER", "SLOTS")


def slot_of(command: Command) -> int | None:
    """The slot of the command's keys, which is one; None where any node serves it."""
    name = command[0]
    if name in _KEYLESS:
        return None
    if name != "EVALSHA":
        return key_slot(str(command[1]))
    slots = {key_slot(str(key)) for key in command[3 : 3 + int(command[2])]}
    assert len(slots) == 1, f"a script with keys of {len(slots)} slots"
    return slots.pop()


def read_slots(reply: Any, asked: Address) -> dict[int, Address]:
    """CLUSTER SLOTS: each slot's primary. A node without an address is the one that was `asked`."""
    found: dict[int, Address] = {}
    for first, last, (host, port, *_), *_ in reply:
        if host != b"?":  # a node that knows no address of another one
            address = (host.decode() if host else asked[0], int(port))
            found.update(dict.fromkeys(range(first, last + 1), address))
    return found


class Cluster:
    """A `Route` to the primaries of a Cluster."""

    patience_s = SILENCE_S  # a replica may take its node's place meanwhile

    def __init__(self, url: StoreUrl, connections: Connections, new_node: NewNode) -> None:
        self.shown = url.shown.partition("://")[2]
        self.hint = (
            "Check that the Cluster's nodes run and serve all slots (SEGUE_REDIS_URL, "
            "CLUSTER INFO), then try again."
        )
        self._seeds = url.seeds
        self._connections = connections
        self._new_node = new_node
        self._nodes: dict[Address, Node] = {}
        self._slots: dict[int, Address] = {}
        self._old = True  # the map
        self._ask_first: Address | None = None
        self._turns = itertools.count()
        self._looking: asyncio.Task[None] | None = None

    def split(self, commands: Sequence[Command]) -> list[Sequence[Command]]:
        """By slot, not by node: where one is refused, those behind it are not sent."""
        return [list(run) for _, run in itertools.groupby(commands, slot_of)]

    async def spread(self, commands: Sequence[Command]) -> list[list[int]]:
        await self._look()
        groups: dict[Address | None, list[int]] = {}
        for number, command in enumerate(commands):
            slot = slot_of(command)
            groups.setdefault(None if slot is None else self._slots.get(slot), []).append(number)
        return list(groups.values())

    async def node(self, commands: Sequence[Command]) -> Node:
        await self._look()
        slot = slot_of(commands[0]) if commands else None
        if slot is None:
            return next(iter(await self.nodes(turn=next(self._turns))))
        address = self._slots.get(slot)
        if address is None:
            self._old = True
            raise LinkError(f"no node of the Cluster serves slot {slot}")
        return self._at(address)

    async def nodes(self, turn: int = 0) -> list[Node]:
        await self._look()
        addresses = sorted(set(self._slots.values()))
        turn %= len(addresses)
        return [self._at(one) for one in (*addresses[turn:], *addresses[:turn])]

    async def asked(self, error: AskError) -> Node:
        return self._at((error.host, error.port))

    async def failed(self, node: Node, error: Exception) -> None:
        if isinstance(error, MovedError):
            self._ask_first = (error.host or self._address_of(node), error.port)
            self._old = True
        elif isinstance(error, ResponseError):
            self._old = self._old or isinstance(error, ClusterDownError) or elsewhere(error)
        else:
            self._old = True
            if not isinstance(error, TimeoutError):
                await node.forget()

    async def close(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
        for node in self._nodes.values():
            await node.forget()

    # -- the map ------------------------------------------------------------------------------

    async def _look(self) -> None:
        if not self._old:
            return
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._read_map(), name="read the Cluster's slots")
            self._looking.add_done_callback(heard)
        await asyncio.shield(self._looking)

    async def _read_map(self) -> None:
        """From the first node that answers: the one that was named last, then all in turn."""
        known = list(dict.fromkeys((*self._slots.values(), *self._seeds)))
        turn = next(self._turns) % len(known)
        first = [self._ask_first] if self._ask_first is not None else []
        self._ask_first = None
        reasons: list[str] = []
        for address in dict.fromkeys((*first, *known[turn:], *known[:turn])):
            try:
                (reply,) = await self._at(address).attempt([_SLOTS], STORE_LOOKUP_S)
                if isinstance(reply, ResponseError):
                    raise reply
            except (RedisError, OSError) as error:  # TimeoutError is an OSError
                reasons.append(f"{address[0]}:{address[1]}: {error or 'no answer in time'}")
                continue
            if slots := read_slots(reply, address):
                self._slots, self._old = slots, False
                await self._keep({*slots.values(), *self._seeds})
                return
            reasons.append(f"{address[0]}:{address[1]}: no slot has a node")
        raise LinkError(f"no node of the Cluster answers ({'; '.join(reasons)})")

    async def _keep(self, addresses: set[Address]) -> None:
        for address in [one for one in self._nodes if one not in addresses]:
            await self._nodes.pop(address).drop()

    def _at(self, address: Address) -> Node:
        node = self._nodes.get(address)
        if node is None:
            node = self._nodes[address] = self._new_node(self._connections.to(address), False)
        return node

    def _address_of(self, node: Node) -> str:
        return next((host for (host, _), one in self._nodes.items() if one is node), "")
