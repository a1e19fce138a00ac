"""The turns of this node: started once, joined by id, bounded, ended in order."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable

import structlog

from segue_contract.errors import Overloaded, Unreachable
from segue_contract.ids import SessionName, TurnName
from segue_contract.limits import ENDED_TURNS_KEPT, MAX_TURNS_PER_EDGE, SHUTDOWN_GRACE_S
from segue_contract.transport.turn_feed import TurnFeed
from segue_edge.turns.asked import Asked, Shown
from segue_edge.turns.offline.outbox import Outbox
from segue_edge.turns.run import TurnRun

log = structlog.get_logger("segue.turns")


class TurnRegistry:
    """Owns the turn tasks.

    Args:
        make: a run for what was asked.
        outbox: has the turns that ended here and that the log has not.
        retry_after_s: how long until a place should be free, for refusals.
        on_busy, on_idle: told when the first turn starts and the last one ends.
    """

    def __init__(
        self,
        make: Callable[[Asked], TurnRun],
        outbox: Outbox,
        *,
        retry_after_s: Callable[[], float],
        on_busy: Callable[[], None],
        on_idle: Callable[[], None],
        max_turns: int = MAX_TURNS_PER_EDGE,
    ) -> None:
        self._make = make
        self._outbox = outbox
        self._retry_after_s = retry_after_s
        self._on_busy = on_busy
        self._on_idle = on_idle
        self._max_turns = max_turns
        self._running: dict[TurnName, tuple[TurnRun, asyncio.Task[None]]] = {}
        self._ended: OrderedDict[TurnName, TurnRun] = OrderedDict()
        self._closing = False

    def __len__(self) -> int:
        return len(self._running)

    def run_or_join(self, asked: Asked) -> TurnFeed:
        """The events of this session and turn id: of the run there is or was, or of a new one.

        Raises:
            TurnConflict: the id is known here, for another question.
            Overloaded: as many turns run as this node takes; at once, with a retry hint.
            Unreachable: the node is shutting down.
        """
        running = self._running.get(asked.key)
        known = running[0] if running is not None else self._ended.get(asked.key)
        if known is not None:
            asked.check_joins(known.asked)
            known.asked.renew(asked.request.device, asked.shown)
            return known.feed
        kept = self._outbox.find(asked.key)
        if kept is not None:
            asked.check_joins(kept.asked)
            kept.asked.renew(asked.request.device, asked.shown)
            return kept.replay()
        if self._closing:
            raise Unreachable("This edge is shutting down.", hint="Use another node.")
        if len(self._running) >= self._max_turns:
            raise Overloaded(
                f"This edge already serves {len(self._running)} turns.",
                hint="Try again a little later, or another edge.",
                retry_after_s=round(self._retry_after_s(), 3),
            )
        run = self._make(asked)
        task = asyncio.create_task(run.run(), name=f"turn {asked.turn}")
        self._running[asked.key] = (run, task)
        if len(self._running) == 1:
            self._on_busy()
        task.add_done_callback(lambda _: self._done(asked.key))
        return run.feed

    def renew(self, tenant: str, device: str, shown: Shown, covers: Callable[[str], bool]) -> None:
        """The device's turns that run here, or wait to be delivered, go on under a newer token.

        Args:
            covers: whether that token is good for a session's turns.
        """
        waiting = (turn.asked for turn in self._outbox.waiting)
        for asked in (*(run.asked for run, _ in self._running.values()), *waiting):
            if asked.tenant == tenant and covers(asked.request.session):
                asked.renew(device, shown)

    def running(self, session: SessionName, turn: str) -> TurnRun | None:
        known = self._running.get(TurnName(session, turn))
        return known[0] if known is not None else None

    def offline_turn(self, session: SessionName, turn: str) -> TurnRun | None:
        """A running turn that only this node knows of; `turn` may be empty."""
        for name, (run, _) in self._running.items():
            if run.offline and name.session == session and turn in ("", name.turn):
                return run
        return None

    def forget(self, name: TurnName) -> None:
        """Tell nobody any more what this node knows of an ended turn: the log has it."""
        self._ended.pop(name, None)

    def _done(self, key: TurnName) -> None:
        run, _ = self._running.pop(key)
        if run.whole:  # without an end it goes on elsewhere: who comes back joins through the log
            self._ended[key] = run
            while len(self._ended) > ENDED_TURNS_KEPT:
                self._ended.popitem(last=False)
        if not self._running:
            self._on_idle()

    async def close(self) -> None:
        """Give running turns a part of the grace period; the cloud finishes what is left."""
        self._closing = True
        tasks = [task for _, task in self._running.values()]
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=SHUTDOWN_GRACE_S / 2)
        if late:
            log.warning("turns_left_to_the_cloud", turns=len(late))
        for task in late:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
