"""What the fault suite breaks: two edges, two clouds, store and broker, each a real process."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from segue.local.parts import Part, Program, Server, module_command
from segue.testing import LocalStack
from segue_contract.servers import Broker, Valkey
from segue_contract.servers.process import LOOPBACK, free_port

STORE_HOLD_S = 3.0  # nobody else can go on meanwhile, so the reader's pause is about this
BROKER_HOLD_S = 6.0  # far above the goal for a follower's lag


@dataclass(frozen=True)
class Kind:
    """One kind of fault."""

    how: str  # "killed" (SIGKILL), "silent" (SIGSTOP, later SIGCONT) or "planned" (SIGTERM)
    part: str  # "edge", "cloud", "store" or "broker"
    plan: str = "ship"
    direct: bool = False  # the device asks a cloud, and no edge takes part

    @property
    def name(self) -> str:
        variant = "_direct" if self.direct else "_text" if self.plan == "text" else ""
        return f"{self.how}_{self.part}{variant}"

    @property
    def asked_plan(self) -> str:
        """A cloud alone forces no plan that needs an edge."""
        return "auto" if self.direct else self.plan

    @property
    def others_go_on(self) -> bool:
        """Whether a second one is at hand that may take over."""
        return self.part in ("edge", "cloud")


@dataclass(frozen=True)
class House:
    """`edges[0]` is the one that the asking device tries first."""

    stack: LocalStack
    clouds: tuple[Program, Program]
    servers: dict[str, Server]

    @property
    def edges(self) -> list[Program]:
        return self.stack.edges

    def addresses(self, kind: Kind) -> list[str]:
        """Where the asking device asks, in this order."""
        return [one.address for one in (self.clouds if kind.direct else self.edges)]

    def cpu_s(self) -> list[float]:
        """Processor time that each cloud has used: who decodes uses it."""
        times = [psutil.Process(cloud.pid).cpu_times() for cloud in self.clouds]
        return [one.user + one.system for one in times]

    def victim(self, kind: Kind, before: list[float], serving: str) -> Part:
        """The part to break: of two clouds the one at `serving`, or which worked since `before`."""
        if kind.part == "edge":
            return self.edges[0]
        if kind.direct and kind.part == "cloud":
            return next(cloud for cloud in self.clouds if cloud.address == serving)
        if kind.part == "cloud":
            used = [now - then for now, then in zip(self.cpu_s(), before, strict=True)]
            return self.clouds[used.index(max(used))]
        return self.servers[kind.part]


async def strike(part: Part, kind: Kind) -> None:
    """Let the fault happen. A planned stop is awaited to the process's end."""
    if kind.how == "killed":
        await part.kill()
    elif kind.how == "silent":
        part.pause()
    else:
        await part.stop()


async def mend(part: Part) -> None:
    """As it was: resumed where it stood still, started where it ended."""
    part.resume()
    if not part.running:
        await part.restart()


@asynccontextmanager
async def house(model: str = "", edges: int = 2) -> AsyncIterator[House]:
    """All edges know both clouds; the store keeps its data over a restart (AOF, everysec)."""
    async with AsyncExitStack() as cleanup:
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="segue-faults-")))
        servers = {
            "store": Server("store", Valkey.start(directory=folder / "store")),
            "broker": Server("broker", Broker.start()),
        }
        for server in servers.values():
            await server.start()
            cleanup.push_async_callback(server.stop)
        redis_url, mqtt_url = servers["store"].url, servers["broker"].url
        port = free_port()
        command = module_command("segue", "cloud", "--port", str(port))
        urls = {"SEGUE_REDIS_URL": redis_url, "SEGUE_MQTT_URL": mqtt_url}
        second = Program(
            "cloud-2",
            [*command, *(["--model", model] if model else [])],
            log=folder / "cloud-2.log",
            env={**os.environ, **urls, "PYTHONUNBUFFERED": "1"},
        )
        starting = asyncio.create_task(second.start())
        cleanup.push_async_callback(second.stop)
        stack = LocalStack(
            model=model,
            edges=edges,
            edge_args=("--cloud", f"{LOOPBACK}:{port}"),
            redis_url=redis_url,
            mqtt_url=mqtt_url,
        )
        try:
            await cleanup.enter_async_context(stack)
        finally:
            await starting
        yield House(stack, (stack.cloud, second), servers)
