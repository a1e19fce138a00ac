"""Some of the blocks that edges ship are computed again, while the engine has little to do."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import structlog

from segue_cloud.engine.port import Engine, EngineTurn
from segue_cloud.tenants.trust import EdgeTrust
from segue_contract.errors import SegueError
from segue_contract.kv.compare import relative_error
from segue_contract.kv.layout import BLOCK_TOKENS, KvBlock
from segue_contract.limits import (
    KV_CHECK_LOOK_S,
    KV_CHECK_PATIENCE_S,
    KV_CHECK_QUEUE_BYTES,
    KV_MAX_ERROR,
)
from segue_contract.transport.together import end

log = structlog.get_logger("segue.trust")


@dataclass(frozen=True)
class Shipped:
    """A block that an edge shipped for a turn of the tenant; `tokens`: up to its end."""

    edge: str
    tenant: str
    tokens: tuple[int, ...]
    block: KvBlock

    @property
    def nbytes(self) -> int:
        return int(self.block.k.nbytes + self.block.v.nbytes)


class SpotChecks:
    """`async with SpotChecks(...) as checks:`; `offer` gives it blocks to check.

    The exact KV comes from the engine, as of any turn of that tenant: the prompt up to the block's
    end is computed (what the tenant's computed domain has of it is not computed again) and stays in
    that domain. An idle engine does it at once; a busy one within `KV_CHECK_PATIENCE_S`.
    """

    def __init__(self, engine: Engine, trust: EdgeTrust, weight: Callable[[str], float]) -> None:
        """`weight`: of a tenant, as its turns have it; the engine goes by the last that it saw."""
        self._engine = engine
        self._weight = weight
        self._trust = trust
        self._waiting: deque[Shipped] = deque()
        self._bytes = 0
        self._more = asyncio.Event()
        self._number = 0
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> SpotChecks:
        self._task = asyncio.create_task(self._run(), name="spot checks")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._task is not None:
            await end(self._task)

    def offer(self, shipped: Shipped) -> None:
        """Check it if it is picked; where too much waits already it is not."""
        if not self._trust.picks(shipped.edge):
            return
        if self._bytes + shipped.nbytes <= KV_CHECK_QUEUE_BYTES:
            self._waiting.append(shipped)
            self._bytes += shipped.nbytes
            self._more.set()

    async def _run(self) -> None:
        while True:
            await self._more.wait()
            if not self._waiting:
                self._more.clear()
                continue
            shipped = self._waiting.popleft()
            self._bytes -= shipped.nbytes
            try:
                await self._idle()
                await self.check(shipped)
            except SegueError as error:  # the engine is full or gone: no verdict
                log.info("kv_not_checked", edge=shipped.edge, error=str(error))
            except Exception as error:
                log.error("kv_not_checked", edge=shipped.edge, exc_info=error)

    async def _idle(self) -> None:
        for _ in range(int(KV_CHECK_PATIENCE_S / KV_CHECK_LOOK_S)):
            stats = self._engine.stats()
            if not stats.running and not stats.waiting:
                return
            await asyncio.sleep(KV_CHECK_LOOK_S)

    async def check(self, shipped: Shipped) -> float | None:
        """Compute the block and compare; its error, None where it could not be computed.

        Raises:
            SegueError: of the engine.
        """
        self._number += 1
        turn = EngineTurn(
            turn=f"check-{self._number}",
            prompt=(*shipped.tokens, shipped.tokens[-1]),
            max_tokens=1,
            tenant=shipped.tenant,
            weight=self._weight(shipped.tenant),
            domains=self._trust.domains(shipped.tenant)[:1],
        )
        async for _ in self._engine.submit(turn):
            pass
        exact = await self._engine.computed_block(turn)
        if exact is None:
            return None
        error = await asyncio.to_thread(relative_error, shipped.block, exact)
        right = error <= KV_MAX_ERROR
        self._trust.found(shipped.edge, right=right)
        facts = {"edge": shipped.edge, "tenant": shipped.tenant, "error": round(error, 4)}
        if right:
            log.info("kv_checked", **facts)
        else:
            log.error("kv_wrong", **facts, block=len(shipped.tokens) // BLOCK_TOKENS - 1,
                      hint="All that this edge shipped is dropped, and it ships nothing for a "
                      "while. Look at its machine and its model.")  # fmt: skip
        return error
