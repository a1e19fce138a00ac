"""Whether what comes over MQTT is of a cloud of this session: the follower's side of the key."""

from __future__ import annotations

import math

from segue_contract.errors import InvalidArgument
from segue_contract.limits import TAILS_INTERVAL_S
from segue_contract.topics import unseal


class Seal:
    """The key of one session, of one generation of its log.

    Attributes:
        unauthentic: messages that it did not open.
    """

    def __init__(self, key: bytes, generation: int) -> None:
        self._key = key
        self._generation = generation
        self._doubted = False
        self._doubted_at = -math.inf
        self.unauthentic = 0

    def open(self, topic: str, payload: bytes) -> bytes | None:
        """The body of what a cloud published; None: somebody else's bytes."""
        try:
            return unseal(self._key, topic, payload)
        except InvalidArgument:
            self.unauthentic += 1
            return None

    def doubt(self, now: float) -> bool:
        """Something was not authentic: it may stand in the place of what was, or the key is another
        one by now. Whether to ask the log: a flood asks no more often than tails are."""
        if now - self._doubted_at < TAILS_INTERVAL_S:
            return False
        self._doubted_at, self._doubted = now, True
        return True

    def outdated(self, generation: int) -> bool:
        """Whether to ask for the key, where the log's generation is `generation`."""
        return self._doubted or generation != self._generation

    def renew(self, key: bytes, generation: int) -> None:
        self._key, self._generation, self._doubted = key, generation, False
