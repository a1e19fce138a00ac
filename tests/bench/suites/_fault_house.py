"""What the fault suite breaks: edges, clouds, store and broker, each a real process."""

from __future__ import annotations

import asyncio
import os
import re
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from segue.local.parts import Part, Program, Server, module_command
from segue.testing import LocalStack
from segue_contract.servers import Broker, Valkey
from segue_contract.servers.process import LOOPBACK, free_port
from segue_contract.telemetry import TURNS_RUNNING

START_S = 180.0  # beside other work, and at the lowest priority
METRICS_S = 2.0  # for a cloud's metrics to answer
_RUNNING = re.compile(rf"^{TURNS_RUNNING} (\S+)$", re.MULTILINE)


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
    clouds: tuple[Program, ...]
    servers: dict[str, Server]
    metrics: dict[str, int] = field(default_factory=dict)  # a cloud's name: its metrics port

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

    async def turns(self, cloud: Program) -> int:
        """How many turns a cloud owns now, by its own metrics; 0 where these do not answer."""
        try:
            async with asyncio.timeout(METRICS_S):
                reader, writer = await asyncio.open_connection(LOOPBACK, self.metrics[cloud.name])
                try:
                    writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
                    text = (await reader.read()).decode()
                finally:
                    writer.close()
        except (OSError, TimeoutError):
            return 0
        found = _RUNNING.search(text)
        assert found is not None, "a cloud's metrics without its turns"
        return round(float(found[1]))

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
async def house(model: str = "", edges: int = 2, clouds: int = 2) -> AsyncIterator[House]:
    """All edges know all clouds; what the store acknowledged is on its
    disk: what is lost then, Segue lost."""
    async with AsyncExitStack() as cleanup:
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="segue-faults-")))
        servers = {
            "store": Server(
                "store",
                Valkey.start(directory=folder / "store", options=("--appendfsync", "always")),
            ),
            "broker": Server("broker", Broker.start()),
        }
        for server in servers.values():
            await server.start()
            cleanup.push_async_callback(server.stop)
        urls = {
            "SEGUE_REDIS_URL": servers["store"].url,
            "SEGUE_MQTT_URL": servers["broker"].url,
        }
        names = ["cloud", *(f"cloud-{number}" for number in range(2, clouds + 1))]
        ports = _free_ports(2 * clouds)
        metrics = dict(zip(names, ports[clouds:], strict=True))
        others = []
        for name, port in zip(names[1:], ports, strict=False):
            command = module_command("segue", "cloud", "--port", str(port))
            command += ["--metrics-port", str(metrics[name])]
            command += ["--model", model] if model else []
            env = {**os.environ, **urls, "PYTHONUNBUFFERED": "1"}
            log = folder / f"{name}.log"
            others.append(Program(name, command, log=log, env=env, timeout_s=START_S))
        starting = [asyncio.create_task(other.start()) for other in others]
        for other in others:
            cleanup.push_async_callback(other.stop)
        known = [("--cloud", f"{LOOPBACK}:{port}") for port in ports[: len(others)]]
        stack = LocalStack(
            model=model,
            edges=edges,
            edge_args=[word for pair in known for word in pair],
            cloud_args=("--metrics-port", str(metrics["cloud"])),
            start_timeout_s=START_S,
            redis_url=urls["SEGUE_REDIS_URL"],
            mqtt_url=urls["SEGUE_MQTT_URL"],
        )
        try:
            await cleanup.enter_async_context(stack)
        finally:
            await asyncio.gather(*starting)
        yield House(stack, (stack.cloud, *others), servers, metrics)


def _free_ports(count: int) -> list[int]:
    taken: list[int] = []
    while len(taken) < count:
        taken.append(free_port(frozenset(taken)))
    return taken
