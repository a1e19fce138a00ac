"""Which cloud instance a session goes to, without a master: rendezvous hashing with bounded loads.

Each session has its own order of the clouds (highest random weight, Thaler and Ravishankar), so a
lost cloud moves only its own sessions. A cloud that has more than `BOUND` times its share of the
turns is passed over for the next in that order (Mirrokni, Thorup and Zadimoghaddam, "Consistent
Hashing with Bounded Loads", 2018). A session stays where its KV lies. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from segue_contract.ids import digest

# Times the mean: the nearer to 1, the evener, and the more sessions go elsewhere than their order
# says. Of 1.25, a cloud with its fair share is passed over only where chance was far from even.
BOUND: Final = 1.25
_LIGHT_S = 0.5  # a wait that is longer by no more than this is no reason to go elsewhere


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What is known of one cloud as a turn is placed.

    `turns` of `places` are taken, or as many as its KV in use amounts to; 0 places: it did not say.
    `full`: it refused lately. `wait_s`: before a turn's prompt is computed there. `again_s`: to
    compute there what the session's own cloud has in its cache.
    """

    healthy: bool = True
    full: bool = False
    turns: int = 0
    places: int = 0
    wait_s: float = 0.0
    again_s: float = 0.0

    @property
    def open(self) -> bool:
        return self.healthy and not self.full


def rank(session: str, clouds: Mapping[str, Standing], home: str = "") -> list[str]:
    """All clouds by name, the best for `session` first.

    1. `home`, where the session's KV lies, unless the wait there is longer than the wait and the
       computing elsewhere;
    2. those within the bound, whose wait is not much longer than the shortest;
    3. the others that take turns; 4. full ones; 5. those that do not answer. Within each group by
       the session's own order.
    """
    takes = {name: one for name, one in clouds.items() if one.open}
    shortest_s = min((one.wait_s for one in takes.values()), default=0.0)
    others_s = min(
        (one.wait_s + one.again_s for name, one in takes.items() if name != home),
        default=math.inf,
    )
    most = _most_turns(takes)

    def group(name: str) -> int:
        one = clouds[name]
        if not one.healthy:
            return 5
        if one.full:
            return 4
        if name == home and one.wait_s <= others_s + _LIGHT_S:
            return 1
        bounded = not one.places or one.turns < most[name]
        return 2 if bounded and one.wait_s <= shortest_s + _LIGHT_S else 3

    return sorted(clouds, key=lambda name: (group(name), -_drawn(session, name)))


def _most_turns(takes: Mapping[str, Standing]) -> dict[str, int]:
    """How many turns each cloud may have once one more is placed: `BOUND` times its share. Together
    that is more than there are, so some cloud is always below."""
    told = {name: one for name, one in takes.items() if one.places}
    turns = 1 + sum(one.turns for one in told.values())
    places = sum(one.places for one in told.values())
    return {name: math.ceil(BOUND * turns * one.places / places) for name, one in told.items()}


def _drawn(session: str, name: str) -> int:
    return int.from_bytes(digest(session.encode(), name.encode())[:8])
