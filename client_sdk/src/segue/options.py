"""How long a call may take and how often it is repeated: per client, copy of it, turn. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from segue_contract.errors import DeadlineExceeded, InvalidArgument, SegueError
from segue_contract.limits import MAX_RETRIES, RETRY_AFTER_MAX_S


@dataclass(frozen=True, slots=True)
class Timeout:
    """Seconds; None: as long as usual. What passes raises DeadlineExceeded, whose fields say which
    (`timeout`) and how much it was (`limit_s`).

    A turn runs on when one of them has passed: iterate on, or run it again by its id, to see the
    rest; `stop` ends it. `first_token` and `total` are told once of a turn.

    Attributes:
        connect: to one address, before the next one is tried; then it is Unreachable.
        first_token: from the call of `run` to the reply's first token.
        idle: a wait for the reply's next event, once it has a token.
        total: all of a call, repetitions included; of a turn, from the call of `run` to its end.

    Raises:
        InvalidArgument: no number above 0.
    """

    connect: float | None = None
    first_token: float | None = None
    idle: float | None = None
    total: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not (0 < value < math.inf):
                raise InvalidArgument(
                    f"The timeout {field.name} is {value}.", hint="Use seconds above 0, or None."
                )


@dataclass(frozen=True, slots=True)
class Options:
    """`max_retries` None: for some seconds, where a session is open already."""

    timeout: Timeout = Timeout()
    max_retries: int | None = None

    def changed(self, timeout: Timeout | float | None, max_retries: int | None) -> Options:
        """With what is given; None leaves what there is.

        Raises:
            InvalidArgument: a number that is out of range.
        """
        if isinstance(timeout, int | float):
            timeout = Timeout(total=timeout)
        if max_retries is not None and not 0 <= max_retries <= MAX_RETRIES:
            raise InvalidArgument(f"max_retries is {max_retries}.", hint=f"Use 0 to {MAX_RETRIES}.")
        return Options(
            self.timeout if timeout is None else timeout,
            self.max_retries if max_retries is None else max_retries,
        )

    def may_repeat(self, error: SegueError, retries: int) -> bool:
        """Whether the same call may be made again after `error`, and after so many repetitions.

        One that asks for more patience than `RETRY_AFTER_MAX_S` is told at once.
        """
        passes = error.retryable or error.retry_after_s is not None
        soon = (error.retry_after_s or 0.0) <= RETRY_AFTER_MAX_S
        return passes and soon and retries < (self.max_retries or 0)


def passed(timeout: str, limit_s: float, what: str, hint: str) -> DeadlineExceeded:
    """`timeout`: which one, by its name in `Timeout`."""
    return DeadlineExceeded(
        f"{what} within {limit_s:g} s (timeout: {timeout}).",
        hint=hint,
        timeout=timeout,
        limit_s=limit_s,
    )
