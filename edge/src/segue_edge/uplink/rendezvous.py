"""Which cloud instance a session goes to, without a master: weighted rendezvous hashing. Pure.

Each target draws a score from the session's and its own name, and the highest wins
(`-weight / ln(u)`, Schindler and Thaler's weighted highest random weight): a target gets sessions
in proportion to its weight, and a change of one weight moves only sessions to or from that target.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from segue_contract.ids import digest

_LIGHT_S = 0.5  # a queue below this is no reason to leave a cloud that holds the session's KV


def rank(
    session: str,
    targets: Iterable[str],
    healthy: Iterable[str] = (),
    loads: Mapping[str, float] | None = None,
) -> list[str]:
    """All targets, the best for `session` first.

    Every edge that sees the same loads ranks alike, a lost target moves only its own sessions, and
    the healthy ones come before the others, each group in its own order.

    Args:
        healthy: those that answered lately; with none given, all count as healthy.
        loads: seconds of queue by target. Each doubling beyond half a second halves the weight:
            steps, so that a queue that varies a little moves nobody.
    """
    known = list(dict.fromkeys(targets))
    up = set(healthy) or set(known)
    queues = loads or {}

    def score(target: str) -> tuple[bool, float]:
        drawn = int.from_bytes(digest(session.encode(), target.encode())[:7]) + 1
        weight = 0.5 ** max(0, math.floor(math.log2(max(queues.get(target, 0.0), 1e-9) / _LIGHT_S)))
        return target in up, weight / -math.log(drawn / (2.0**56 + 2))

    return sorted(known, key=score, reverse=True)
