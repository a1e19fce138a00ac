"""All of Segue as processes of this machine: started together, watched, stopped in order."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from segue.local.parts import Part, Program, Server, module_command
from segue_contract.errors import InvalidArgument, StartFailed
from segue_contract.limits import START_TIMEOUT_S
from segue_contract.servers import Broker, Valkey
from segue_contract.servers.ports import check_free, free_port
from segue_contract.transport.together import Together, end

T = TypeVar("T")

MAX_EDGES = 8  # each loads the model once more


class LocalStack:
    """Valkey, an MQTT broker, the cloud and edge nodes on free ports of loopback.

        async with LocalStack() as stack:
            async with segue.Client(stack.edge_address, device="phone") as client: ...

    `processes` holds every part by name ("store", "broker", "cloud", "edge-1", ...); each has
    `kill()` (SIGKILL) and `restart()` (the same port), for fault tests.

    Args:
        model: name or directory of a built model; empty: the default one.
        edges: how many edge nodes, 1 to 8.
        dtype: of the cloud's engine: auto, bf16 or fp32.
        cloud_args, edge_args: further arguments of `segue cloud` and `segue edge`.
        edge_port, cloud_port: 0 picks a free one; further edges get free ports.
        redis_url, mqtt_url: use these servers instead of starting our own.
        data: keep the sessions in this folder over restarts; None: forget them.
        on_started: told each part and the seconds it took, as it becomes ready.
        on_news: told a part, and what it does while it takes long to be ready.
        folder: where logs go; None: a temporary folder, removed after a clean run.

    Raises (on entering):
        StartFailed: a program ended or was not ready in time; its last lines are in the hint.
        PortInUse: a port that was asked for is taken.
        MissingExtra: the packages of the local servers are not installed.
    """

    def __init__(
        self,
        *,
        model: str = "",
        edges: int = 1,
        dtype: str = "auto",
        cloud_args: Sequence[str] = (),
        edge_args: Sequence[str] = (),
        edge_port: int = 0,
        cloud_port: int = 0,
        redis_url: str = "",
        mqtt_url: str = "",
        data: Path | None = None,
        folder: Path | None = None,
        start_timeout_s: float = START_TIMEOUT_S,
        on_started: Callable[[Part, float], None] | None = None,
        on_news: Callable[[Part, str], None] | None = None,
    ) -> None:
        if not 1 <= edges <= MAX_EDGES:
            raise InvalidArgument(f"{edges} edge nodes; 1 to {MAX_EDGES} are possible.")
        self.redis_url = redis_url
        self.mqtt_url = mqtt_url
        self.broker_kind = "external" if mqtt_url else ""
        self.edges: list[Program] = []
        self.processes: dict[str, Part] = {}
        self._model = model
        self._edge_count = edges
        self._dtype = dtype
        self._cloud_args = tuple(cloud_args)
        self._edge_args = tuple(edge_args)
        self._edge_port = edge_port
        self._cloud_port = cloud_port
        self._data = data
        self._folder = folder
        self._own_folder = folder is None
        self._start_timeout_s = start_timeout_s
        self._on_started = on_started
        self._on_news = on_news
        self._used_ports: set[int] = set()
        self._crashes: list[Part] = []
        self._crash_told = asyncio.Event()

    @property
    def folder(self) -> Path:
        """Where the logs of this run are."""
        assert self._folder is not None, "the stack has not been started"
        return self._folder

    @property
    def keeps_data(self) -> bool:
        """Whether sessions outlive the store's process."""
        return self._data is not None

    @property
    def cloud(self) -> Program:
        cloud = self.processes["cloud"]
        assert isinstance(cloud, Program)
        return cloud

    @property
    def cloud_address(self) -> str:
        """host:port of the cloud."""
        return f"127.0.0.1:{self._cloud_port}"

    @property
    def edge_address(self) -> str:
        """host:port of the first edge node."""
        return self.edges[0].address

    async def __aenter__(self) -> Self:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="segue-"))
        try:
            await self._start()
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stop()
        if self._own_folder and error is None and not self.crashed:
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def crashed(self) -> Part | None:
        """The first part that ended without having been asked to and is still down, or None."""
        return self._crashes[0] if self._crashes else None

    async def wait_crash(self) -> Part:
        """Wait until a part is down that ended by itself; returns it.

        `kill` and `stop` do not count.
        """
        await self._crash_told.wait()
        return self._crashes[0]

    async def revive(self, part: Part) -> None:
        """Start a part again that ended by itself, at its address.

        Raises:
            StartFailed: as at the first start.
        """
        await part.stop()  # its end is known; a server's folder goes
        await self._start_part(part)
        self._crashes.remove(part)
        if not self._crashes:
            self._crash_told.clear()

    def crash_error(self, part: Part) -> StartFailed:
        """What to tell of a part that ended by itself."""
        said = "\n".join(f"  {line}" for line in part.tail())
        words = f"It said last:\n{said}" if said else "It said nothing."
        return StartFailed(
            f"{part.name} ended by itself: {part.ended_how}. Everything else was stopped.",
            hint=f"{words}\nThe logs are in {self.folder}.",
            program=part.name,
        )

    async def guard(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work`; where a part of the stack ends by itself, cancel it.

        Raises:
            StartFailed: which part ended, and its last lines.
        """
        working = asyncio.ensure_future(work)
        crashing = asyncio.ensure_future(self.wait_crash())
        try:
            await asyncio.wait({working, crashing}, return_when=asyncio.FIRST_COMPLETED)
            if crashing.done():
                raise self.crash_error(crashing.result())
            return working.result()
        finally:
            await end(working, crashing)

    async def add_edge(self, *args: str) -> Program:
        """Start one more edge node, with further arguments; it stops with the stack."""
        if len(self.edges) >= MAX_EDGES:
            raise InvalidArgument(f"{MAX_EDGES} edge nodes run already; that is the most.")
        edge = self._new_edge(self._port(0, ""), args)
        await self._start_part(edge)
        return edge

    async def _start(self) -> None:
        edge_ports = [self._port(self._edge_port, "--edge-port")]
        edge_ports += [self._port(0, "") for _ in range(self._edge_count - 1)]
        self._cloud_port = self._port(self._cloud_port, "--cloud-port")
        await self._start_servers()
        cloud = Program(
            "cloud",
            self._cloud_command(),
            log=self.folder / "cloud.log",
            env=self._cloud_environment(),
            timeout_s=self._start_timeout_s,
            on_crash=self._on_crash,
            on_news=self._on_news,
        )
        self.processes[cloud.name] = cloud
        for port in edge_ports:
            self._new_edge(port, ())
        # All at once: an edge waits for its cloud by itself.
        await together(self._start_part(program) for program in (cloud, *self.edges))

    async def _start_servers(self) -> None:
        servers = []
        if not self.redis_url:
            valkey = Valkey.start(port=self._port(0, ""), directory=self._data)
            store = Server("store", valkey, self._on_crash)
            servers.append(store)
        if not self.mqtt_url:
            broker = Server("broker", Broker.start(port=self._port(0, "")), self._on_crash)
            servers.append(broker)
        self.processes.update({server.name: server for server in servers})
        await together(self._start_part(server) for server in servers)
        if not self.redis_url:
            self.redis_url = store.url
        if not self.mqtt_url:
            self.mqtt_url, self.broker_kind = broker.url, broker.kind

    def _cloud_command(self) -> list[str]:
        command = module_command("segue", "cloud", "--port", str(self._cloud_port))
        command += ["--dtype", self._dtype]
        return [*command, *self._model_args(), *self._cloud_args]

    def _cloud_environment(self) -> dict[str, str]:
        """With the servers' addresses: they may hold passwords, and everybody sees arguments."""
        urls = {"SEGUE_REDIS_URL": self.redis_url, "SEGUE_MQTT_URL": self.mqtt_url}
        return {**_environment(), **urls}

    def _new_edge(self, port: int, args: Sequence[str]) -> Program:
        name = f"edge-{len(self.edges) + 1}"
        command = module_command("segue", "edge", "--port", str(port))
        command += ["--cloud", self.cloud_address, *self._model_args()]
        command += ["--outbox", str(self.folder / f"{name}.outbox"), *self._edge_args, *args]
        edge = Program(
            name,
            command,
            log=self.folder / f"{name}.log",
            env=_environment(),
            timeout_s=self._start_timeout_s,
            on_crash=self._on_crash,
            on_news=self._on_news,
        )
        self.edges.append(edge)
        self.processes[name] = edge
        return edge

    def _model_args(self) -> list[str]:
        return ["--model", self._model] if self._model else []

    def _port(self, asked: int, flag: str) -> int:
        if asked:
            check_free(asked, flag)
        port = asked or free_port(frozenset(self._used_ports))
        self._used_ports.add(port)
        return port

    async def _start_part(self, part: Part) -> None:
        began = time.monotonic()
        await part.start()
        if self._on_started is not None:
            self._on_started(part, time.monotonic() - began)

    def _on_crash(self, part: Part) -> None:
        self._crashes.append(part)
        self._crash_told.set()

    async def _stop(self) -> None:
        """Reverse order: edges, cloud, then what they stand on. Further cancels do not stop it."""
        stopping = asyncio.ensure_future(self._stop_in_order())
        cancelled = False
        while not stopping.done():
            try:
                await asyncio.shield(stopping)
            except asyncio.CancelledError:
                cancelled = True
        if cancelled:
            raise asyncio.CancelledError
        stopping.result()

    async def _stop_in_order(self) -> None:
        parts = list(self.processes.values())
        servers = [part for part in parts if isinstance(part, Server)]
        await together(edge.stop() for edge in self.edges)
        for child in parts:
            if isinstance(child, Program):
                await child.stop()
        await together(server.stop() for server in servers)


def _environment() -> dict[str, str]:
    """Ours, without settings that would override the stack's own, logs unbuffered."""
    ours = (
        "SEGUE_REDIS_URL",
        "SEGUE_MQTT_URL",
        "SEGUE_PUBLIC_MQTT_URL",
        "SEGUE_CLOUD_",
        "SEGUE_EDGE_",
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {**kept, "PYTHONUNBUFFERED": "1"}


async def together(jobs: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run all jobs at once; the first error ends the others and is raised."""
    async with Together() as tasks:
        for job in jobs:
            tasks.start(job)
