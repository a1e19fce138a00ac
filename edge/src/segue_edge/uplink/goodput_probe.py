"""How much to send to learn what a link carries: more and more, until it took long enough. Pure."""

from __future__ import annotations

from segue_contract.limits import PROBE_FIRST_BYTES, PROBE_PAYLOAD_BYTES

_LONG_S = 0.2  # so that errors of clocks and scheduling, some milliseconds, do not matter
_LONG_ROUND_TRIPS = 4.0  # after so many TCP's window is no longer what limits the sending
_GROWTH = 4


def next_payload(sent_bytes: int, seconds: float, rtt_s: float) -> int:
    """Bytes of the next probe after one of `sent_bytes` that took `seconds` (0, 0.0: the first);
    0 where that one has shown the link's goodput."""
    if not sent_bytes:
        return PROBE_FIRST_BYTES
    if sent_bytes >= PROBE_PAYLOAD_BYTES or seconds >= max(_LONG_S, _LONG_ROUND_TRIPS * rtt_s):
        return 0
    return min(_GROWTH * sent_bytes, PROBE_PAYLOAD_BYTES)


def sending_s(elapsed_s: float, rtt_s: float) -> float:
    """Seconds that a probe was on its way up for its size, of those until it was answered.

    Round trips vary, so the difference of two may be next to nothing or less: a quarter of one is
    the least that is believed, which only a far link notices.
    """
    return max(elapsed_s - rtt_s, rtt_s / 4, 1e-6)
