"""Whether followers over MQTT miss something: how far their logs go, asked of the nodes.

A broker may be away, hang, refuse, drop, or be another one than the cloud's; whatever it does, a
follower learns within `TAILS_INTERVAL_S` what the log has. All sessions of a client go in one call.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable
from random import Random
from typing import Protocol

from segue._inbox import Tail
from segue._nodes import Nodes
from segue_contract.errors import PermissionDenied, Revoked, SegueError, Unauthenticated
from segue_contract.limits import MAX_TAILS, TAILS_INTERVAL_S
from segue_contract.sync.state import Cursor
from segue_contract.transport.together import end
from segue_contract.v1 import agent_pb2 as pb


class TailSink(Protocol):
    """Who wants to know. May not wait."""

    @property
    def cursor(self) -> Cursor:
        """Up to where it knows the log."""
        ...

    def on_tail(self, tail: Tail) -> None: ...

    def on_lost(self) -> None:
        """The session was deleted, or this device has no access any more: the log says which."""
        ...


class Tails:
    """Asks while there is a sink; `close` ends it."""

    def __init__(
        self, nodes: Nodes, device: str, *, uniform: Callable[[float, float], float] | None = None
    ) -> None:
        self._nodes = nodes
        self._device = device
        # spread: the clients of a broker that died do not all ask, and move, at once
        self._uniform = uniform or Random(os.urandom(8)).uniform
        self._sinks: dict[str, list[TailSink]] = {}
        self._task: asyncio.Task[None] | None = None

    def add(self, session: str, sink: TailSink) -> None:
        self._sinks.setdefault(session, []).append(sink)
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="tails of followed sessions")

    def remove(self, session: str, sink: TailSink) -> None:
        sinks = self._sinks.get(session, [])
        if sink in sinks:
            sinks.remove(sink)
        if not sinks:
            self._sinks.pop(session, None)

    async def close(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            await end(task)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(TAILS_INTERVAL_S * self._uniform(0.8, 1.0))
            sessions = list(self._sinks)
            for start in range(0, len(sessions), MAX_TAILS):
                await self._ask(sessions[start : start + MAX_TAILS])

    async def _ask(self, sessions: list[str]) -> None:
        request = pb.TailsRequest(device=self._device, sessions=sessions)
        sinks = [[(sink, sink.cursor) for sink in self._sinks.get(one, ())] for one in sessions]
        try:
            reply: pb.TailsReply = await self._nodes.unary("Tails", request)
        except (Unauthenticated, PermissionDenied) as error:
            await self._refused(sessions, error)
            return
        except Exception:
            # No node answers, or the app has no token now: then MQTT is all there is, and the next
            # question comes soon.
            return
        self._lose(reply.deleted)
        digests = reply.digests or [b""] * len(reply.tails)
        for asking, tail, digest in zip(sinks, reply.tails, digests, strict=False):
            if tail.generation:
                at = Cursor(tail.generation, tail.offset)
                for sink, known in asking:
                    sink.on_tail(Tail(at, reply.publishing, digest, known))

    async def _refused(self, sessions: list[str], error: SegueError) -> None:
        """Tell those whom it concerns, and no other. A token that is not taken concerns all; what
        it does not cover, or what was revoked, is about one session, and the others are asked
        for without it."""
        whole = isinstance(error, Unauthenticated) and not isinstance(error, Revoked)
        if whole or len(sessions) == 1:
            self._lose(sessions)
            return
        half = len(sessions) // 2
        await self._ask(sessions[:half])
        await self._ask(sessions[half:])

    def _lose(self, sessions: Iterable[str]) -> None:
        for session in sessions:
            for sink in tuple(self._sinks.get(session, ())):
                sink.on_lost()
