"""The edge speaking for itself: its tokens one after another, with text and stop strings."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from segue_contract.chat import ChatTokenizer, StopScanner
from segue_contract.sync.ops import Sampling
from segue_edge.compute import ComputeThread, Priority
from segue_edge.planner.estimators import EdgeSpeeds
from segue_edge.turns.model_port import EdgeModelPort
from segue_edge.turns.prefill_job import DecodeJob, Prefill

Say = Callable[[tuple[int, ...], tuple[str, ...]], None]
INTERRUPTED = ""


class Voice:
    """Decodes on the edge from a finished prefill on.

    Args:
        made: tokens of the reply that exist already (a turn that goes on offline).
        say: told the tokens that may be shown; tokens that may begin a stop string wait.
    """

    def __init__(
        self,
        model: EdgeModelPort,
        compute: ComputeThread,
        tokenizer: ChatTokenizer,
        speeds: EdgeSpeeds,
        *,
        sampling: Sampling,
        stop: Sequence[str],
        max_tokens: int,
        end_tokens: frozenset[int],
        made: Sequence[int],
        say: Say,
    ) -> None:
        self._model = model
        self._compute = compute
        self._speeds = speeds
        self._sampling = sampling
        self._max_tokens = max_tokens
        self._end_tokens = end_tokens
        self._say = say
        self._made = len(made)
        self._detokenizer = tokenizer.detokenizer()
        self._scanner = StopScanner(tuple(stop))
        for token in made:
            self._scanner.push((token,), (self._detokenizer.push(token),))
        self._scanner.flush()

    async def speak(self, prefill: Prefill, until: asyncio.Event) -> str:
        """Say tokens until the reply ends or `until` is set.

        Returns:
            "stop" or "length", or `INTERRUPTED` where `until` was set first; what was not said
            by then (tokens that wait for a stop string, a step under way) was never made.
        """
        with self._compute.decoding():
            return await self._speak(prefill, until)

    async def _speak(self, prefill: Prefill, until: asyncio.Event) -> str:
        token = prefill.first_token
        while True:
            if token in self._end_tokens:
                self._flush()
                return "stop"
            scan = self._scanner.push((token,), (self._detokenizer.push(token),))
            self._made += 1
            if scan.tokens:
                self._say(tuple(scan.tokens), tuple(scan.pieces))
            if scan.stopped:
                return "stop"
            if self._made >= self._max_tokens:
                self._flush()
                return "length"
            following = await self._next(prefill.kv, token, until)
            if following is None:
                return INTERRUPTED
            token = following

    async def _next(self, kv: Any, token: int, until: asyncio.Event) -> int | None:
        if until.is_set():
            return None
        job = DecodeJob(self._model, kv, token, self._sampling, self._made)
        done = self._compute.submit(job, Priority.DECODE)
        interrupted = asyncio.ensure_future(until.wait())
        either: set[asyncio.Future[Any]] = {done, interrupted}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                return None
            chosen, seconds = done.result()
        finally:
            interrupted.cancel()
            if not done.done():
                job.cancel()
        self._speeds.decode_step_s.observe(seconds)
        return chosen

    def _flush(self) -> None:
        rest = self._scanner.flush()
        if rest.tokens:
            self._say(tuple(rest.tokens), tuple(rest.pieces))
