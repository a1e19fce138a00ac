"""What a rank above the first does with each message of the first one."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

import torch

from segue_cloud.engine.attention import Window
from segue_cloud.engine.options import choose_dtype, rank_threads
from segue_cloud.engine.tensor_parallel.group import Group
from segue_cloud.engine.tensor_parallel.messages import (
    Array,
    BlockRead,
    ComputeStep,
    Control,
    Failed,
    Loaded,
    ReadBlock,
    SetUp,
    WarmUp,
    WriteBlock,
)
from segue_cloud.engine.tensor_parallel.shard_runner import rank_device, shard_runner
from segue_cloud.engine.tensor_parallel.split import split
from segue_cloud.engine.tensor_parallel.steps import unpack_step
from segue_contract.errors import Internal, RankLost, SegueError
from segue_contract.kv.layout import KvBlock
from segue_contract.limits import RANK_LOAD_TIMEOUT_S


def serve(connection: socket.socket, rank: int, folder: Path) -> None:
    """Serve until the first rank closes its end.

    Raises:
        SegueError: this rank cannot go on; the first one has been told.
    """
    control = Control(0, connection)
    try:
        worker = _Worker(control, rank, folder)
        while worker.serve_one():
            pass
    except Exception as error:
        known = error if isinstance(error, SegueError) else Internal(f"Rank {rank}: {error!r}.")
        with contextlib.suppress(RankLost):
            control.send(Failed(known.to_bytes()))
        raise


class _Worker:
    def __init__(self, control: Control, rank: int, folder: Path) -> None:
        self._control = control
        self._folder = folder
        message = control.receive(RANK_LOAD_TIMEOUT_S)
        if not isinstance(message, SetUp):
            raise RankLost(f"The first rank said {message!r} instead of how to start.")
        options = message.options
        shards = split(message.geometry, options.tensor_parallel)
        self._group = Group(rank, len(shards), options.device)
        threads = rank_threads(options, rank)
        torch.set_num_threads(threads)
        self._runner = shard_runner(
            Path(message.directory),
            message.geometry,
            message.pages,
            options,
            shards[rank],
            self._group,
        )
        self._window = Window(options.window, options.sinks)
        self._dtype = choose_dtype(options.dtype, options.device)
        self._device = rank_device(options.device, rank)
        self._runner.load_kernels(threads)
        control.send(Loaded())
        self._group.connect(folder)

    def serve_one(self) -> bool:
        """Wait for a message and do it; False where the first rank has gone."""
        try:
            message = self._control.receive(None)
        except RankLost:
            return False
        match message:
            case ComputeStep():
                step = unpack_step(message, self._window, self._dtype, self._device)
                logits = self._runner.compute(step)
                if len(logits):
                    self._group.send_logits(logits)
            case WriteBlock(pages, k, v):
                self._runner.write_block(pages, KvBlock(b"", "", k.numpy(), v.numpy()))
            case ReadBlock(pages):
                k_read, v_read = self._runner.pages.read_block(pages)
                self._control.send(BlockRead(Array.of(k_read), Array.of(v_read)))
            case WarmUp():
                self._runner.touch()
            case _:
                raise RankLost(f"The first rank said {message!r}, which no rank is told.")
        return True
