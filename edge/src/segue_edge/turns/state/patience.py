"""How long a turn has been without a cloud, and what follows from that."""

from __future__ import annotations

from segue_contract.limits import EdgeTurnLimits


class Patience:
    """Counts from the turn's beginning, and from the loss of its cloud. Times in seconds."""

    def __init__(self, limits: EdgeTurnLimits) -> None:
        self._limits = limits
        self._begun_at = 0.0
        self._lost_at: float | None = None
        self._pause_s = limits.pause_s

    def begin(self, now: float) -> None:
        self._begun_at = now

    def lost(self, now: float) -> None:
        """No cloud serves the turn; the first such moment counts."""
        if self._lost_at is None:
            self._lost_at = now

    def served(self) -> None:
        """A cloud brought the turn on."""
        self._lost_at, self._pause_s = None, self._limits.pause_s

    def was_served(self, opened_at: float, now: float) -> None:
        """A cloud answered for the turn at `opened_at`, and is gone."""
        if now - opened_at > self._limits.retry_s:
            self._lost_at = None

    def over(self, now: float) -> bool:
        """After another pause the turn would have been without a cloud for too long."""
        lost_s = now - self._lost_at if self._lost_at is not None else 0.0
        return lost_s + self._pause_s > self._limits.retry_s

    def expired(self, now: float) -> bool:
        return now - self._begun_at > self._limits.timeout_s

    def pause(self) -> float:
        """How long to wait before the next round; each is twice as long, up to a bound."""
        pause_s = self._pause_s
        self._pause_s = min(2 * pause_s, self._limits.pause_max_s)
        return pause_s
