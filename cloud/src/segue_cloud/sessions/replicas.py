"""Waiting until replicas have what was written (WAIT), for what a fail-over must not lose.

A primary acknowledges a write before its replicas have it. Where a turn begins, is taken over,
renewed or ended, the store is asked to wait for them, a moment and no longer; what came of it is
counted. Only `?wait=strict` makes an error of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import structlog
from redis.exceptions import ResponseError

from segue_cloud.sessions.scripts import Command
from segue_contract.store_url import WaitPolicy

log = structlog.get_logger("segue.sessions")

CONFIRMED, SHORT, NONE = "confirmed", "short", "none"


class ReplicaWaits:
    """Attributes:
    counts: of waits that replicas confirmed; that came up short; and of writes to a store that
        has no replica.
    """

    def __init__(self, policy: WaitPolicy) -> None:
        self._policy = policy
        self._counts = Counter({CONFIRMED: 0, SHORT: 0, NONE: 0})
        self._warned = False

    @property
    def counts(self) -> Mapping[str, int]:
        return self._counts

    def command(self, connected: int) -> Command | None:
        """To send behind the write; None where there is nothing to wait for."""
        wanted = min(self._policy.replicas, connected)
        return ("WAIT", wanted, self._policy.timeout_ms) if wanted else None

    def judge(self, reply: Any = None) -> None:
        """Of the reply to `command`; None where there was none.

        Raises:
            ResponseError: too few replicas have the write, and the policy is strict.
        """
        wanted = self._policy.replicas
        if not wanted:
            return
        confirmed = reply if isinstance(reply, int) else 0
        if confirmed >= wanted:
            self._counts[CONFIRMED] += 1
            return
        self._counts[NONE if reply is None else SHORT] += 1
        if self._policy.strict:
            raise ResponseError(f"NOREPLICAS {confirmed} of {wanted} replicas have the write")
        if reply is not None and not self._warned:
            self._warned = True
            log.warning(
                "replicas_behind",
                confirmed=confirmed,
                wanted=wanted,
                wait_ms=self._policy.timeout_ms,
                error=str(reply) if isinstance(reply, ResponseError) else "",
                hint="A fail-over now would lose what was acknowledged. Not said again; counted.",
            )
