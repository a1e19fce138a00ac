"""A call at the session's cloud, or at the next one that takes it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from segue_contract.errors import SegueError, SessionBusy, Unreachable
from segue_contract.ids import SessionName
from segue_contract.limits import PROBE_TIMEOUT_S, SILENCE_S
from segue_contract.transport.heartbeat import answered
from segue_edge.uplink.clouds import Cloud, CloudSet

T = TypeVar("T")


async def at_some_cloud(
    clouds: CloudSet,
    session: SessionName,
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
    # Where there is no other cloud, nothing is won by giving this one up early.
    silence_s = SILENCE_S if len(clouds.clouds) > 1 else 2 * PROBE_TIMEOUT_S
    refused: SegueError | None = None
    lost: SegueError = Unreachable(
        "This edge has no cloud.", hint="Start it with --cloud HOST:PORT.", cloud=""
    )
    for cloud in clouds.ranked(session):
        try:
            await cloud.reach()
            return await answered(call(cloud), cloud.sign_of_life, silence_s=silence_s)
        except Unreachable as error:
            cloud.failed(error)
            lost = error
        except SegueError as error:
            if not error.retryable or isinstance(error, final):
                raise
            cloud.refused(error)
            refused = refused or error
    raise refused or lost
