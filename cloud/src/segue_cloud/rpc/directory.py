"""The edges that asked this instance for its facts lately, for devices that look for one. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from segue_contract.limits import EDGE_UNHEARD_S, MAX_EDGES


@dataclass(frozen=True, slots=True)
class KnownEdge:
    """`url`: where devices reach it. `name`: by its certificate; "": it has none."""

    url: str
    name: str
    heard_at: float


class EdgeDirectory:
    """One address for each certificate; times are seconds of a monotonic clock."""

    def __init__(self, most: int = MAX_EDGES) -> None:
        self._most = most
        self._edges: dict[tuple[str, str], KnownEdge] = {}

    def heard(self, url: str, name: str, now: float) -> None:
        """An edge asked. "": it is not to be told of (any more)."""
        key = (name, "") if name else ("", url)
        self._edges.pop(key, None)  # so that the order is that of hearing
        if not url:
            return
        self._edges[key] = KnownEdge(url, name, now)
        if len(self._edges) > self._most:
            del self._edges[next(iter(self._edges))]  # the one that was heard of longest ago

    def edges(self, now: float) -> list[KnownEdge]:
        """By address."""
        known = (one for one in self._edges.values() if now - one.heard_at < EDGE_UNHEARD_S)
        return sorted(known, key=lambda one: (one.url, one.name))
