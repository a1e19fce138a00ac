"""Idle time: prefill what the next message of a session will begin with."""

from __future__ import annotations

import asyncio
from collections import OrderedDict

import structlog

from segue_contract.errors import SegueError
from segue_contract.ids import SessionName
from segue_contract.kv.layout import BLOCK_TOKENS, block_ids
from segue_contract.limits import WARM_QUEUE_TURNS
from segue_contract.transport.together import end
from segue_edge.compute import ComputeThread, Priority
from segue_edge.prefill.chunks import SMALL_CHUNK
from segue_edge.turns.compute.model_port import EdgeModelPort, PrefixCachePort, PrefixCaches
from segue_edge.turns.compute.prefill_job import PrefillJob

log = structlog.get_logger("segue.warm")


class Warmer:
    """Prefills finished conversations while no turn runs; newest first, one per session.

    `busy` and `idle` are told by the turn registry. A warm-up under way loses the compute thread
    to an arriving turn after its current chunk (`Priority.WARM`).
    """

    def __init__(
        self, model: EdgeModelPort, cache: PrefixCaches, compute: ComputeThread, recipe: str
    ) -> None:
        self._model = model
        self._cache = cache
        self._compute = compute
        self._recipe = recipe
        self._waiting: OrderedDict[SessionName, list[int]] = OrderedDict()
        self._idle = asyncio.Event()
        self._idle.set()
        self._more = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.warmed_tokens = 0
        self.finished = asyncio.Event()  # nothing waits and nothing runs
        self.finished.set()

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="warm-up")

    def busy(self) -> None:
        self._idle.clear()

    def idle(self) -> None:
        self._idle.set()

    def add(self, session: SessionName, tokens: list[int]) -> None:
        """The session's conversation so far, as token ids; replaces an older one of it."""
        if len(tokens) < BLOCK_TOKENS:
            return
        self._waiting.pop(session, None)
        self._waiting[session] = tokens
        while len(self._waiting) > WARM_QUEUE_TURNS:
            self._waiting.popitem(last=False)
        self.finished.clear()
        self._more.set()

    async def close(self) -> None:
        if self._task is not None:
            await end(self._task)

    async def _run(self) -> None:
        while True:
            await self._more.wait()
            await self._idle.wait()
            if not self._waiting:
                self._more.clear()
                self.finished.set()
                continue
            session, tokens = self._waiting.popitem(last=True)
            try:
                await self._warm(self._cache.of(session.tenant), tokens)
            except SegueError as error:
                log.warning("warm_up_failed", session=session.session, error=str(error))

    async def _warm(self, cache: PrefixCachePort, tokens: list[int]) -> None:
        whole = tokens[: len(tokens) // BLOCK_TOKENS * BLOCK_TOKENS]
        ids = block_ids(self._recipe, whole)
        known = cache.lookup(ids)
        if known == len(ids):
            return
        job = PrefillJob(self._model, cache, whole, ids, chunk=SMALL_CHUNK)
        try:
            await self._compute.submit(job, Priority.WARM)
        finally:
            if not job.done.done():
                job.cancel()
        self.warmed_tokens += (len(ids) - known) * BLOCK_TOKENS
