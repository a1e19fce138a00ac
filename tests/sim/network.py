"""Links between processes, and TCP-like connections over them.

A connection keeps order and loses nothing while it stands. Where a link is *cut*, connections over
it break at once and new ones are refused; where it is *silent*, nothing passes and nobody is told:
what was sent arrives when it heals, unless its connection was closed meanwhile.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from tests.sim.loop import SimLoop
from tests.sim.process import Process

_STEP_S = 1e-6  # between messages of one connection
_MOST_EXTRA_S = 0.5  # what is slower than this is a fault: silence is taken for death in 1.5 s


@dataclass
class Link:
    """One direction between two processes."""

    rng: Random
    latency_s: float
    jitter_s: float
    cut: bool = False
    silent: bool = False
    held: list[Callable[[], None]] = field(default_factory=list)

    def delay_s(self) -> float:
        # Mostly a little, seldom much: as on a busy machine.
        chance, jitter_s = self.rng.random, self.jitter_s
        extra = 0.0
        if chance() < 0.1:
            extra = min(chance() ** 4 * 20 * jitter_s, _MOST_EXTRA_S)
        return self.latency_s + chance() * jitter_s + extra


class End:
    """One end of a connection. `on_message` and `on_lost` are called in its process."""

    def __init__(self, network: Network, process: Process, number: int) -> None:
        self.process = process
        self.peer: End
        self.link: Link  # to its peer
        self.open = True
        self.number = number
        self.on_message: Callable[[Any], None] = _ignore
        self.on_lost: Callable[[], None] = lambda: None
        self._network = network
        self._last_s = 0.0  # when what was sent last arrives

    def send(self, message: Any) -> None:
        if self.open:
            self._network.carry(self, self.peer._deliver, message)

    def close(self) -> None:
        """Orderly, or because the process died: the other end is told, where the link lets it."""
        if self.open:
            self.open = False
            self._network.carry(self, self.peer._lost)

    def reset(self) -> None:
        """Both ends learn at once that it is gone; what was on its way is lost."""
        for end in (self, self.peer):
            if end.open:
                end.open = False
                self._network.run_in(end.process, end.on_lost)

    def _deliver(self, message: Any) -> None:
        if self.open:
            self.on_message(message)

    def _lost(self) -> None:
        if self.open:
            self.open = False
            self.on_lost()


def _ignore(message: Any) -> None:
    return None


Accept = Callable[[End], None]


class Network:
    """All links and connections of a world. `say` writes into its trace."""

    def __init__(
        self, loop: SimLoop, rng: Callable[[str], Random], say: Callable[..., None]
    ) -> None:
        self._loop = loop
        self._rng = rng
        self._say = say
        self._links: dict[tuple[str, str], Link] = {}
        self._listening: dict[str, tuple[Process, Accept]] = {}
        self._hosts: dict[str, str] = {}  # by address, the process that listened there last
        self._ends: list[End] = []
        self._numbers = 0
        self._outside = contextvars.Context()  # of no process: what nobody's death prevents
        self.latency_s = 0.0005
        self.jitter_s = 0.001

    # -- use ----------------------------------------------------------------------------------

    def listen(self, process: Process, address: str, accept: Accept) -> None:
        """`accept` gets the server's end of each new connection, in `process`."""
        self._listening[address] = (process, accept)
        self._hosts[address] = process.name
        process.on_kill.append(lambda: self.unlisten(process, address))

    def unlisten(self, process: Process, address: str) -> None:
        if self._listening.get(address, (None,))[0] is process:
            del self._listening[address]

    async def connect(self, process: Process, address: str) -> End:
        """Connect to whoever listens at `address`; hangs while the link is silent.

        Raises:
            ConnectionRefusedError: nobody does, or the link is cut.
        """
        host = self._hosts.get(address, address)
        there, back = self.link(process.name, host), self.link(host, process.name)
        answer = self._loop.create_future()

        def arrive() -> None:
            server, accept = self._listening.get(address, (None, None))
            if server is None or accept is None or there.cut or back.cut:
                self._carry(back, refuse, process)
                return
            self._numbers += 1
            mine, theirs = (End(self, one, self._numbers) for one in (process, server))
            mine.peer, theirs.peer = theirs, mine
            mine.link, theirs.link = (
                self.link(process.name, server.name),
                self.link(server.name, process.name),
            )
            self._ends += (mine, theirs)
            for end in (mine, theirs):
                end.process.on_kill.append(end.close)
            # The kernel of a stopped process accepts: its own part waits for the process.
            self.run_in(server, accept, theirs)
            self._carry(back, agree, process, mine)

        def refuse() -> None:
            if not answer.done():
                answer.set_exception(ConnectionRefusedError(f"Nothing listens at {address}."))

        def agree(end: End) -> None:
            if answer.done():
                end.close()
            else:
                answer.set_result(end)

        self._carry(there, arrive, None)
        connected: End = await answer
        if not connected.open:  # the other side died meanwhile
            raise ConnectionRefusedError(f"Nothing listens at {address}.")
        return connected

    def carry(self, end: End, deliver: Callable[..., None], *args: Any) -> None:
        """What `end` sends, in order, to its peer's process."""
        link = end.link
        if link.silent:
            link.held.append(lambda: self.carry(end, deliver, *args))
            return
        at = max(self._loop._now + link.delay_s(), end._last_s + _STEP_S)
        end._last_s = at
        self._loop.call_in(end.peer.process, at, deliver, *args)

    def _carry(
        self, link: Link, deliver: Callable[..., None], process: Process | None, *args: Any
    ) -> None:
        if link.silent:
            link.held.append(lambda: self._carry(link, deliver, process, *args))
            return
        self._call_at(self._loop.time() + link.delay_s(), process, deliver, *args)

    def run_in(self, process: Process, function: Callable[..., None], *args: Any) -> None:
        """Call `function` in `process`, now."""
        self._call_at(self._loop.time(), process, function, *args)

    def _call_at(
        self, when: float, process: Process | None, function: Callable[..., None], *args: Any
    ) -> None:
        context = process.context if process is not None else self._outside
        self._loop.call_at(when, function, *args, context=context)

    # -- faults -------------------------------------------------------------------------------

    def link(self, source: str, target: str) -> Link:
        """The direction from one process (by name) to another."""
        key = source, target
        found = self._links.get(key)
        if found is None:
            rng = self._rng(f"link {source} {target}")
            found = self._links[key] = Link(rng, self.latency_s, self.jitter_s)
        return found

    def cut(self, one: str, other: str) -> None:
        """No connection between the two stands or can be made."""
        self.link(one, other).cut = self.link(other, one).cut = True
        self.reset(one, other)

    def reset(self, one: str, other: str) -> None:
        """Connections between the two break now; new ones can be made."""
        for end in self._ends:
            if (end.process.name, end.peer.process.name) == (one, other):
                end.reset()
        self._ends = [end for end in self._ends if end.open or end.peer.open]

    def silence(self, source: str, target: str) -> None:
        """One direction falls silent."""
        self.link(source, target).silent = True

    def heal(self, one: str, other: str) -> None:
        """Both directions work again; what was held arrives."""
        for link in (self.link(one, other), self.link(other, one)):
            link.cut = link.silent = False
            held, link.held = link.held, []
            for send in held:
                send()

    def heal_all(self) -> None:
        for one, other in list(self._links):
            self.heal(one, other)
