"""Who does what in a run: devices write, ask and follow while faults happen, then all is healed.

After the last fault everything must converge within `CALM_S`: turns have ended, followers stand at
the log's tail, and every device has the state that the log folds to.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from random import Random

from segue_contract.sync.state import SessionState, TurnState
from tests.sim import faults as faults_of
from tests.sim.broker import Broker
from tests.sim.cluster import CloudProgram
from tests.sim.devices import Device
from tests.sim.edge import EdgeProgram
from tests.sim.faults import Fault
from tests.sim.invariants import History
from tests.sim.store import Store
from tests.sim.world import Violation, World

BUSY_S = 4.0  # faults begin within it
CALM_S = 60.0  # after the last fault
_LOOK_S = 0.25
EDGES_EVERY = 3  # one seed in so many has edges, too; 0: none (`scripts/sim --no-edges`)


@dataclass
class Scene:
    """The parts of one run."""

    world: World
    store: Store
    broker: Broker
    history: History
    clouds: list[CloudProgram] = field(default_factory=list)
    edges: list[EdgeProgram] = field(default_factory=list)
    devices: list[Device] = field(default_factory=list)
    calm: bool = False  # all is healed: nothing more is begun that would only take time


def has_edges(seed: int) -> bool:
    return bool(EDGES_EVERY) and seed % EDGES_EVERY == EDGES_EVERY - 1


async def clouds_and_devices(world: World, faults: list[Fault]) -> Scene:
    """Two clouds; two or three devices of one session, each of which prefers one of them."""
    rng = world.rng("scene")
    store = Store(world)
    scene = Scene(world, store, Broker(world), History(world, store))
    world.network.latency_s = rng.choice([0.0003, 0.003, 0.03])
    world.network.jitter_s = world.network.latency_s * rng.choice([0.5, 2.0])
    scene.clouds = [CloudProgram(world, number) for number in (1, 2)]
    addresses = [cloud.address for cloud in scene.clouds]
    if has_edges(world.seed):
        plan = rng.choice(["auto", "auto", "edge", "ship", "text"])
        scene.edges = [EdgeProgram(world, number, addresses, plan) for number in (1, 2)]
    for name in ("phone", "laptop", "tablet")[: rng.choice([2, 2, 3])]:
        order = rng.sample(addresses, 2)
        if scene.edges:
            near = [edge.address for edge in rng.sample(scene.edges, 2)]
            order = near + order * rng.choice([0, 1])
        scene.devices.append(Device(world, scene.history, name, "trip", order))
        if len(scene.devices) == 1 and rng.random() < 0.2:  # two apps of one device
            twin = Device(world, scene.history, "phone-2", "trip", order[::-1], device=name)
            scene.devices.append(twin)
    for fault in faults:
        world.loop.call_later(
            fault.at_s, _begin, scene, fault, context=world.network._outside.copy()
        )
    lives = [device.process.start(_live(scene, device), device.name) for device in scene.devices]
    await asyncio.sleep(max([BUSY_S, *(one.at_s + one.lasts_s for one in faults)]))
    _heal(scene)
    await _converge(scene, lives)
    return scene


def _begin(scene: Scene, fault: Fault) -> None:
    scene.world.say("fault", fault.kind, round(fault.lasts_s, 3))
    faults_of.KINDS[fault.kind][1](scene, Random(fault.seed), fault)


async def _live(scene: Scene, device: Device) -> None:
    await device.open()
    following = asyncio.create_task(device.follow(), name=f"{device.name} follows")
    following.add_done_callback(lambda task: _unexpected(scene.world, task))
    async with asyncio.TaskGroup() as group:
        group.create_task(_write(scene, device))
        group.create_task(_ask(scene, device))


def _unexpected(world: World, task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        world.fail(f"A follower broke: {task.exception()!r}")


async def _write(scene: Scene, device: Device) -> None:
    for _ in range(device.rng.randrange(3, 10)):
        await asyncio.sleep(device.rng.uniform(0.0, 1.2))
        if scene.calm:
            return
        await device.set_value()


async def _ask(scene: Scene, device: Device) -> None:
    """More and longer turns where there are edges: most of an edge is its part in a turn."""
    rng, edges = device.rng, bool(scene.edges)
    for number in range(rng.choice([1, 2, 3] if edges else [0, 1, 1, 2])):
        await asyncio.sleep(rng.uniform(0.0, 2.0 if edges else 3.0))
        if scene.calm:
            return
        await device.ask(f"{device.name} asks {number}. ", rng.choice([1, 4, 12, 30]))


def _heal(scene: Scene) -> None:
    scene.world.say("calm")
    scene.calm = True
    scene.world.network.heal_all()
    scene.store.go_on()
    scene.store.refusal = scene.store.away = ""
    scene.broker.process.resume()
    scene.broker.drops = scene.broker.doubles = 0.0
    scene.broker.refuses = False
    for program in (*scene.clouds, *scene.edges, *scene.devices):
        program.process.resume()


async def _converge(scene: Scene, lives: list[asyncio.Task[None]]) -> None:
    world = scene.world
    async with asyncio.timeout(CALM_S * 2):
        await asyncio.gather(*lives)
        await asyncio.gather(*(one.process.start(_goes_on(one)) for one in scene.devices))
    until_s = world.now_s + CALM_S
    while (behind := _behind(scene)) is not None:
        if world.now_s > until_s:
            raise Violation(f"Nothing converges within {CALM_S:g} s of quiet: {behind}")
        await asyncio.sleep(_LOOK_S)
    scene.history.check_acks()
    scene.history.check_ended()
    if all(one.lost_at_s < 0 for one in scene.history.sessions.values()):
        async with asyncio.timeout(CALM_S):
            await asyncio.gather(*(one.process.start(one.settle()) for one in scene.devices))
    for device in scene.devices:
        _check_shown(scene, device)


async def _goes_on(device: Device) -> None:
    """In quiet times an append succeeds, at the latest the second one, and a turn is served."""
    require = device.world.require
    if not await device.set_value():
        require(await device.set_value(), f"{device.name} cannot append any more.")
    shown = await device.ask("All quiet? ", 3)
    require(
        len(shown.ended) == 1 and shown.ended[0].durable and shown.ended[0].reason == "length",
        f"{device.name} is not served in quiet times.",
        shown,
    )


def _behind(scene: Scene) -> str | None:
    """Who is not where the log is."""
    for session, history in scene.history.sessions.items():
        for name, turn in history.turns.items():
            if not turn.ended and not history.holed:
                return f"{session}: turn {name} has no end"
        for device in scene.devices:
            for shown in device.asked:
                if shown.ended and shown.turn not in history.turns and history.lost_at_s < 0:
                    return f"{session}: {shown.turn}, served offline, is not in the log"
        devices = [one for one in scene.devices if one.session_name == session]
        for device in devices:
            at = device.state.cursor.offset if device.state is not None else None
            if at != history.tail:
                return f"{device.name} is at {at}, the log at {history.tail}"
        states = [device.state for device in devices if device.state is not None]
        meant = states[0] if history.holed else history.fold()
        for device, found in zip(devices, states, strict=True):
            if _content(found) != _content(meant):
                return f"{device.name} has another state than the log: {_differs(found, meant)}"
    return None


def _content(state: SessionState) -> tuple[object, ...]:
    def turn(one: TurnState) -> tuple[object, ...]:
        return one.turn, one.prompt, one.tokens, one.pieces, one.reason, one.epoch

    turns = [turn(one) for one in state.turns]
    return turns, state.waiting, state.values, state.claims, state.results


def _differs(one: SessionState, other: SessionState) -> str:
    return next(
        f"{left} instead of {right}"
        for left, right in zip(_content(one), _content(other), strict=True)
        if left != right
    )


def _check_shown(scene: Scene, device: Device) -> None:
    """What the asker saw last is what the log keeps."""
    history = scene.history.of(device.session_name)
    for shown in device.asked:
        gone = shown.error == "UnknownSession" and history.lost_at_s >= 0
        device.world.require(
            not shown.started or not shown.error or gone,
            "A turn that was accepted is not told to its end.",
            f"{device.name} {shown}",
        )
        if not shown.ended or history.lost_at_s >= 0:
            continue
        kept = history.turns.get(shown.turn)
        device.world.require(
            kept is not None and kept.tokens == shown.tokens,
            "The asker was shown another reply than the log keeps.",
            f"{device.name} {shown.turn}",
            f"shown {shown.tokens}",
            f"log   {kept.tokens if kept is not None else None}",
        )
