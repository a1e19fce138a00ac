"""What the edge itself computes in a turn: prefill, blocks for the uplink, tokens."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence

from segue_contract.kv.layout import BLOCK_TOKENS
from segue_contract.plan import Shape
from segue_contract.turn.events import Reason
from segue_edge.compute import Priority
from segue_edge.turns.asked import Asked
from segue_edge.turns.compute.decoder import EdgeDecoder, Say
from segue_edge.turns.compute.model_port import Array
from segue_edge.turns.compute.prefill_job import Prefill, PrefillJob
from segue_edge.turns.compute.tools import EdgeTools
from segue_edge.turns.planning import Planned, UnderWay

BRIDGE_ROOM = 64  # tokens that the KV buffer has room for; a longer bridge makes it grow once


class EdgePart:
    """One prefill and what follows from it. `start_prefill` first; `cancel` in any case at last.

    Args:
        made: tokens of the reply that exist already.
        max_tokens: for the whole reply, `made` included.
    """

    def __init__(
        self,
        tools: EdgeTools,
        asked: Asked,
        prompt: list[int],
        planned: Planned,
        max_tokens: int,
        made: Sequence[int] = (),
    ) -> None:
        self._tools = tools
        self._asked = asked
        self._prompt = prompt
        self._made = list(made)
        self._planned = planned
        self._max_tokens = max_tokens
        self._job: PrefillJob | None = None
        self._halted = asyncio.Event()
        ships = planned.plan.shape is Shape.SHIP and not made
        self.sender = tools.sender(planned.ids) if ships else None

    def start_prefill(self) -> None:
        """Queue the prefill. Raises Overloaded where the compute queue is full."""
        loop = asyncio.get_running_loop()
        sender = self.sender

        def on_block(index: int, k: Array, v: Array) -> None:
            assert sender is not None
            with contextlib.suppress(RuntimeError):  # the loop closed meanwhile
                loop.call_soon_threadsafe(sender.offer, index, k, v)

        self._job = PrefillJob(
            self._tools.model,
            self._tools.cache.of(self._asked.session.tenant),
            [*self._prompt, *self._made],
            self._planned.ids,
            on_block=on_block if sender is not None else None,
            sampling=self._asked.sampling,
            index=len(self._made),
            chunk=self._planned.chunk,
            room=self._max_tokens if sender is None else BRIDGE_ROOM,
        )
        self._tools.compute.submit(self._job, Priority.PREFILL)

    # A prefill may begin before the plan is final: it is kept where it serves the plan as well.

    @property
    def under_way(self) -> UnderWay:
        assert self._job is not None
        left = 0 if self._job.done.done() else self._job.left
        return UnderWay(left, self._planned.report.edge_cached_blocks)

    def computes(self, prompt: list[int], made: Sequence[int] = ()) -> bool:
        return self._prompt == prompt and self._made == list(made)

    def adopt(self, planned: Planned) -> bool:
        """Go on under `planned`; False where that is another shape."""
        same = self._planned.plan.shape is planned.plan.shape
        if same:
            self._planned = planned
        return same

    def halt(self) -> None:
        """Make no more tokens; the prefill goes on, for its KV."""
        self._halted.set()

    def cancel(self) -> None:
        """Drop what has not been computed yet. Idempotent."""
        self._halted.set()
        if self._job is not None and not self._job.done.done():
            self._job.cancel()

    async def make(self, say: Say, on_prefilled: Callable[[Prefill], None]) -> Reason | None:
        """The reply from its next token on; None where it was halted.

        Raises:
            SegueError: the model failed, or its queue is full.
        """
        if self._job is None:
            self.start_prefill()
        assert self._job is not None
        prefill = await self._job.done
        for tokens, seconds in prefill.rates:
            if tokens >= BLOCK_TOKENS and seconds > 0:
                self._tools.speeds.prefill_tokens_per_s.observe(tokens / seconds)
        on_prefilled(prefill)
        decoder = EdgeDecoder(
            self._tools,
            sampling=self._asked.sampling,
            stop=self._asked.stop,
            max_tokens=self._max_tokens,
            made=self._made,
            say=say,
        )
        return await decoder.run(prefill, self._halted)
