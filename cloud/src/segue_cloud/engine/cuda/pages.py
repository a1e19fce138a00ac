"""KV pages on a device, with one page more than the pool hands out, and pinned ways in and out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from segue_cloud.engine.cuda.transfers import Staging, Ticket, Transfers
from segue_cloud.engine.kv_pages import KvPages
from segue_contract.kv.layout import BLOCK_TOKENS, KvBlock, KvGeometry
from segue_contract.limits import KV_PAGE_TOKENS, STAGED_BLOCKS


@dataclass
class Pending:
    """A block on its way to the host. Its buffer goes back with `DevicePages.give_back`."""

    buffer: torch.Tensor
    ticket: Ticket

    def arrays(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Keys and values, float32 `[layers, kv_heads, 64, head_dim]`; waits for the copy."""
        self.ticket.wait()
        k, v = (self.buffer[:, part].float().numpy() for part in (0, 1))
        return k, v


class DevicePages(KvPages):
    """`KvPages` that a device computes on. Page `scratch_page` belongs to no turn, ever."""

    def __init__(
        self,
        geometry: KvGeometry,
        pages: int,
        dtype: torch.dtype,
        device: str,
        transfers: Transfers,
    ) -> None:
        super().__init__(geometry, pages + 1, dtype, device)
        self._all.zero_()  # whatever is read before it is written, is finite
        self.scratch_page = pages
        self._transfers = transfers
        shape = (geometry.layers, 2, geometry.kv_heads, BLOCK_TOKENS, geometry.head_dim)
        self._incoming = Staging(transfers, STAGED_BLOCKS, shape, dtype)
        self._outgoing = Staging(transfers, STAGED_BLOCKS, shape, dtype)

    def write_block(self, pages: Sequence[int], block: KvBlock) -> None:
        buffer = self._incoming.take()
        assert buffer is not None, "incoming buffers are given back with their copy"
        for part, values in ((0, block.k), (1, block.v)):
            buffer[:, part].copy_(as_tensor(values))

        def write(moved: torch.Tensor) -> None:
            for index, page in enumerate(pages):
                first = index * KV_PAGE_TOKENS
                self._page(page).copy_(moved[:, :, :, first : first + KV_PAGE_TOKENS])

        self._incoming.give_back(buffer, self._transfers.send(buffer, write))

    def read_block(self, pages: Sequence[int]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        pending = self.start_read(pages)
        if pending is None:  # all buffers are being read: this once by a slower way
            k, v = (self._gather(pages)[:, part].float().cpu().numpy() for part in (0, 1))
            return k, v
        arrays = pending.arrays()
        copies = arrays if self._all.dtype != torch.float32 else tuple(a.copy() for a in arrays)
        self.give_back(pending)
        return copies[0], copies[1]

    def start_read(self, pages: Sequence[int]) -> Pending | None:
        """Begin to copy four pages to the host; None while all `STAGED_BLOCKS` buffers are taken.

        The pages may be given to somebody else at once: later writes come after the copy.
        """
        buffer = self._outgoing.take()
        if buffer is None:
            return None
        return Pending(buffer, self._transfers.fetch(lambda: self._gather(pages), buffer))

    def give_back(self, pending: Pending) -> None:
        self._outgoing.give_back(pending.buffer)

    def _page(self, page: int) -> torch.Tensor:
        return self._all[:, :, :, page * KV_PAGE_TOKENS : (page + 1) * KV_PAGE_TOKENS]

    def _gather(self, pages: Sequence[int]) -> torch.Tensor:
        return torch.cat([self._page(page) for page in pages], dim=3)


def as_tensor(values: NDArray[Any]) -> torch.Tensor:
    """float16 and float32 as they are; uint16 holds the bits of bfloat16."""
    tensor = torch.from_numpy(np.require(values, requirements=["C", "W"]))
    return tensor.view(torch.bfloat16) if values.dtype == np.uint16 else tensor
