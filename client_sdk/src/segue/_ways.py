"""Which ways bring a follower its news, and whether it needs a gRPC stream of its own now. Pure.

A stream costs its node two heartbeats a second, also where nothing is said. Where the log's tail is
asked for anyway, a session that nobody uses does without one: its next entry shows in the tail.
"""

from __future__ import annotations

from dataclasses import dataclass

from segue_contract.limits import TAILS_INTERVAL_S

_UNHEARD_S = 3 * TAILS_INTERVAL_S  # tails that are silent for so long watch nothing


@dataclass
class Ways:
    """Times are seconds of a monotonic clock.

    `tails`: the log's tail is asked for, and was answered at `heard_at` last. `news_at`: when an
    entry came last, or the following began. `mqtt`: the broker brings what is new.
    `use_s`: so long after its last news a session counts as in use.
    """

    use_s: float
    news_at: float
    heard_at: float
    tails: bool = False
    mqtt: bool = False

    def watched(self, now: float) -> bool:
        """The tail would show whatever else brings nothing."""
        return self.tails and now - self.heard_at < _UNHEARD_S

    def in_use(self, now: float) -> bool:
        """News should come at once, not with the next tail."""
        return now - self.news_at < self.use_s

    def needs_stream(self, now: float) -> bool:
        return not self.mqtt and (self.in_use(now) or not self.watched(now))

    def spares_stream(self, now: float) -> bool:
        """One that is open may go."""
        return self.watched(now) and not self.in_use(now)

    def look_s(self, now: float, *, streams: bool) -> float | None:
        """Seconds until one of these answers may have changed; None: not without news."""
        if not self.tails or (self.mqtt and not streams):
            return None
        if streams and self.in_use(now):
            return self.news_at + self.use_s - now
        if streams:
            return TAILS_INTERVAL_S
        return max(0.0, self.heard_at + _UNHEARD_S - now)
