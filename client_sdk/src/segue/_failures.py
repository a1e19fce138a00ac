"""Failed calls of the device API: whether another node may serve them, and how they are told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc

from segue_contract.errors import (
    EngineGone,
    Overloaded,
    Revoked,
    SegueError,
    Unauthenticated,
    Unreachable,
)
from segue_contract.limits import RETRY_PAUSE_MAX_S, RETRY_PAUSE_S
from segue_contract.transport.status import ERROR_KEY, error_from_rpc

_LOST_CODES = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.INTERNAL,  # how gRPC reports a stream that was reset
        grpc.StatusCode.UNKNOWN,
    }
)


def is_link_loss(error: BaseException) -> bool:
    """Whether the call failed on its way, so that another node may serve it.

    A typed error of the node itself is none, except where it says that it cannot reach the cloud.
    """
    if isinstance(error, Unreachable):
        return True
    if isinstance(error, asyncio.CancelledError):
        return True
    if not isinstance(error, grpc.aio.AioRpcError):
        return False
    if is_answer(error):
        return isinstance(error_from_rpc(error), Unreachable)
    return error.code() in _LOST_CODES


def is_answer(error: BaseException | None) -> bool:
    """Whether it is a typed error of the node itself."""
    if not isinstance(error, grpc.aio.AioRpcError):
        return False
    metadata: Any = error.trailing_metadata() or ()
    return any(key == ERROR_KEY for key, _ in metadata)


def client_closed() -> Unreachable:
    """What is told to those who still wait for a client that was closed."""
    return Unreachable("The client is closed.", hint="Open a new segue.Client.")


def is_refusal(error: BaseException) -> bool:
    """Whether the node has no room for now, or no engine any more; another one may."""
    return isinstance(error, Overloaded | EngineGone)


def ran_out(error: BaseException) -> bool:
    """Whether the token is taken no more, and another one may be."""
    return isinstance(error, Unauthenticated) and not isinstance(error, Revoked)


def typed(error: BaseException) -> SegueError:
    """A failed call as an error of the tree."""
    if isinstance(error, SegueError):
        return error
    if isinstance(error, grpc.aio.AioRpcError) and not is_link_loss(error):
        return error_from_rpc(error)
    detail = ""
    if isinstance(error, grpc.aio.AioRpcError):
        found = error_from_rpc(error)
        if isinstance(found, Unreachable):
            return found
        detail = f" ({error.details()})"
    return Unreachable(
        f"The connection broke{detail}.",
        hint="Check that the node is running (`segue doctor`).",
    )


def being_cancelled() -> bool:
    """Whether the running task itself was cancelled.

    grpc.aio raises CancelledError also where the server (not we) cancelled the call.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def pauses() -> Callable[[], float]:
    """Doubling pauses, from `RETRY_PAUSE_S` to `RETRY_PAUSE_MAX_S`."""
    pause = RETRY_PAUSE_S / 2

    def next_pause() -> float:
        nonlocal pause
        pause = min(pause * 2, RETRY_PAUSE_MAX_S)
        return pause

    return next_pause
