"""The torch engine: one computing thread, and the engine port on the event loop's side of it.

    event loop                           engine thread
    submit, cancel, offer ── commands ─► drain → schedule → run → postprocess ─┐
    streams  ◄──────────── one call_soon_threadsafe per step ──────────────────┘

The thread waits for commands only when it has nothing to compute, and never for I/O. With
`EngineOptions.ahead` a second thread runs the model, and while it does, this one takes in commands
and plans the next step (`_run_ahead`).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

import structlog
import torch

from segue_cloud.engine.admission import check_block, check_turn
from segue_cloud.engine.block_pool import PAGES_PER_BLOCK, BlockPool
from segue_cloud.engine.commands import Cancel, Close, Command, Offer, Submit
from segue_cloud.engine.devices import build_runner, build_tier, count_pages
from segue_cloud.engine.host_tier import BLOCKS_PER_STEP, STEP, TARGET_SHARE, HostTier
from segue_cloud.engine.options import (
    EngineOptions,
    choose_dtype,
    choose_threads,
    dtype_name,
)
from segue_cloud.engine.port import EngineOutput, EngineStats, EngineTurn
from segue_cloud.engine.rates import Rates
from segue_cloud.engine.runner import StepRunner
from segue_cloud.engine.scheduler import Scheduler, SchedulerLimits, Step
from segue_cloud.engine.streams import TurnStream
from segue_contract.errors import (
    DeadlineExceeded,
    Overloaded,
    SegueError,
    TurnFailed,
)
from segue_contract.kv.layout import BLOCK_TOKENS, KvBlock, KvRecipe
from segue_contract.limits import RPC_TIMEOUT_S, SHUTDOWN_GRACE_S
from segue_contract.model.manifest import Manifest

__all__ = ["EngineOptions", "TorchEngine"]

log = structlog.get_logger(__name__)

_MIN_RETRY_S = 0.25


_Delivery: TypeAlias = tuple[str, EngineOutput | SegueError]


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


class TorchEngine:
    """Implements `port.Engine` for the Llama family. Build it with `load`, end it with `close`."""

    def __init__(
        self,
        manifest: Manifest,
        options: EngineOptions,
        pages: int,
        build: Callable[[], StepRunner],
    ) -> None:
        """For `load`, and for whoever brings another runner; `start` comes next.

        Args:
            build: makes the runner, over `pages` pages; called in the engine thread.
        """
        self._build = build
        self._geometry = manifest.geometry
        self._options = options
        self._recipes = manifest.allowed_recipes()
        self._codecs = frozenset(manifest.allowed_codecs().values())
        self._loop = asyncio.get_running_loop()
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._streams: dict[str, TurnStream] = {}
        self._numbers = itertools.count(1)
        self._closed = False
        self.died = asyncio.Event()
        self._rates = Rates()
        self._tier: HostTier | None = None
        self._dtype = choose_dtype(options.dtype, options.device)
        self._pool = BlockPool(pages)
        window = f",window={options.window}+{options.sinks}" if options.window else ""
        self._scheduler = Scheduler(
            self._pool,
            own_recipe(manifest, self._dtype, window).digest,
            manifest.edge_recipe.digest,
            SchedulerLimits(
                max_batch=options.max_batch,
                step_tokens=options.step_tokens,
                mixed_tokens=options.mixed_tokens,
                context=manifest.geometry.context,
            ),
        )
        self._stats = EngineStats(0, 0, pages, pages, 0.0, 0.0, 0.0, 0, 0)

    @classmethod
    async def load(
        cls, directory: Path, manifest: Manifest, options: EngineOptions | None = None
    ) -> TorchEngine:
        """Load weights, reserve the pool and start the engine thread.

        Raises:
            ModelMissing, ModelMismatch: the weights are not there or do not fit the manifest.
            ModelError: the KV pool is too small or does not fit into memory.
        """
        options = options or EngineOptions()
        geometry = manifest.geometry
        pages = count_pages(options, geometry)
        build = partial(build_runner, directory, geometry, pages, options)
        engine = cls(manifest, options, pages, build)
        await engine.start()
        return engine

    async def start(self) -> None:
        """Start the engine thread and wait until its runner is built and warm."""
        ready: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(
            target=self._main, args=(ready,), name="segue-engine", daemon=True
        )
        self._thread.start()
        await ready
        log.info(
            "engine_ready",
            device=self._options.device,
            dtype=dtype_name(self._dtype),
            threads=choose_threads(self._options.threads),
            kv_tokens=self._pool.pages_total * BLOCK_TOKENS // PAGES_PER_BLOCK,
        )

    # -- the port, on the event loop ----------------------------------------------------------

    def submit(self, turn: EngineTurn) -> TurnStream:
        """See `port.Engine.submit`; also raises EmptyPrompt and InvalidArgument (token ids)."""
        if self._closed:
            raise TurnFailed("The engine is shutting down.", hint="Another instance goes on.")
        check_turn(turn, self._geometry, self._pool.pages_total)
        if len(self._streams) >= self._options.max_turns:
            retry_s = round(max(_MIN_RETRY_S, self._stats.queue_s), 2)
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

    async def offer_blocks(self, blocks: Sequence[KvBlock]) -> int:
        """See `port.Engine.offer_blocks`; returns once the blocks can be found."""
        if not blocks:
            return 0
        for block in blocks:
            check_block(block, self._geometry.kv, self._recipes)
        if self._closed:
            return 0
        taken: asyncio.Future[int] = self._loop.create_future()
        self._commands.put(Offer(tuple(blocks), taken))
        try:
            async with asyncio.timeout(RPC_TIMEOUT_S):
                return await taken
        except TimeoutError as error:
            raise DeadlineExceeded(
                "The engine did not take the KV blocks in time.", hint="It is overloaded."
            ) from error

    def have_blocks(self, ids: Sequence[bytes]) -> int:
        # Single look-ups in dictionaries that the engine thread writes: each is atomic, and an
        # answer can be outdated by the next step whatever we do.
        return self._pool.count_prefix(ids)

    def stats(self) -> EngineStats:
        return self._stats

    @property
    def busy_s(self) -> float:
        """Seconds spent in steps since the start."""
        return self._rates.busy_s

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
        """For reading its counts; None without `EngineOptions.host_bytes`."""
        return self._tier

    def check_integrity(self) -> None:
        """Assert that pages and turns agree. Only while the engine thread rests (or is closed)."""
        self._scheduler.check_integrity()
        if self._tier is not None:
            self._tier.check_integrity()

    async def close(self) -> None:
        """Stop after the current step; turns that still run end with TurnFailed."""
        if self._closed:
            return
        self._closed = True
        self._commands.put(Close())
        await asyncio.to_thread(self._thread.join, SHUTDOWN_GRACE_S)
        self._fail_all(TurnFailed("The engine was shut down.", hint="Another instance goes on."))

    def _die(self, error: SegueError) -> None:
        self.died.set()
        self._fail_all(error)

    def _fail_all(self, error: SegueError) -> None:
        for stream in self._streams.values():
            stream.fail(error)
        self._streams.clear()

    def _deliver(self, deliveries: Sequence[_Delivery]) -> None:
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

    # -- the engine thread --------------------------------------------------------------------

    def _main(self, ready: asyncio.Future[None]) -> None:
        try:
            with contextlib.ExitStack() as stack:
                if self._options.ahead:
                    # Built where it runs: the pools of torch and of the kernels are per thread.
                    model = stack.enter_context(ThreadPoolExecutor(1, "segue-model"))
                    self._runner = model.submit(self._set_up).result()
                else:
                    model = None
                    self._runner = self._set_up()
                if self._tier is not None:
                    stack.callback(self._tier.close)
                self._post(_finish_future, ready, None)
                self._run_ahead(model) if model else self._run()
        except BaseException as error:
            if not hasattr(self, "_runner"):
                self._post(_fail_future, ready, error)
                return
            log.exception("engine_died")
            self._closed = True
            self._post(self._die, TurnFailed(f"The engine died: {error}."))

    def _run(self) -> None:
        while self._drain():
            self._step()

    def _relieve(self, at_most: int) -> int:
        return self._pool.relieve(TARGET_SHARE, at_most) if self._pool.tier is not None else 0

    def _set_up(self) -> StepRunner:
        # torch's pool takes its size from the thread that computes, so it is set here.
        threads = choose_threads(self._options.threads)
        torch.set_num_threads(threads)
        runner = self._build()
        runner.warm_up(threads)
        if self._options.host_bytes and STEP not in self._codecs:
            log.warning("no_host_tier", reason=f"the model's quality gate does not allow {STEP}")
        elif self._options.host_bytes:
            self._tier = build_tier(runner.pages, self._options.host_bytes, self._recompute_s)
            self._pool.tier = self._tier
        return runner

    def _recompute_s(self) -> float:
        rate = self._rates.prefill_tokens_per_s
        return BLOCK_TOKENS / rate if rate else 0.0

    def _drain(self) -> bool:
        """Take in all waiting commands; wait for one if there is nothing else to do."""
        block = self._scheduler.idle
        while True:
            while block and self._commands.empty() and self._relieve(1):
                pass  # nobody waits: down to the target
            try:
                command = self._commands.get(block=block)
            except queue.Empty:
                return True
            block = False
            match command:
                case Submit(turn):
                    output = self._scheduler.add(turn)
                    if output is not None:
                        self._post(self._deliver, [(turn.turn, output)])
                case Cancel(key):
                    self._scheduler.cancel(key)
                case Offer(blocks, taken):
                    self._post(_finish_future, taken, self._take_blocks(blocks))
                case Close():
                    return False
            self._publish_stats()
            block = self._scheduler.idle and self._commands.empty()

    def _step(self) -> None:
        step = self._scheduler.schedule()
        if not step.works:
            return
        started = time.perf_counter()
        try:
            sampled = self._runner.run(self._runner.prepare(step))
        except Exception as error:
            self._fail_step(step, error)
            return
        outputs = self._scheduler.postprocess(step, sampled)
        self._observe(step, time.perf_counter() - started)
        self._send(outputs)
        fresh = sum(work.count for work in step.works) // BLOCK_TOKENS
        self._relieve(BLOCKS_PER_STEP + 2 * fresh)

    def _run_ahead(self, model: ThreadPoolExecutor) -> None:
        """The same loop with the model in a thread of its own and the next step planned early."""
        scheduler = self._scheduler
        ahead = Step(())
        outputs: list[tuple[str, EngineOutput | None]] = []
        while True:
            news = not self._commands.empty()
            if scheduler.idle:
                self._send(outputs)
            if not self._drain():
                self._send(outputs)
                return
            # New turns belong into the next step at once; those that left or ended, no more.
            step = Step(()) if news else scheduler.still_valid(ahead)
            step = step if step.works else scheduler.schedule()
            ahead = Step(())
            if not step.works:
                continue
            started = time.perf_counter()
            try:
                running = model.submit(self._runner.run, self._runner.prepare(step))
            except Exception as unprepared:
                self._fail_step(step, unprepared)
                continue
            scheduler.begin(step)
            ahead = scheduler.schedule()
            self._send(outputs)
            error = running.exception()  # waits for the step
            if error is None:
                outputs = scheduler.end(step, running.result())
            elif isinstance(error, Exception):
                self._fail_step(step, error)
            else:
                raise error
            self._observe(step, time.perf_counter() - started)

    def _send(self, outputs: list[tuple[str, EngineOutput | None]]) -> None:
        if outputs:
            self._post(self._deliver, [(key, _or_failure(output)) for key, output in outputs])
            outputs.clear()

    def _fail_step(self, step: Step, error: Exception) -> None:
        log.exception("step_failed", turns=len(step.works), exc_info=error)
        failure = TurnFailed(f"The engine failed in a step: {error}.", hint="Ask again.")
        self._post(self._deliver, [(key, failure) for key in self._scheduler.fail(step)])

    def _observe(self, step: Step, seconds: float) -> None:
        decode_rows = sum(work.count == 1 and work.samples for work in step.works)
        self._rates.observe(step.tokens - decode_rows, decode_rows, seconds)
        self._publish_stats()

    def _take_blocks(self, blocks: Sequence[KvBlock]) -> int:
        taken = 0
        for block in blocks:
            if self._pool.resolve(block.id) is not None:
                taken += 1
                continue
            pages = self._pool.allocate(PAGES_PER_BLOCK)
            if pages is None:
                break
            self._runner.write_block(pages, block)
            self._pool.enter(block.id, pages, refs=0, kept_as=block.id)
            taken += 1
        # As many as came, and as many again towards the target; never those that just came.
        self._relieve(min(2 * len(blocks), self._pool.blocks_idle - len(blocks)))
        return taken

    def _publish_stats(self) -> None:
        scheduler, rates = self._scheduler, self._rates
        self._stats = EngineStats(
            running=scheduler.running,
            waiting=scheduler.waiting,
            pages_free=self._pool.pages_free,
            pages_total=self._pool.pages_total,
            queue_s=rates.queue_s(
                scheduler.prefill_backlog,
                scheduler.decode_backlog,
                scheduler.waiting,
                self._options.max_batch,
            ),
            prefill_tokens_per_s=rates.prefill_tokens_per_s,
            decode_step_s=rates.decode_step_s,
            prefix_hit_tokens=scheduler.prefix_hit_tokens,
            steps=rates.steps,
        )

    def _post(self, call: Callable[..., None], *args: object) -> None:
        # The loop may be gone when a program ends without `close`: nobody listens then.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call, *args)


def _or_failure(output: EngineOutput | None) -> EngineOutput | SegueError:
    if output is not None:
        return output
    return TurnFailed(
        "The model's numbers for this turn are not finite.",
        hint="Ask again; if it stays so, check the model with `segue model verify`.",
    )


def _finish_future(future: asyncio.Future[object], result: object) -> None:
    if not future.done():
        future.set_result(result)


def _fail_future(future: asyncio.Future[object], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
