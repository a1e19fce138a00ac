"""Where the product's code meets the outside: clocks, chance, libraries. Replaced for one run.

Everything replaced here is a library (redis-py's connection, aiomqtt's client, grpc.aio's channel
and server, structlog's output), a clock, a source of chance, or a model that would have to be
built. The product's own decisions run as they are.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import os
import pkgutil
import socket
import sys
import time
import types
from asyncio.mixins import _LoopBoundMixin
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import aiomqtt
import grpc

from tests.sim import broker, rpc_client, rpc_server, store
from tests.sim.edge import SimCompute
from tests.sim.engine import SimEngine
from tests.sim.world import World
from tests.support.tiny_edge import MANIFEST, tiny_tokenizer

# A default argument is bound when its module is loaded: these find the simulation's clock later.
_LATE: dict[Any, Callable[..., Any]] = {
    time.monotonic: lambda: time.monotonic(),
    time.time: lambda: time.time(),
    time.perf_counter: lambda: time.perf_counter(),
    os.urandom: lambda size: os.urandom(size),
}
_ROOMS = (
    "segue", "segue_cloud.sessions", "segue_cloud.log", "segue_cloud.hub", "segue_cloud.mqtt",
    "segue_cloud.turns", "segue_cloud.rpc", "segue_cloud.app", "segue_edge.turns",
    "segue_edge.uplink", "segue_edge.planner", "segue_edge.api", "segue_edge.node",
    "segue_contract",
)  # fmt: skip
_SKIPPED = ("segue.cli", "segue.__main__", "segue.local", "segue_contract.model.__main__")
_TOKENIZER = functools.cache(tiny_tokenizer)
# The product's values would make up most of a run's steps.
_HUB_POLL_S = 0.2
_SHARDS = 2
# Of what an edge sends to measure its link: to copy the product's megabytes would be a twentieth of
# a run. No link here has a rate, so that all of them look fast in either case.
_PROBE_BYTES = {"PROBE_FIRST_BYTES": 16 * 1024, "PROBE_PAYLOAD_BYTES": 256 * 1024}


# Structures with a `check_integrity`: each is looked at after every step that used it.
_CHECKED = (
    ("segue_cloud.hub.state", "HubState"),
    ("segue_cloud.mqtt.outbox", "Outbox"),
    ("segue_contract.turn.merge", "Merger"),
)


def _looked_at(world: World, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def used(self: Any, *args: Any, **kwargs: Any) -> Any:
        world.changed(self)
        return method(self, *args, **kwargs)

    return used


def _methods(owner: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Whatever can change one of its objects."""
    for name, member in vars(owner).items():
        used = name == "__init__" or not name.startswith(("_", "check_integrity"))
        if used and isinstance(member, types.FunctionType):
            yield name, member


def _no_network(*_: Any, **__: Any) -> None:
    raise AssertionError("A simulation reached for the real network.")


@functools.cache
def prepare() -> None:
    """Load the product's modules and let their default clocks be found late. Once a process."""
    for room in _ROOMS:
        with contextlib.suppress(ModuleNotFoundError):
            _load(room)
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("segue", "segue_cloud", "segue_edge", "segue_contract"):
            for value in vars(module).values():
                _unbind(value, name)
    gc.collect()
    gc.freeze()  # what is loaded now is never looked at by the collections after each run


def _load(room: str) -> None:
    module = importlib.import_module(room)
    for found in pkgutil.iter_modules(getattr(module, "__path__", ()), f"{room}."):
        if not found.name.startswith(_SKIPPED):
            _load(found.name)


def _unbind(value: Any, module: str) -> None:
    if isinstance(value, type) and value.__module__ == module:
        for member in vars(value).values():
            _unbind(getattr(member, "__func__", member), module)
    elif isinstance(value, types.FunctionType):
        if value.__defaults__:
            value.__defaults__ = tuple(_late(one) for one in value.__defaults__)
        for key, one in (value.__kwdefaults__ or {}).items():
            value.__kwdefaults__[key] = _late(one)


def _late(value: Any) -> Any:
    try:
        return _LATE.get(value, value)
    except TypeError:  # not hashable
        return value


@contextlib.contextmanager
def patched(world: World) -> Iterator[None]:
    """While inside, the product's programs run in `world`."""
    prepare()
    app: Any = importlib.import_module("segue_cloud.app")
    node: Any = importlib.import_module("segue_edge.node")
    hub: Any = importlib.import_module("segue_cloud.hub.hub")
    mqtt_client: Any = importlib.import_module("segue_contract.transport.mqtt_client")
    link: Any = importlib.import_module("segue_cloud.sessions.node")

    def connection(**options: Any) -> store.Connection:
        return store.Connection(world, **options)

    def channel(
        target: str, credentials: Any = None, options: Any = None, **_: Any
    ) -> rpc_client.Channel:
        return rpc_client.Channel(world, target, options)

    def server(*_: Any, interceptors: Any = (), **__: Any) -> rpc_server.Server:
        return rpc_server.Server(world, interceptors)

    def compute(*_: Any, **__: Any) -> SimCompute:
        return SimCompute(world.rng(f"compute {world.loop.steps}"))

    async def engine(*_: Any, **__: Any) -> SimEngine:
        return SimEngine(world)

    with contextlib.ExitStack() as stack:
        for target, name, replacement in (
            (_LoopBoundMixin, "_get_loop", lambda _: world.loop),  # it would look which one
            (link, "Connection", connection),
            (aiomqtt, "Client", functools.partial(broker.Client, world)),
            (mqtt_client, "MqttClient", functools.partial(broker.Client, world)),
            (socket, "getaddrinfo", _no_network),
            (grpc.aio, "insecure_channel", channel),
            (grpc.aio, "server", server),
            (node, "ComputeThread", compute),
            (app, "_load_engine", engine),
            (app, "model_directory", lambda name: Path(name)),
            (app, "read_manifest", lambda directory: MANIFEST),
            (app.ChatTokenizer, "load", lambda directory, manifest: _TOKENIZER()),
        ):
            stack.enter_context(patch.object(target, name, replacement))
        for room in ("active", "keys", "running"):
            module = importlib.import_module(f"segue_cloud.sessions.{room}")
            stack.enter_context(patch.object(module, "ACTIVE_SHARDS", _SHARDS))
        probe = importlib.import_module("segue_edge.uplink.goodput_probe")
        for name, size in _PROBE_BYTES.items():
            stack.enter_context(patch.object(probe, name, size))
        for room, kind in _CHECKED if world.looks else ():
            owner = getattr(importlib.import_module(room), kind)
            for name, method in _methods(owner):
                stack.enter_context(patch.object(owner, name, _looked_at(world, method)))
        stack.enter_context(patch.dict(hub.Hub.__init__.__kwdefaults__, {"poll_s": _HUB_POLL_S}))
        yield
