"""The torch engine, on the event loop's side: the engine port. `engine_thread` is the other side.

    event loop                           engine thread
    submit, cancel, offer ── commands ─► drain → schedule → run → postprocess ─┐
    streams  ◄──────────── one call_soon_threadsafe per step ──────────────────┘

Neither side waits for the other.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import structlog
import torch

from segue_cloud.engine.admission import check_block, check_turn
from segue_cloud.engine.block_pool import PAGE_TOKENS, PAGES_PER_BLOCK, BlockPool
from segue_cloud.engine.commands import Cancel, Close, Die, Look, Offer, Submit
from segue_cloud.engine.devices import build_runner, count_pages
from segue_cloud.engine.domains import OPEN, named
from segue_cloud.engine.engine_thread import Delivery, EngineThread
from segue_cloud.engine.host_tier import HostTier
from segue_cloud.engine.options import (
    EngineOptions,
    choose_dtype,
    choose_host_bytes,
    choose_threads,
    choose_window,
    dtype_name,
)
from segue_cloud.engine.placement import Reach, Recipes
from segue_cloud.engine.port import EngineStats, EngineTurn
from segue_cloud.engine.runner import StepRunner
from segue_cloud.engine.scheduler import Scheduler, SchedulerLimits
from segue_cloud.engine.streams import TurnStream
from segue_cloud.engine.stuck import LOOKS, StuckWatch
from segue_cloud.engine.tensor_parallel.group import check_devices
from segue_cloud.engine.tensor_parallel.ranks import Ranks
from segue_cloud.engine.tensor_parallel.start import start_ranks
from segue_cloud.engine.weights import check_size
from segue_contract.errors import (
    DeadlineExceeded,
    EngineGone,
    Overloaded,
    RankLost,
    SegueError,
)
from segue_contract.kv.layout import BLOCK_TOKENS, KvBlock, KvRecipe
from segue_contract.limits import RPC_TIMEOUT_S, SHUTDOWN_GRACE_S
from segue_contract.model.manifest import Manifest
from segue_contract.transport.stalls import StallMonitor

__all__ = ["EngineOptions", "TorchEngine", "own_recipe"]

log = structlog.get_logger(__name__)

_MIN_RETRY_S = 0.25


def own_recipe(manifest: Manifest, dtype: torch.dtype, window: str = "") -> KvRecipe:
    """The recipe of the KV that this engine computes itself: no codec in between.

    `window`: what a window makes of it; deeper layers' KV depends on what was seen before.
    """
    return KvRecipe(
        weights_digest=manifest.weights_digest,
        weight_quant=dtype_name(dtype),
        rope=manifest.edge_recipe.rope + window,
        codec="none",
    )


def _build_runner(
    directory: Path, manifest: Manifest, pages: int, options: EngineOptions
) -> StepRunner:
    runner = build_runner(directory, manifest.geometry, pages, options)
    check_size(directory, manifest)  # last: what is wrong with a tensor says more
    return runner


class TorchEngine:
    """Implements `port.Engine` for the Llama family. Build it with `load`, end it with `close`."""

    def __init__(
        self,
        manifest: Manifest,
        options: EngineOptions,
        pages: int,
        build: Callable[[], StepRunner],
        ranks: Ranks | None = None,
        watch: StuckWatch | None = None,
    ) -> None:
        """For `load`, and for whoever brings another runner; `start` comes next.

        Args:
            build: makes the runner, over `pages` pages; called in the engine thread.
            watch: looks at the running step, and says when it counts as stuck.
        """
        self._geometry = manifest.geometry
        self._options = options
        self._recipes = manifest.allowed_recipes()
        self._streams: dict[str, TurnStream] = {}
        self._numbers = itertools.count(1)
        self._closed = False
        self.died = asyncio.Event()
        self._dtype = choose_dtype(options.dtype, options.device)
        self._pool = BlockPool(pages)
        window = ""
        if options.window and options.window != manifest.geometry.sliding_window:
            window = f",window={options.window}+{options.sinks}"
        self._scheduler = Scheduler(
            self._pool,
            Recipes(own_recipe(manifest, self._dtype, window).digest, manifest.edge_recipe.digest),
            SchedulerLimits(
                max_batch=options.max_batch,
                step_tokens=options.step_tokens,
                mixed_tokens=options.mixed_tokens,
                context=manifest.geometry.context,
            ),
            Reach(options.window, options.sinks),
        )
        kv = manifest.geometry.kv
        page_bytes = 2 * kv.layers * kv.kv_heads * kv.head_dim * self._dtype.itemsize * PAGE_TOKENS
        self._thread = EngineThread(
            self._scheduler,
            options,
            frozenset(manifest.allowed_codecs().values()),
            choose_host_bytes(options, pages * page_bytes),
            build,
            self,
        )
        self._commands = self._thread.commands
        self._ranks = ranks
        self._stuck = watch or StuckWatch()
        self._watch: asyncio.Task[None] | None = None
        thread = self._thread
        self._stalls = StallMonitor(lambda: (thread.working_since, thread.expected_s), "engine")

    @classmethod
    async def load(
        cls, directory: Path, manifest: Manifest, options: EngineOptions | None = None
    ) -> TorchEngine:
        """Load weights, reserve the pool and start the engine thread.

        Raises:
            ModelMissing, ModelMismatch: the weights are not there or do not fit the manifest.
            ModelError: the KV pool is too small, or it or the host tier does not fit into memory.
            InvalidArgument: the model or the machine has no room for so many ranks.
            RankLost: a rank ended while it loaded.
        """
        options = choose_window(options or EngineOptions(), manifest.geometry)
        geometry = manifest.geometry
        if options.tensor_parallel > 1:
            check_devices(options.device, options.tensor_parallel)
        pages = count_pages(options, geometry)
        if options.tensor_parallel == 1:
            build = partial(_build_runner, directory, manifest, pages, options)
            engine = cls(manifest, options, pages, build)
        else:
            check_size(directory, manifest)
            ranks, lead = await start_ranks(directory, geometry, pages, options)
            engine = cls(manifest, options, pages, lead, ranks)
        await engine.start()
        return engine

    async def start(self) -> None:
        """Start the engine thread and wait until its runner is built and warm."""
        try:
            await self._thread.start()
        except BaseException:
            await self._stop_ranks()
            raise
        if self._ranks is not None:
            self._ranks.watch(self._lose)
        self._watch = asyncio.create_task(self._watch_steps(), name="watch engine steps")
        self._stalls.start()
        log.info(
            "engine_ready",
            device=self._options.device,
            dtype=dtype_name(self._dtype),
            tensor_parallel=self._options.tensor_parallel,
            threads=choose_threads(self._options.threads),
            kv_tokens=self._pool.pages_total * BLOCK_TOKENS // PAGES_PER_BLOCK,
        )

    # -- the port, on the event loop ----------------------------------------------------------

    def submit(self, turn: EngineTurn) -> TurnStream:
        """See `port.Engine.submit`; also raises EmptyPrompt and InvalidArgument (token ids)."""
        if self._closed:
            raise EngineGone("The engine computes no more.", hint="Another instance goes on.")
        check_turn(turn, self._geometry, self._pool.pages_total, self._scheduler.peak_pages)
        if len(self._streams) >= self._options.max_turns:
            retry_s = round(max(_MIN_RETRY_S, self._thread.stats.queue_s), 2)
            raise Overloaded(
                f"All {self._options.max_turns} turns that this engine admits are taken.",
                hint=f"Try again in {retry_s:g} s.",
                retry_after_s=retry_s,
            )
        # A turn may come again (after a cancel, with more tokens made): our key is never reused.
        key = f"{turn.turn}#{next(self._numbers)}"
        stream = TurnStream(partial(self._cancel, key))
        self._streams[key] = stream
        self._commands.put(Submit(replace(turn, turn=key)))
        return stream

    def _cancel(self, key: str) -> None:
        if self._streams.pop(key, None) is not None:
            self._commands.put(Cancel(key))

    async def offer_blocks(self, blocks: Sequence[KvBlock], domain: bytes = OPEN) -> int:
        """See `port.Engine.offer_blocks`; returns once the blocks can be found."""
        if not blocks:
            return 0
        for block in blocks:
            check_block(block, self._geometry.kv, self._recipes)
        if self._closed:
            return 0
        taken: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        here = tuple(replace(block, id=named(domain, block.id)) for block in blocks)
        self._commands.put(Offer(here, taken))
        try:
            async with asyncio.timeout(RPC_TIMEOUT_S):
                return await taken
        except TimeoutError as error:
            raise DeadlineExceeded(
                "The engine did not take the KV blocks in time.", hint="It is overloaded."
            ) from error

    async def computed_block(self, turn: EngineTurn) -> KvBlock | None:
        """See `port.Engine.computed_block`. Raises DeadlineExceeded."""
        if self._closed:
            return None
        found: asyncio.Future[KvBlock | None] = asyncio.get_running_loop().create_future()
        self._commands.put(Look(replace(turn, domains=turn.domains[:1]), found))
        try:
            async with asyncio.timeout(RPC_TIMEOUT_S):
                return await found
        except TimeoutError as error:
            raise DeadlineExceeded("The engine did not look in time.") from error

    def have_blocks(self, ids: Sequence[bytes], domains: Sequence[bytes] = (OPEN,)) -> int:
        # Single look-ups in dictionaries that the engine thread writes: each is atomic, and an
        # answer can be outdated by the next step whatever we do.
        return self._pool.count_prefix(ids, domains)

    def stats(self) -> EngineStats:
        stats = self._thread.stats
        return replace(stats, stalled=True) if self._stalls.stalled else stats

    @property
    def busy_s(self) -> float:
        """Seconds spent in steps since the start."""
        return self._thread.rates.busy_s

    @property
    def preemptions(self) -> int:
        """Times that a running turn gave its pages back to an older one."""
        return self._scheduler.preemptions

    @property
    def pool(self) -> BlockPool:
        """For reading its counts."""
        return self._pool

    @property
    def tier(self) -> HostTier | None:
        """For reading its counts; None where blocks that leave the pool are not kept."""
        return self._thread.tier

    def check_integrity(self) -> None:
        """Assert that pages and turns agree. Only while the engine thread rests (or is closed)."""
        self._scheduler.check_integrity()
        if self._thread.tier is not None:
            self._thread.tier.check_integrity()

    async def close(self) -> None:
        """Stop after the current step; turns that still run end with EngineGone."""
        self._closed = True
        self._commands.put(Close())  # also after `die`: a step that hung may have gone on since
        if self._watch is not None:
            self._watch.cancel()
        await self._stalls.close()
        await self._thread.join(SHUTDOWN_GRACE_S)
        self._fail_all(EngineGone("The engine was shut down.", hint="Another instance goes on."))
        await self._stop_ranks()

    async def _stop_ranks(self) -> None:
        if self._ranks is not None:
            await self._ranks.stop()

    def _lose(self, error: RankLost) -> None:
        # The thread may be idle, or stuck on a device: whoever waits for it is told first.
        self._closed = True
        self.die(EngineGone(f"The engine died: {error}"))
        self._commands.put(Die(error))

    async def _watch_steps(self) -> None:
        bound_s = self._options.limits.step_timeout_s
        while not self.died.is_set():
            await asyncio.sleep(bound_s / LOOKS)
            began = self._thread.working_since
            if self._stuck.look(began):
                log.error("engine_stuck", step_s=round(time.perf_counter() - began, 1))
                self.die(EngineGone(f"The engine hangs: a step took over {bound_s:.0f} s."))

    def _fail_all(self, error: SegueError) -> None:
        for stream in self._streams.values():
            stream.fail(error)
        self._streams.clear()

    # -- what the thread tells the event loop (`engine_thread.Receiver`) ----------------------

    def die(self, error: SegueError) -> None:
        self._closed = True
        self.died.set()
        self._fail_all(error)

    def deliver(self, deliveries: Sequence[Delivery]) -> None:
        for key, what in deliveries:
            stream = self._streams.get(key)
            if stream is None:
                continue  # its reader left in the meantime
            if isinstance(what, SegueError):
                del self._streams[key]
                stream.fail(what)
                continue
            if what.finished:
                del self._streams[key]
            stream.push(what)
