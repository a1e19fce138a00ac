"""The computing thread of the torch engine: it owns scheduler, pages and runner.

    drain commands → schedule → run → postprocess → one call_soon_threadsafe per step

The thread waits for commands only when it has nothing to compute, and never for I/O. With
`EngineOptions.ahead` a second thread runs the model, and while it does, this one takes in commands
and plans the next step (`_run_ahead`).
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeAlias

import structlog
import torch

from segue_cloud.engine.block_pool import PAGES_PER_BLOCK, BlockPool
from segue_cloud.engine.commands import Cancel, Close, Command, Die, Look, Offer, Submit
from segue_cloud.engine.devices import build_tier
from segue_cloud.engine.host_tier import BLOCKS_PER_STEP, STEP, TARGET_SHARE, HostTier
from segue_cloud.engine.options import EngineOptions, rank_threads
from segue_cloud.engine.port import EngineOutput, EngineStats, EngineTurn
from segue_cloud.engine.rates import Rates
from segue_cloud.engine.runner import StepRunner
from segue_cloud.engine.scheduler import Scheduler, Step
from segue_contract.errors import EngineGone, RankLost, SegueError, TurnFailed
from segue_contract.kv.layout import BLOCK_TOKENS, KvBlock
from segue_contract.liveness import UsualTime

log = structlog.get_logger(__name__)

Delivery: TypeAlias = tuple[str, EngineOutput | SegueError]


class Receiver(Protocol):
    """Who hears of the thread's work; called on the event loop."""

    def deliver(self, deliveries: Sequence[Delivery]) -> None:
        """Outputs and failures of turns, in order."""
        ...

    def die(self, error: SegueError) -> None:
        """The thread has ended by an error and computes nothing more."""
        ...


class EngineThread:
    """`start` runs it, a `Close` command ends it after the current step.

    Args:
        host_bytes: for blocks that the pool had to give up; 0: none are kept.
        build: makes the runner, in this thread.
        codecs: codec steps that the model's quality gate allows.
        receiver: must take calls on the event loop that makes this object.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        options: EngineOptions,
        codecs: frozenset[str],
        host_bytes: int,
        build: Callable[[], StepRunner],
        receiver: Receiver,
    ) -> None:
        self.scheduler = scheduler
        self.rates = Rates()
        self.tier: HostTier | None = None
        self.commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        pages = scheduler.pool.pages_total
        # Replaced as a whole: any thread may read it.
        self.stats = EngineStats(0, 0, pages, pages, 0.0, 0.0, 0.0, 0, 0)
        self.working_since = 0.0  # perf_counter, with each step and command anew; 0.0: it waits
        self.expected_s = math.inf  # what the running step should take
        self._usual = UsualTime()
        self._pool: BlockPool = scheduler.pool
        self._options = options
        self._codecs = codecs
        self._host_bytes = host_bytes
        self._build = build
        self._receiver = receiver
        self._loop = asyncio.get_running_loop()

    async def start(self) -> None:
        """Returns when the runner is built and warm; raises what building it raised."""
        ready: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(
            target=self._main, args=(ready,), name="segue-engine", daemon=True
        )
        self._thread.start()
        try:
            await ready
        except BaseException:
            self.commands.put(Close())  # it may still be loading: then it ends when it has
            raise

    async def join(self, timeout_s: float) -> None:
        """Wait for the end that a `Close` command asked for."""
        await asyncio.to_thread(self._thread.join, timeout_s)

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
                stack.callback(self._runner.close)
                if self.tier is not None:
                    stack.callback(self.tier.close)
                self._post(_finish_future, ready, None)
                self._run_ahead(model) if model else self._run()
        except BaseException as error:
            if not hasattr(self, "_runner"):
                self._post(_fail_future, ready, error)
                return
            log.exception("engine_died")
            self._post(self._receiver.die, EngineGone(f"The engine died: {error}."))

    def _run(self) -> None:
        while self._drain():
            self._step()

    def _set_up(self) -> StepRunner:
        # torch's pool takes its size from the thread that computes, so it is set here.
        threads = rank_threads(self._options, 0)
        torch.set_num_threads(threads)
        runner = self._build()
        try:
            runner.warm_up(threads)
            self._add_tier(runner)
        except BaseException:
            runner.close()
            raise
        return runner

    def _add_tier(self, runner: StepRunner) -> None:
        if self._host_bytes and STEP not in self._codecs:
            # Asked for or not: nobody is to wonder where the memory saving went.
            log.warning("no_host_tier", reason=f"the model's quality gate does not allow {STEP}")
        elif self._host_bytes:
            self.tier = build_tier(
                runner.pages, self._host_bytes, self._recompute_s, self._options.limits
            )
            self._pool.tier = self.tier
            self._pool.target = TARGET_SHARE

    def _recompute_s(self) -> float:
        rate = self.rates.prefill_tokens_per_s
        return BLOCK_TOKENS / rate if rate else 0.0

    def _drain(self) -> bool:
        """Take in all waiting commands; wait for one if there is nothing else to do."""
        block = self.scheduler.idle
        if block and self.tier is not None:
            self.tier.at_leisure()
        while True:
            while block and self.commands.empty() and self._pool.relieve(1):
                self._mark()  # nobody waits: down to the target
            try:
                if block:
                    self.working_since = 0.0
                command = self.commands.get(block=block)
            except queue.Empty:
                return True
            finally:
                self._mark()
            block = False
            match command:
                case Submit(turn):
                    output = self.scheduler.add(turn)
                    if output is not None:
                        self._post(self._receiver.deliver, [(turn.turn, output)])
                case Cancel(key):
                    self.scheduler.cancel(key)
                case Offer(blocks, taken):
                    self._post(_finish_future, taken, self._take_blocks(blocks))
                case Look(turn, found):
                    self._post(_finish_future, found, self._look(turn))
                case Die(error):
                    raise error
                case Close():
                    return False
            self._publish_stats()
            block = self.scheduler.idle and self.commands.empty()

    def _mark(self) -> None:
        """Tell whoever watches (`stuck.StuckWatch`) that the thread has got on."""
        self.working_since = time.perf_counter()

    def _step(self) -> None:
        step = self.scheduler.schedule()
        if not step.works:
            return
        self._expect(step)
        started = time.perf_counter()
        try:
            sampled = self._runner.run(self._runner.prepare(step))
        except RankLost:
            raise
        except Exception as error:
            self._fail_step(step, error)
            return
        outputs = self.scheduler.postprocess(step, sampled)
        self._observe(step, time.perf_counter() - started)
        self._send(outputs)
        self._pool.relieve(BLOCKS_PER_STEP)

    def _run_ahead(self, model: ThreadPoolExecutor) -> None:
        """The same loop with the model in a thread of its own and the next step planned early."""
        scheduler = self.scheduler
        ahead = Step(())
        outputs: list[tuple[str, EngineOutput | None]] = []
        while True:
            news = not self.commands.empty()
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
            self._expect(step)
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
            elif isinstance(error, Exception) and not isinstance(error, RankLost):
                self._fail_step(step, error)
            else:
                raise error
            self._observe(step, time.perf_counter() - started)

    def _send(self, outputs: list[tuple[str, EngineOutput | None]]) -> None:
        if outputs:
            self._post(
                self._receiver.deliver, [(key, _or_failure(output)) for key, output in outputs]
            )
            outputs.clear()

    def _fail_step(self, step: Step, error: Exception) -> None:
        log.exception("step_failed", turns=len(step.works), exc_info=error)
        failure = TurnFailed(f"The engine failed in a step: {error}.", hint="Ask again.")
        self._post(self._receiver.deliver, [(key, failure) for key in self.scheduler.fail(step)])

    def _expect(self, step: Step) -> None:
        """Say how long `step` should take, for whoever watches."""
        rate = self.rates.prefill_tokens_per_s
        self.expected_s = max(self._usual.seconds, step.tokens / rate if rate else 0.0)

    def _observe(self, step: Step, seconds: float) -> None:
        self._usual.took(seconds)
        decode_rows = sum(work.count == 1 and work.samples for work in step.works)
        self.rates.observe(step.tokens - decode_rows, decode_rows, seconds)
        self.scheduler.fair.times.observe(decode_rows, step.tokens - decode_rows, seconds)
        if self.tier is not None:
            self.tier.stepped(seconds)
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
        return taken

    def _look(self, turn: EngineTurn) -> KvBlock | None:
        name = self.scheduler.cached_block(turn)
        if name is None:
            return None
        k, v = self._runner.pages.read_block(self._pool.pages_of(name))
        return KvBlock(name, "", k, v)

    def _publish_stats(self) -> None:
        scheduler, rates = self.scheduler, self.rates
        self.stats = EngineStats(
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
