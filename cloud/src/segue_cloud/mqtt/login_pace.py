"""How often logins at the broker are made anew: each is some writes of its file, in its one thread.
Pure."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

from segue_contract.limits import (
    BROKER_LOGIN_AGAIN_S,
    BROKER_LOGINS,
    BROKER_LOGINS_BURST,
    BROKER_LOGINS_OF_DEVICE,
    BROKER_LOGINS_PER_S,
)


@dataclass(slots=True)
class _Left:
    left: float
    at_s: float

    def now(self, most: float, per_s: float, now_s: float) -> float:
        return min(most, self.left + max(0.0, now_s - self.at_s) * per_s)


class LoginPace:
    """Of one instance. A device may make as many at once as it may have, then one in
    `BROKER_LOGIN_AGAIN_S`. It is (its tenant, its name); times are seconds."""

    def __init__(self) -> None:
        self._all = _Left(BROKER_LOGINS_BURST, -math.inf)
        self._devices: OrderedDict[tuple[str, str], _Left] = OrderedDict()

    def allows(self, device: tuple[str, str], now_s: float) -> bool:
        """Whether a login may be made now."""
        return min(self._left_of_all(now_s), self._left_of(device, now_s)) >= 1

    def made(self, device: tuple[str, str], now_s: float) -> None:
        self._all = _Left(self._left_of_all(now_s) - 1, now_s)
        self._devices[device] = _Left(self._left_of(device, now_s) - 1, now_s)
        self._devices.move_to_end(device)
        if len(self._devices) > BROKER_LOGINS:
            self._devices.popitem(last=False)

    def _left_of_all(self, now_s: float) -> float:
        return self._all.now(BROKER_LOGINS_BURST, BROKER_LOGINS_PER_S, now_s)

    def _left_of(self, device: tuple[str, str], now_s: float) -> float:
        most = float(BROKER_LOGINS_OF_DEVICE)
        one = self._devices.get(device)
        return most if one is None else one.now(most, 1 / BROKER_LOGIN_AGAIN_S, now_s)
