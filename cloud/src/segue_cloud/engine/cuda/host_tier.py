"""The second tier of an engine on a card: blocks leave it and are coded while it computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from segue_cloud.engine.cuda.pages import DevicePages, Pending
from segue_cloud.engine.host_tier import STEP, HostTier
from segue_contract.errors import BadBlock
from segue_contract.kv.layout import KvBlock
from segue_contract.kv.quantize import encode_block
from segue_contract.limits import EngineLimits


@dataclass(frozen=True)
class _Staged:
    pending: Pending
    credit: int
    payload: Future[bytes | None]


class PinnedTier(HostTier):
    """`HostTier` whose policy stays what it is, with the work of `keep` moved out of the way.

    `keep` starts a copy to pinned memory and returns; one thread codes what has arrived. What it
    has coded is filed by the engine thread, the next time that it comes by, so only that thread
    changes what the tier holds. While all staging buffers are taken, a block is dropped: computing
    it anew is exact, and waiting would hold up every turn.
    """

    def __init__(
        self,
        pages: DevicePages,
        budget_bytes: int,
        recompute_s: Callable[[], float],
        limits: EngineLimits = EngineLimits(),
    ) -> None:
        super().__init__(pages, budget_bytes, recompute_s, limits)
        self._device_pages = pages
        self._staged: dict[bytes, _Staged] = {}
        self._coder = ThreadPoolExecutor(1, "segue-tier")
        self.skipped_blocks = 0

    def keep(self, name: bytes, pages: Sequence[int], credit: int) -> None:
        self._file_coded()
        if name in self._staged:
            return
        if name in self._kept:
            super().keep(name, pages, credit)
            return
        pending = self._device_pages.start_read(pages)
        if pending is None:
            self.skipped_blocks += 1
            return
        self._staged[name] = _Staged(pending, credit, self._coder.submit(_encode, name, pending))

    def offers(self, name: bytes) -> bool:
        return name in self._staged or super().offers(name)

    def bring(self, name: bytes, pages: Sequence[int]) -> None:
        staged = self._staged.get(name)
        if staged is not None and name not in self._kept:
            # It has hardly left: what was copied goes back as it is, and nothing was lost.
            k, v = staged.pending.arrays()
            self._device_pages.write_block(pages, KvBlock(name, "", k, v))
            self.brought_blocks += 1
            return
        super().bring(name, pages)

    def settle(self) -> None:
        """File everything that is under way; waits for it."""
        for staged in self._staged.values():
            staged.payload.exception()
        self._file_coded()

    def close(self) -> None:
        """End the coding thread; what waits for it is dropped."""
        self._coder.shutdown(cancel_futures=True)

    def check_integrity(self) -> None:
        super().check_integrity()
        assert not self._staged.keys() & self._kept.keys(), "a block is filed once"

    def _file_coded(self) -> None:
        for name in [name for name, staged in self._staged.items() if staged.payload.done()]:
            staged = self._staged[name]
            payload = staged.payload.result()
            if payload is not None:
                self.file(name, payload, staged.credit)
            del self._staged[name]  # after it is filed: others ask `offers` at any time
            self._device_pages.give_back(staged.pending)


def _encode(name: bytes, pending: Pending) -> bytes | None:
    k, v = pending.arrays()
    try:
        return encode_block(KvBlock(name, "", k, v), STEP)
    except BadBlock:
        return None  # numbers that the code cannot hold: computing them anew is exact
