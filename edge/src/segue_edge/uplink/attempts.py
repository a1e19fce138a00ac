"""A call at the session's cloud, or at the next one that takes it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from segue_contract.errors import SegueError, SessionBusy, Unreachable
from segue_edge.uplink.clouds import Cloud, CloudSet

T = TypeVar("T")


async def at_some_cloud(
    clouds: CloudSet,
    session: str,
    call: Callable[[Cloud], Awaitable[T]],
    *,
    final: tuple[type[SegueError], ...] = (SessionBusy,),
) -> T:
    """What the first cloud answers that can be reached and does not refuse for now.

    Args:
        call: idempotent; raises typed errors.
        final: retryable errors that say the same everywhere, so that no other cloud is asked.

    Raises:
        SegueError: a refusal for good, or the first one for now where all refuse.
        Unreachable: no cloud can be reached.
    """
    refused: SegueError | None = None
    lost: SegueError = Unreachable(
        "This edge has no cloud.", hint="Start it with --cloud HOST:PORT.", cloud=""
    )
    for cloud in clouds.ranked(session):
        try:
            await cloud.reach()
            return await call(cloud)
        except Unreachable as error:
            cloud.failed(error)
            lost = error
        except SegueError as error:
            if not error.retryable or isinstance(error, final):
                raise
            cloud.refused(error)
            refused = refused or error
    raise refused or lost
