"""Which cloud instance a session goes to, without a master: highest random weight. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from segue_contract.ids import digest


def rank(session: str, targets: Iterable[str], healthy: Iterable[str] = ()) -> list[str]:
    """All targets, the best for `session` first.

    Every edge ranks alike, a lost target moves only its own sessions, and the healthy ones come
    before the others, each group in its own order.

    Args:
        healthy: those that answered lately; with none given, all count as healthy.
    """
    known = list(dict.fromkeys(targets))
    up = set(healthy) or set(known)

    def weight(target: str) -> tuple[bool, bytes]:
        return target in up, digest(session.encode(), target.encode())

    return sorted(known, key=weight, reverse=True)
