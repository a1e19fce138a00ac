"""Which matrices lose most by W8A8: found by measuring, and only where the target is missed.

A group is one projection over a quarter of the layers. Each group by itself is left heavier (its
activations are then quantised in blocks of 32 channels instead of whole rows, at half the speed)
and the loss is measured; then groups join in the order of their gain until the target is met.
KL orders them: it is smooth where the agreement of a few windows moves in steps.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from segue_contract.model.manifest import Quality

SPANS = 4  # parts of the depth: finer ones cost more builds than what they find is worth
_LAYER = re.compile(r"/layers\.(\d+)/(?:\w+/)*(\w+)/MatMul$")

# Quality of the prefill graph with the named matrices left heavier.
Measure = Callable[[frozenset[str]], Quality]


@dataclass(frozen=True)
class Group:
    """`names`: of MatMul nodes."""

    title: str
    names: frozenset[str]


@dataclass(frozen=True)
class Found:
    """`heavier`: names of MatMul nodes, empty where nothing was searched; `measured`: how often."""

    heavier: frozenset[str]
    quality: Quality
    measured: int
    titles: tuple[str, ...] = ()


def groups_of(names: Collection[str], layers: int) -> list[Group]:
    """Layers' matrices by projection and quarter, in order; other names (the head) are left out."""
    members: dict[tuple[int, str], set[str]] = {}
    for name in names:
        match = _LAYER.search(name)
        if match is not None:
            span = int(match[1]) * min(SPANS, layers) // layers
            members.setdefault((span, match[2]), set()).add(name)
    return [
        Group(f"{projection} of part {span + 1}", frozenset(found))
        for (span, projection), found in sorted(members.items())
    ]


def search(groups: Sequence[Group], measure: Measure, target: float) -> Found:
    """The fewest groups, most sensitive first, that reach an agreement of `target`.

    Where even all of them together miss it, the best that was measured.
    """
    best = Found(frozenset(), measure(frozenset()), 1)
    if best.quality.agreement >= target:
        return best
    count = 1
    alone: list[tuple[float, int]] = []
    for index, group in enumerate(groups):
        alone.append((measure(group.names).mean_kl, index))
        count += 1
    heavier: frozenset[str] = frozenset()
    titles: tuple[str, ...] = ()
    for _, index in sorted(alone):
        heavier |= groups[index].names
        titles += (groups[index].title,)
        quality = measure(heavier)
        count += 1
        if quality.agreement > best.quality.agreement:
            best = Found(heavier, quality, count, titles)
        if quality.agreement >= target:
            break
    return Found(best.heavier, best.quality, count, best.titles)


def suffix(heavier: Collection[str]) -> str:
    """Part of a quantisation's name: KV of other choices is other KV."""
    if not heavier:
        return ""
    return "-h" + hashlib.sha256("\n".join(sorted(heavier)).encode()).hexdigest()[:8]
