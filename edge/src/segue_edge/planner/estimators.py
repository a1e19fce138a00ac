"""Online estimates of link and speeds. Pure: observations in, values out; no clock.

A median over a short window holds against single outliers and forgets old conditions; before any
observation a prior stands in. Confidence grows as n / (n + 2), 0 before the first observation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from statistics import median

WINDOW = 15  # observations that count: about the last dozen turns or chunks
# A sample of fewer bytes measures latency and buffers, not goodput.
MIN_GOODPUT_BYTES = 128 * 1024


class Estimate:
    """A windowed estimate with a prior.

    Args:
        prior: the value before any observation.
        pick: how the window becomes one value; the median by default.
    """

    def __init__(
        self,
        prior: float,
        *,
        window: int = WINDOW,
        pick: Callable[[deque[float]], float] = median,
    ) -> None:
        if not prior > 0:
            raise ValueError(f"a prior must be above 0, not {prior}")
        self._prior = prior
        self._seen: deque[float] = deque(maxlen=window)
        self._pick = pick

    def observe(self, value: float) -> None:
        """Take one measurement; what is not above 0 (a clock's granularity) is left out."""
        if 0 < value < float("inf"):
            self._seen.append(value)

    def set_prior(self, value: float) -> None:
        if value > 0:
            self._prior = value

    @property
    def value(self) -> float:
        return float(self._pick(self._seen)) if self._seen else self._prior

    @property
    def confidence(self) -> float:
        return len(self._seen) / (len(self._seen) + 2)


class RoundTrip(Estimate):
    """Round trip of the link, seconds: the least of the window.

    Every sample holds the server's own work as well, so the smallest is the nearest to the link.
    """

    def __init__(self, prior: float = 0.005) -> None:
        super().__init__(prior, pick=min)


class Goodput:
    """Bytes a second that the link carries.

    A stream that waited for the prefill (`app_limited`) shows what was offered, not what would
    fit: such a sample can raise the estimate and never lowers it (the rule of BBR).
    """

    def __init__(self, prior_bytes_per_s: float) -> None:
        self._estimate = Estimate(prior_bytes_per_s, window=9)

    def observe(self, sent_bytes: int, seconds: float, *, app_limited: bool) -> None:
        if sent_bytes < MIN_GOODPUT_BYTES or seconds <= 0:
            return
        rate = sent_bytes / seconds
        if app_limited and rate <= self._estimate.value:
            return
        self._estimate.observe(rate)

    @property
    def bytes_per_s(self) -> float:
        return self._estimate.value

    @property
    def confidence(self) -> float:
        return self._estimate.confidence


class ReplyLength:
    """Expected reply tokens: an exponential average, never above what the caller allows."""

    def __init__(self, prior: float = 128.0, weight: float = 0.25) -> None:
        self._mean = prior
        self._weight = weight

    def observe(self, tokens: int) -> None:
        if tokens > 0:
            self._mean += self._weight * (tokens - self._mean)

    def expect(self, max_tokens: int) -> float:
        return max(1.0, min(self._mean, float(max_tokens)))


class EdgeSpeeds:
    """What this node can do: prefill rate (tokens/s), decode step (s), KV bytes per token."""

    def __init__(self, kv_bytes_per_token: float) -> None:
        self.prefill_tokens_per_s = Estimate(1000.0)
        self.decode_step_s = Estimate(0.02)
        self.kv_bytes_per_token = Estimate(kv_bytes_per_token)
        self.reply = ReplyLength()


class CloudView:
    """What this node knows of one cloud instance: the link to it, and its last own facts."""

    def __init__(self) -> None:
        self.rtt_s = RoundTrip()
        self.goodput = Goodput(12.5e6)  # 100 Mbps until measured: no one ships blindly
        self.prefill_tokens_per_s = Estimate(800.0)
        self.decode_step_s = Estimate(0.03)
        self.queue_s = 0.0

    def observe_facts(
        self, *, queue_s: float, prefill_tokens_per_s: float, decode_step_s: float
    ) -> None:
        """The cloud's own measurements; 0 where it has none yet."""
        self.queue_s = max(0.0, queue_s)
        self.prefill_tokens_per_s.observe(prefill_tokens_per_s)
        self.decode_step_s.observe(decode_step_s)
