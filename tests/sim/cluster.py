"""The programs of one run: clouds and devices as processes that can be killed and started again."""

from __future__ import annotations

import asyncio
import functools
import importlib
from contextlib import AsyncExitStack
from typing import Any

import segue
from tests.sim import broker, store
from tests.sim.process import Process
from tests.sim.world import World


@functools.cache
def _settings(instance: str, port: int) -> Any:
    """To make them takes as long as hundreds of steps."""
    app: Any = importlib.import_module("segue_cloud.app")
    return app.CloudSettings(
        _env_file=None, port=port, redis_url=store.URL, mqtt_url=broker.URL,
        instance=instance, max_turns=8,
    )  # fmt: skip


class CloudProgram:
    """`segue cloud` by its own composition root. Attributes: `cloud`, once it serves."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.name = f"cloud-{number}"
        self.port = 7000 + number
        self.address = f"127.0.0.1:{self.port}"
        self.cloud: Any = None
        self.process: Process
        self._task: asyncio.Task[Any]
        self._stop: asyncio.Event
        self.start()

    def start(self) -> None:
        self.process = self.world.process(self.name)
        self._stop = asyncio.Event()
        self._task = self.process.start(self._serve(), self.name)

    async def _serve(self) -> None:
        app: Any = importlib.import_module("segue_cloud.app")
        settings = _settings(self.name, self.port)
        while not self._stop.is_set():
            # As a supervisor does: a program that could not start is started again.
            async with AsyncExitStack() as stack:
                try:
                    self.cloud = await app.run_cloud(settings, stack)
                except segue.SegueError as error:
                    self.world.say("not started", str(error))
                    await asyncio.sleep(0.5)
                    continue
                self.world.say("serves")
                await self._stop.wait()
                self.world.say("stops")
        self.cloud = None

    def kill(self) -> None:
        self.process.kill()
        self.cloud = None

    def terminate(self) -> None:
        """As SIGTERM: its connections end once it is done."""
        process, outside = self.process, self.world.network._outside.copy()
        self._stop.set()
        self._task.add_done_callback(lambda _: process.kill(), context=outside)

    @property
    def serving(self) -> bool:
        return self.cloud is not None and self.process.alive
