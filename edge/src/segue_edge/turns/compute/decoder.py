"""The edge's own decoder: tokens one after another, with text and stop strings."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from segue_contract.sync.ops import Sampling
from segue_contract.turn.events import Reason
from segue_contract.turn.text import ReplyText
from segue_edge.compute import Priority
from segue_edge.turns.compute.prefill_job import DecodeJob, Prefill
from segue_edge.turns.compute.tools import EdgeTools

Say = Callable[[int, tuple[int, ...], tuple[str, ...]], None]


class EdgeDecoder:
    """Decodes on the edge from a finished prefill on.

    Args:
        made: tokens of the reply that exist already (a turn that goes on offline).
        say: told after every token which tokens may be shown now and the index of the first; none
            while they may begin a stop string.
    """

    def __init__(
        self,
        tools: EdgeTools,
        *,
        sampling: Sampling,
        stop: Sequence[str],
        max_tokens: int,
        made: Sequence[int],
        say: Say,
    ) -> None:
        self._tools = tools
        self._sampling = sampling
        self._max_tokens = max_tokens
        self._say = say
        self._shown = self._made = len(made)
        self._text = ReplyText(tools.tokenizer, stop, made)

    async def run(self, prefill: Prefill, until: asyncio.Event) -> Reason | None:
        """Say tokens until the reply ends or `until` is set.

        Returns:
            The reason of the end; None where `until` was set first: what was not said by then
            (tokens that wait for a stop string, a step under way) was never made.
        """
        with self._tools.compute.decoding():
            return await self._run(prefill, until)

    async def _run(self, prefill: Prefill, until: asyncio.Event) -> Reason | None:
        token = prefill.first_token
        while True:
            if token in self._tools.end_tokens:
                self._flush()
                return Reason.STOP
            scan = self._text.push((token,))
            self._made += 1
            self._tell(scan.tokens, scan.pieces)
            if scan.stopped:
                return Reason.STOP
            if self._made >= self._max_tokens:
                self._flush()
                return Reason.LENGTH
            following = await self._next(prefill.kv, token, until)
            if following is None:
                return None
            token = following

    async def _next(self, kv: Any, token: int, until: asyncio.Event) -> int | None:
        if until.is_set():
            return None
        job = DecodeJob(self._tools.model, kv, token, self._sampling, self._made)
        done = self._tools.compute.submit(job, Priority.DECODE)
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
        self._tools.speeds.decode_step_s.observe(seconds)
        return chosen

    def _flush(self) -> None:
        rest = self._text.flush()
        if rest.tokens:
            self._tell(rest.tokens, rest.pieces)

    def _tell(self, tokens: tuple[int, ...], pieces: tuple[str, ...]) -> None:
        index = self._shown
        self._shown += len(tokens)
        self._say(index, tokens, pieces)
