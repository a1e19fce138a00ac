"""Parts of a local stack that end by themselves are started again, within reason."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import NoReturn

from segue.local.parts import Part
from segue.local.stack import LocalStack
from segue_contract.limits import RESTART_WINDOW_S, RESTARTS


class Restarts:
    """How often a part may be started again: `most` times within `window_s`.

    A part that ends each time it is started has a cause that another start does not mend.
    """

    def __init__(self, most: int = RESTARTS, window_s: float = RESTART_WINDOW_S) -> None:
        self._window_s = window_s
        self._at: deque[float] = deque(maxlen=most)
        self._most = most

    def allow(self, now: float) -> bool:
        """Whether one more start is within the bound; it counts where it is. `now`: seconds."""
        if len(self._at) == self._most and now - self._at[0] < self._window_s:
            return False
        self._at.append(now)
        return True


async def keep_up(stack: LocalStack, on_end: Callable[[Part], None]) -> NoReturn:
    """Start each part again that ends by itself, until cancelled.

    Args:
        on_end: told each part that ended and is started again; the stack's `on_started` follows.

    Raises:
        StartFailed: a part ends too often, or does not start again; its last lines are in the hint.
    """
    counts: dict[str, Restarts] = {}
    while True:
        part = await stack.wait_crash()
        if not counts.setdefault(part.name, Restarts()).allow(time.monotonic()):
            raise stack.crash_error(part)
        on_end(part)
        await stack.revive(part)
