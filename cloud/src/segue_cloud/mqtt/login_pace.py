"""How often logins at the broker are made anew: each is some writes of its file, in its one thread.
Pure."""

from __future__ import annotations

import math
from collections import OrderedDict

from segue_contract.bucket import Bucket
from segue_contract.limits import (
    BROKER_LOGIN_AGAIN_S,
    BROKER_LOGINS,
    BROKER_LOGINS_BURST,
    BROKER_LOGINS_OF_DEVICE,
    BROKER_LOGINS_PER_S,
)


class LoginPace:
    """Of one instance. A device may make as many at once as it may have, then one in
    `BROKER_LOGIN_AGAIN_S`. It is (its tenant, its name); the clock never goes back."""

    def __init__(self) -> None:
        burst_s = BROKER_LOGINS_BURST / BROKER_LOGINS_PER_S
        self._all = Bucket(BROKER_LOGINS_PER_S, burst_s, -math.inf)
        self._devices: OrderedDict[tuple[str, str], Bucket] = OrderedDict()

    def allows(self, device: tuple[str, str], now_s: float) -> bool:
        """Whether a login may be made now."""
        return not any(one.wait_s(1, now_s) for one in (self._all, self._of(device, now_s)))

    def made(self, device: tuple[str, str], now_s: float) -> None:
        one = self._devices[device] = self._of(device, now_s)
        for bucket in (self._all, one):
            bucket.take(1, now_s)
        self._devices.move_to_end(device)
        if len(self._devices) > BROKER_LOGINS:
            self._devices.popitem(last=False)

    def _of(self, device: tuple[str, str], now_s: float) -> Bucket:
        burst_s = BROKER_LOGINS_OF_DEVICE * BROKER_LOGIN_AGAIN_S
        return self._devices.get(device) or Bucket(1 / BROKER_LOGIN_AGAIN_S, burst_s, now_s)
