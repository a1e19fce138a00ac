"""`segue edge` by its own composition root, around a model whose every token is known."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

import segue
from segue_edge.compute.fair import Idle, Priority
from segue_edge.compute.thread import ComputeThread, Job
from tests.sim.process import Process
from tests.sim.world import World
from tests.support.tiny_edge import ASSISTANT, VOCAB, TinyModel, next_token, tiny_tokenizer

_STEP_S = (0.005, 0.06)


class SimCompute(ComputeThread):
    """The edge's queue of jobs, its steps taken by a task instead of a thread."""

    def __init__(self, rng: Random) -> None:
        super().__init__()
        self._rng = rng
        self._kick = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.create_task(self._pump(), name="edge compute")

    def submit(self, job: Job[Any], priority: Priority) -> asyncio.Future[Any]:
        done = super().submit(job, priority)
        self._kick.set()
        return done

    @contextlib.contextmanager
    def decoding(self) -> Iterator[None]:
        with super().decoding():
            yield
        self._kick.set()

    async def close(self) -> None:
        await super().close()
        if self._task is not None:
            self._task.cancel()

    async def _pump(self) -> None:
        while True:
            now = self._now()
            self._kick.clear()
            due = self._queue.take(now, self._decoding)
            if isinstance(due, Idle):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(due.until):
                        await self._kick.wait()
                continue
            self._step_began = now
            await asyncio.sleep(self._rng.uniform(*_STEP_S))
            more = self._advance(due)
            now, began = self._now(), now
            self._step_began = None
            self._steps += 1
            if more:
                self._queue.put_back(now - began, now)
            else:
                self._queue.drop(now - began, now)


class EdgeModel(TinyModel):
    """`salt`: another one makes other replies than the clouds do, as a coarser model would."""

    def __init__(self, salt: int) -> None:
        super().__init__()
        self._salt = salt

    def decode_step(self, token: int, kv: Any) -> NDArray[np.float32]:
        kv.tokens.append(token)
        return self._logits(kv.tokens)

    def _logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        logits = np.zeros(VOCAB, np.float32)
        if ASSISTANT in tokens:
            logits[next_token(tokens, salt=self._salt)] = 9.0
        return logits


_TOKENIZER = tiny_tokenizer()
_FILES = itertools.count()
_FOLDER = tempfile.TemporaryDirectory(prefix="segue-sim-")


class EdgeProgram:
    """`plan`: the shape that it forces; "auto" leaves it to the planner."""

    def __init__(self, world: World, number: int, clouds: Sequence[str], plan: str) -> None:
        self.world = world
        self.name = f"edge-{number}"
        self.address = f"127.0.0.1:{7100 + number}"
        self.process: Process
        self._number = number
        self._clouds = ",".join(clouds)
        self._plan = plan
        self._salt = world.rng("edges").choice([0, 0, 5])
        self._outbox: Path | None = None
        self._stop: asyncio.Event
        self._task: asyncio.Task[Any]
        self.start()

    def start(self) -> None:
        self.process = self.world.process(self.name)
        self._stop = asyncio.Event()
        self._task = self.process.start(self._serve(), self.name)

    async def _serve(self) -> None:
        node: Any = importlib.import_module("segue_edge.node")
        # Each life goes on with a copy of what the last one left: an operating system frees the
        # lock of a dead process, which here is the same one.
        before = self._outbox
        self._outbox = outbox = Path(_FOLDER.name) / f"{os.getpid()}-{next(_FILES)}.outbox"
        if before is not None and before.exists():
            shutil.copy(before, outbox)
        config = node.EdgeConfig(
            port=7100 + self._number, cloud=self._clouds, plan=self._plan, outbox=outbox
        )
        model = EdgeModel(self._salt)
        while not self._stop.is_set():
            try:
                async with node.EdgeNode(config, load=lambda _: (model, _TOKENIZER)):
                    self.world.say("serves")
                    await self._stop.wait()
            except segue.SegueError as error:
                self.world.say("not started", str(error))
                await asyncio.sleep(0.5)

    def kill(self) -> None:
        self.process.kill()

    def terminate(self) -> None:
        """As SIGTERM: its connections end once it is done."""
        process, outside = self.process, self.world.network._outside.copy()
        self._stop.set()
        self._task.add_done_callback(lambda _: process.kill(), context=outside)
