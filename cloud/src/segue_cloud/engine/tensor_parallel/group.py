"""The ranks' numbers on their way: sums of partial products, and logits to the first rank.

gloo over loopback between CPU processes, NCCL between CUDA devices. A group of our own rather than
torch's global one, so that a process may hold several engines, one after another or side by side.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from segue_contract.errors import InvalidArgument, RankLost
from segue_contract.limits import RANK_STEP_TIMEOUT_S, START_TIMEOUT_S

_LOOPBACK = "127.0.0.1"
_STORE = "rendezvous"
_SUM, _LOGITS = 0, 1  # tags


class Group:
    """What one rank knows of the others. Used by one thread; `connect` comes first.

    Every wait has a deadline. Over gloo a rank that is gone or late raises RankLost; over NCCL the
    engine learns of it from the process that ended, or its own process ends.
    """

    def __init__(
        self, rank: int, ranks: int, device: str, timeout_s: float = RANK_STEP_TIMEOUT_S
    ) -> None:
        self.rank = rank
        self.ranks = ranks
        self._nccl = device != "cpu"
        self._peers = [peer for peer in range(ranks) if peer != rank]
        self._timeout = timedelta(seconds=timeout_s)
        self._backend: Any = None

    def connect(self, folder: Path, timeout_s: float = START_TIMEOUT_S) -> None:
        """Meet the others through a file in `folder`, which only this user may enter.

        Raises:
            RankLost: not all came in time.
        """
        timeout = timedelta(seconds=timeout_s)
        try:
            store: Any = dist.FileStore(str(folder / _STORE), self.ranks)  # type: ignore[attr-defined]
            store.set_timeout(timeout)
            make = _nccl if self._nccl else _gloo
            self._backend = make(store, self.rank, self.ranks, timeout)
        except RuntimeError as error:
            raise RankLost(f"The ranks did not find each other: {_first_line(error)}.") from error

    def close(self) -> None:
        """Leave the others; safe to call twice, and before `connect`."""
        self._backend = None

    def sum(self, partial: torch.Tensor) -> torch.Tensor:
        """The float32 sum of all ranks' `partial` `[tokens, width]`, back in its dtype.

        Every rank gets the same bits. Over gloo the order is that of the ranks, whatever the
        shape: each sends its part to each other, which for a few ranks also has fewer rounds
        than a ring. Over NCCL the order is NCCL's.
        """
        if self._nccl:
            total = partial.float()
            self._wait([self._backend.allreduce([total])])
            return total.to(partial.dtype)
        parts = [
            partial if rank == self.rank else torch.empty_like(partial)
            for rank in range(self.ranks)
        ]
        works = [self._backend.recv([parts[peer]], peer, _SUM) for peer in self._peers]
        works += [self._backend.send([partial], peer, _SUM) for peer in self._peers]
        self._wait(works)
        total = parts[0].float()
        for part in parts[1:]:
            total += part
        return total.to(partial.dtype)

    def send_logits(self, logits: torch.Tensor) -> None:
        """This rank's columns, float32 `[rows, its vocabulary]`, to the first rank."""
        self._wait([self._backend.send([logits.contiguous()], 0, _LOGITS)])

    def collect_logits(self, own: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        """On the first rank: all columns, float32 `[rows, vocabulary]`; `widths` by rank."""
        parts = [own, *(own.new_empty(own.shape[0], width) for width in widths[1:])]
        self._wait([self._backend.recv([parts[peer]], peer, _LOGITS) for peer in self._peers])
        return torch.cat(parts, dim=1)

    def _wait(self, works: Sequence[Any]) -> None:
        try:
            for work in works:
                if self._nccl:
                    work.wait()  # with a time it would wait for the device, layer by layer
                else:
                    work.wait(self._timeout)
        except RuntimeError as error:
            raise RankLost(
                f"Rank {self.rank} lost another rank: {_first_line(error)}.",
                hint="It ended, or did not answer in time; its log says why.",
            ) from error


def check_devices(device: str, ranks: int) -> None:
    """Raises InvalidArgument where this machine or this torch cannot run so many ranks."""
    if device == "cpu":
        return
    found = torch.cuda.device_count()
    if found < ranks:
        raise InvalidArgument(
            f"{ranks} ranks need {ranks} CUDA devices; this process sees {found}.",
            hint=f"Choose --tensor-parallel from 1 to {max(1, found)}.",
        )
    if not dist.is_nccl_available():
        raise InvalidArgument("This build of torch has no NCCL, which CUDA ranks need.")


def _gloo(store: Any, rank: int, ranks: int, timeout: timedelta) -> Any:
    kind: Any = dist.ProcessGroupGloo
    options = kind._Options()
    # Named, for gloo's own choice is the address of the host's name.
    options._devices = [kind.create_device(hostname=_LOOPBACK)]
    options._timeout = timeout
    options._threads = 1
    return kind(store, rank, ranks, options)


def _nccl(store: Any, rank: int, ranks: int, timeout: timedelta) -> Any:
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")  # all ranks are on this machine
    kind: Any = dist.ProcessGroupNCCL
    options = kind.Options()
    # Its waits happen on the device; its watchdog ends the process when one takes longer.
    options._timeout = timeout
    return kind(store, rank, ranks, options)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].rstrip(".")
