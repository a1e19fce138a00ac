"""A token bucket in front of the link: benchmarks measure a 1 Gbps link on loopback with it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

_BURST_S = 0.002  # what a network card's queue holds


class TokenBucket:
    """Pure: `reserve(bytes, now)` says how long to wait before they may leave."""

    def __init__(self, bytes_per_s: float) -> None:
        if not bytes_per_s > 0:
            raise ValueError(f"a link carries more than {bytes_per_s} bytes a second")
        self._rate = bytes_per_s
        self._free_at = 0.0

    def reserve(self, size: int, now: float) -> float:
        """Seconds until `size` bytes have left, counted from `now`."""
        start = max(self._free_at, now - _BURST_S)
        self._free_at = start + size / self._rate
        return max(0.0, self._free_at - now)


class Pacer:
    """Shared by everything that one node sends up; without a rate it never waits."""

    def __init__(
        self, bytes_per_s: float | None = None, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._bucket = TokenBucket(bytes_per_s) if bytes_per_s else None
        self._now = now

    async def pass_through(self, size: int) -> None:
        """Return when `size` bytes would have left this link."""
        if self._bucket is None:
            return
        wait_s = self._bucket.reserve(size, self._now())
        if wait_s > 0:
            await asyncio.sleep(wait_s)
