"""The processes of the ranks above the first: started, watched and stopped with the engine."""

from __future__ import annotations

import asyncio
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import structlog

from segue_cloud.engine.tensor_parallel.group import Group
from segue_cloud.engine.tensor_parallel.messages import Control
from segue_cloud.engine.tensor_parallel.rank import CONNECTED
from segue_contract.errors import RankLost
from segue_contract.servers.process import ChildProcess

log = structlog.get_logger(__name__)

_MODULE = "segue_cloud.engine.tensor_parallel.rank"


class Ranks:
    """Ranks 1 to N-1. Made with `start`; `stop` ends every one of them.

    Attributes:
        controls: their sockets in order, for the engine thread.
        group: the first rank's place among them.
        folder: private to this user; socket and meeting place lie in it.
    """

    def __init__(self, folder: Path, group: Group) -> None:
        self.folder = folder
        self.group = group
        self.controls: list[Control] = []
        self._children: list[ChildProcess] = []
        self._watchers: list[asyncio.Task[None]] = []
        self._stopping = False

    @classmethod
    async def start(cls, ranks: int, device: str) -> Ranks:
        """Start the processes and wait until each has connected; they load in `LeadRunner`.

        From the thread of the event loop: the system ends them with that thread.

        Raises:
            Internal, DeadlineExceeded: see `ChildProcess.start`.
        """
        folder = Path(tempfile.mkdtemp(prefix="segue-ranks-"))
        made = cls(folder, Group(0, ranks, device))
        try:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(folder / "control"))
                listener.listen(ranks)
                listener.setblocking(False)
                for rank in range(1, ranks):
                    await made._start_one(rank, listener)
        except BaseException:
            await made.stop()
            raise
        return made

    async def _start_one(self, rank: int, listener: socket.socket) -> None:
        self._children.append(
            await ChildProcess.start(
                f"rank {rank}",
                [sys.executable, "-m", _MODULE, str(self.folder / "control"), str(rank)],
                ready=CONNECTED.__eq__,
            )
        )
        # It said that it has connected, and nobody else was asked to.
        self.controls.append(Control(rank, listener.accept()[0]))

    def watch(self, on_loss: Callable[[RankLost], None]) -> None:
        """Call `on_loss` when a rank ends that was not stopped. Once all have met."""
        shutil.rmtree(self.folder, ignore_errors=True)  # so that not even kill -9 leaves it
        self._watchers = [
            asyncio.create_task(self._watch_one(rank, child, on_loss), name=f"watch rank {rank}")
            for rank, child in enumerate(self._children, 1)
        ]

    async def _watch_one(
        self, rank: int, child: ChildProcess, on_loss: Callable[[RankLost], None]
    ) -> None:
        status = await child.wait()
        if self._stopping:
            return
        log.error("rank_ended", rank=rank, status=status, log=child.log_tail())
        on_loss(RankLost(f"Rank {rank} ended with status {status}.", hint=child.log_tail(3)))

    async def stop(self) -> None:
        """Close the sockets and end the processes; safe to call twice."""
        self._stopping = True
        for watcher in self._watchers:
            watcher.cancel()
        for control in self.controls:
            control.close()
        await asyncio.gather(*(child.stop() for child in self._children))
        self.group.close()
        shutil.rmtree(self.folder, ignore_errors=True)
