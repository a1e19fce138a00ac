"""What goes wrong in a run: a list drawn from the seed, so that it can be cut down and replayed.

To add a kind: a function `world parts, rng, Fault -> None` under its name in `KINDS`, with its
weight. It begins the fault now and arranges for its end after `lasts_s`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from segue_contract.limits import CHILD_STOP_S

if TYPE_CHECKING:
    from tests.sim.cluster import CloudProgram
    from tests.sim.edge import EdgeProgram
    from tests.sim.scenarios import Scene


@dataclass(frozen=True)
class Fault:
    """`seed`: of what the fault still chooses when it happens."""

    at_s: float
    kind: str
    lasts_s: float
    seed: int

    def __str__(self) -> str:
        return f"{self.at_s:6.2f} s  {self.kind} for {self.lasts_s:.2f} s"


_LASTS_S = (0.01, 0.1, 0.3, 1.0, 2.5, 4.0, 7.0)
_ISOLATED_S = (2.5, 5.0, 10.0, 12.0)  # an edge looks for another cloud for 10 s before it is alone


def kinds_for(edges: bool) -> dict[str, tuple[float, Begin]]:
    """With the weights that they have where there are edges, or none."""
    return {
        kind: (weight * (3.0 if "edge" in kind else 1.0), begin)
        for kind, (weight, begin) in KINDS.items()
        if edges or "edge" not in kind
    }


def draw(rng: Random, until_s: float, kinds: dict[str, tuple[float, Begin]]) -> list[Fault]:
    """Some faults before `until_s`; sometimes none, sometimes several at once."""
    names, weights = list(kinds), [weight for weight, _ in kinds.values()]
    faults = []
    for _ in range(rng.choice([0, 1, 1, 2, 2, 3, 4, 6])):
        kind = rng.choices(names, weights)[0]
        lasts = _ISOLATED_S if kind == "isolate edge" else _LASTS_S
        lasts_s = rng.choice(lasts) * rng.uniform(0.5, 1.5)
        faults.append(Fault(rng.uniform(0.2, until_s), kind, lasts_s, rng.getrandbits(32)))
    return sorted(faults, key=lambda fault: fault.at_s)


Begin = Callable[["Scene", Random, Fault], None]


def _later(scene: Scene, fault: Fault, undo: Callable[[], None]) -> None:
    scene.world.loop.call_later(fault.lasts_s, undo, context=scene.world.network._outside.copy())


def _cloud(scene: Scene, rng: Random) -> int:
    return rng.randrange(len(scene.clouds))


# -- programs ---------------------------------------------------------------------------------


def kill_cloud(scene: Scene, rng: Random, fault: Fault) -> None:
    _kill(scene, scene.clouds[_cloud(scene, rng)], fault)


def _kill(scene: Scene, program: CloudProgram | EdgeProgram, fault: Fault) -> None:
    if program.process.alive:
        program.kill()
        _later(scene, fault, program.start)


def kill_edge(scene: Scene, rng: Random, fault: Fault) -> None:
    if scene.edges:
        _kill(scene, rng.choice(scene.edges), fault)


def _stop(scene: Scene, program: CloudProgram | EdgeProgram, fault: Fault) -> None:
    """As planned, by whoever starts it again: with SIGKILL where that takes too long."""
    process = program.process
    if not process.alive:
        return
    program.terminate()

    def restart() -> None:
        if program.process is process:
            program.kill()
            program.start()

    outside = scene.world.network._outside.copy()
    scene.world.loop.call_later(CHILD_STOP_S + fault.lasts_s, restart, context=outside)


def stop_cloud(scene: Scene, rng: Random, fault: Fault) -> None:
    _stop(scene, scene.clouds[_cloud(scene, rng)], fault)


def stop_edge(scene: Scene, rng: Random, fault: Fault) -> None:
    if scene.edges:
        _stop(scene, rng.choice(scene.edges), fault)


def pause_edge(scene: Scene, rng: Random, fault: Fault) -> None:
    if scene.edges:
        process = rng.choice(scene.edges).process
        process.pause()
        _later(scene, fault, process.resume)


def pause_device(scene: Scene, rng: Random, fault: Fault) -> None:
    """A laptop that is closed and opened again."""
    process = rng.choice(scene.devices).process
    process.pause()
    _later(scene, fault, process.resume)


def pause_cloud(scene: Scene, rng: Random, fault: Fault) -> None:
    process = scene.clouds[_cloud(scene, rng)].process
    process.pause()
    _later(scene, fault, process.resume)


# -- the store --------------------------------------------------------------------------------


def restart_store(scene: Scene, rng: Random, fault: Fault) -> None:
    if scene.store.process.alive:
        scene.store.restart(fault.lasts_s)


def lose_tail(scene: Scene, rng: Random, fault: Fault) -> None:
    """A crash, or a fail-over to a replica that lagged."""
    store = scene.store
    lose = min(rng.choice([1, 1, 2, 3, 5, 10]), store.writes - _KEPT)
    if store.process.alive and lose > 0:
        store.restart(fault.lasts_s, lose=lose, why="fail-over")


def stall_store(scene: Scene, rng: Random, fault: Fault) -> None:
    scene.store.stall()
    _later(scene, fault, scene.store.go_on)


def refuse_writes(scene: Scene, rng: Random, fault: Fault) -> None:
    scene.store.refusal = rng.choice(
        [
            "OOM command not allowed when used memory > 'maxmemory'.",
            "MISCONF Errors writing to the AOF file.",
            "NOREPLICAS Not enough good replicas to write.",
            "READONLY You can't write against a read only replica.",
        ]
    )

    def take() -> None:
        scene.store.refusal = ""

    _later(scene, fault, take)


def other_store(scene: Scene, rng: Random, fault: Fault) -> None:
    """What answers is not, or not yet, the one to ask."""
    scene.store.away = rng.choice(
        [
            "LOADING Redis is loading the dataset in memory",
            "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
            "MOVED 5718 store:6379",
            "CLUSTERDOWN The cluster is down",
            "TRYAGAIN Multiple keys request during rehashing of slot",
        ]
    )

    def serve() -> None:
        scene.store.away = ""

    _later(scene, fault, serve)


def evict(scene: Scene, rng: Random, fault: Fault) -> None:
    """A store whose policy was changed while it ran throws away a session's log, what it knows of
    it, or all of a session."""
    keys = [key for key in scene.store.space.values if b":trip}:" in key]
    gone = rng.choice([b":log", b":meta", b""])
    scene.store.evict([key for key in keys if key.endswith(gone)])


# -- clocks -----------------------------------------------------------------------------------

_JUMPS_S = (-86_400.0, -20.0, -3.0, -0.4, 0.4, 3.0, 20.0, 86_400.0)


def skew_clock(scene: Scene, rng: Random, fault: Fault) -> None:
    """A wall clock jumps, and stays there."""
    program = rng.choice([*scene.clouds, *scene.edges, *scene.devices])
    program.process.skew_s += rng.choice(_JUMPS_S)


def skew_store(scene: Scene, rng: Random, fault: Fault) -> None:
    """The clock that leases run by."""
    scene.store.skew_s += rng.choice(_JUMPS_S)


_KEPT = 12  # first writes that are never lost: the session itself, and who opened it

# -- links ------------------------------------------------------------------------------------


def _pair(scene: Scene, rng: Random) -> tuple[str, str]:
    cloud = scene.clouds[_cloud(scene, rng)].name
    if scene.edges and rng.random() < 0.5:
        near = rng.choice(scene.edges).name
        return near, rng.choice([cloud, cloud, rng.choice(scene.devices).name])
    others = ["store", "store", "broker", *(device.name for device in scene.devices)]
    if rng.random() < 0.1 and scene.devices:
        return rng.choice(scene.devices).name, "broker"
    return cloud, rng.choice(others)


def reset_link(scene: Scene, rng: Random, fault: Fault) -> None:
    scene.world.network.reset(*_pair(scene, rng))


def cut_link(scene: Scene, rng: Random, fault: Fault) -> None:
    pair = _pair(scene, rng)
    scene.world.network.cut(*pair)
    _later(scene, fault, lambda: scene.world.network.heal(*pair))


def silent_link(scene: Scene, rng: Random, fault: Fault) -> None:
    one, other = _pair(scene, rng)
    scene.world.network.silence(one, other)
    scene.world.network.silence(other, one)
    _later(scene, fault, lambda: scene.world.network.heal(one, other))


def half_open_link(scene: Scene, rng: Random, fault: Fault) -> None:
    one, other = _pair(scene, rng)
    if rng.random() < 0.5:
        one, other = other, one
    scene.world.network.silence(one, other)
    _later(scene, fault, lambda: scene.world.network.heal(one, other))


def isolate_edge(scene: Scene, rng: Random, fault: Fault) -> None:
    """No cloud can be reached from an edge, or from any; sometimes its process dies meanwhile."""
    if not scene.edges:
        return
    network = scene.world.network
    edges = rng.sample(scene.edges, rng.choice([1, len(scene.edges)]))
    pairs = [(edge.name, cloud.name) for edge in edges for cloud in scene.clouds]
    for one, other in pairs:
        if rng.random() < 0.7:
            network.cut(one, other)
        else:
            network.silence(one, other)
            network.silence(other, one)

    def heal() -> None:
        for one, other in pairs:
            network.heal(one, other)

    _later(scene, fault, heal)
    if rng.random() < 0.4:
        at_s = rng.uniform(0.2, 1.2) * fault.lasts_s
        dies = Fault(0.0, "kill edge", rng.uniform(0.0, 1.0), 0)
        outside = network._outside.copy()
        scene.world.loop.call_later(at_s, _kill, scene, edges[0], dies, context=outside)


# -- the broker -------------------------------------------------------------------------------


def restart_broker(scene: Scene, rng: Random, fault: Fault) -> None:
    if scene.broker.process.alive:
        scene.broker.restart(fault.lasts_s)


def bad_broker(scene: Scene, rng: Random, fault: Fault) -> None:
    """It loses and doubles messages."""
    broker = scene.broker
    broker.drops, broker.doubles = rng.choice([0.0, 0.3, 1.0]), rng.choice([0.0, 0.5])

    def mend() -> None:
        broker.drops = broker.doubles = 0.0

    _later(scene, fault, mend)


def drop_sessions(scene: Scene, rng: Random, fault: Fault) -> None:
    scene.broker.drop_sessions(silently=rng.random() < 0.5)


def pause_broker(scene: Scene, rng: Random, fault: Fault) -> None:
    process = scene.broker.process
    process.pause()
    _later(scene, fault, process.resume)


def refuse_publishes(scene: Scene, rng: Random, fault: Fault) -> None:
    scene.broker.refuses = True

    def take() -> None:
        scene.broker.refuses = False

    _later(scene, fault, take)


KINDS: dict[str, tuple[float, Begin]] = {
    "kill cloud": (2.0, kill_cloud),
    "stop cloud": (1.0, stop_cloud),
    "pause cloud": (1.5, pause_cloud),
    "kill edge": (1.0, kill_edge),
    "stop edge": (0.7, stop_edge),
    "pause edge": (1.0, pause_edge),
    "isolate edge": (1.5, isolate_edge),
    "pause device": (0.7, pause_device),
    "restart store": (1.0, restart_store),
    "lose tail": (2.0, lose_tail),
    "stall store": (1.0, stall_store),
    "refuse writes": (0.5, refuse_writes),
    "other store": (0.7, other_store),
    "evict": (0.7, evict),
    "skew clock": (0.7, skew_clock),
    "skew store": (0.7, skew_store),
    "reset link": (2.0, reset_link),
    "cut link": (1.0, cut_link),
    "silent link": (1.0, silent_link),
    "half-open link": (1.0, half_open_link),
    "restart broker": (0.7, restart_broker),
    "bad broker": (1.0, bad_broker),
    "drop sessions": (0.7, drop_sessions),
    "pause broker": (0.7, pause_broker),
    "refuse publishes": (0.7, refuse_publishes),
}
