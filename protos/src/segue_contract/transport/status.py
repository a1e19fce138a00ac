"""The one place where the error tree meets gRPC status."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, NoReturn, cast

import grpc

from segue_contract.errors import (
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    NotFound,
    Overloaded,
    PermissionDenied,
    SegueError,
    Unauthenticated,
    Unreachable,
    shorten,
)
from segue_contract.transport.handlers import around
from segue_contract.transport.tls_reasons import explain

# What gRPC says of a peer that ends a connection before it was one: it does not say why.
_CLOSED_AT_ONCE = "Socket closed"
# Binary trailing metadata that carries SegueError.to_bytes().
ERROR_KEY = "segue-error-bin"
_MAX_DETAIL_BYTES = 500  # each may take three in a header

# For peers that send a bare status: a proxy, or gRPC itself.
_BARE: dict[grpc.StatusCode, type[SegueError]] = {
    grpc.StatusCode.UNAVAILABLE: Unreachable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.CANCELLED: Unreachable,
    # a stream that was reset, or a write that failed as its stream broke: gRPC then says so instead
    # of the peer's status. An internal error of a node of ours is typed.
    grpc.StatusCode.INTERNAL: Unreachable,
}

# What gRPC itself says of a message beyond the bound: no lack of room, and no use in trying again.
_TOO_LARGE = "message larger than max"
_ASKED_TOO_MUCH = ("CLIENT: Sent", "SERVER: Received")


def status_code(error: SegueError) -> grpc.StatusCode:
    return grpc.StatusCode[error.grpc_code]


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: SegueError) -> NoReturn:
    """End the call with the error's status, its text, and itself in the trailing metadata."""
    await context.abort(
        status_code(error),
        shorten(str(error), _MAX_DETAIL_BYTES),
        trailing_metadata=((ERROR_KEY, error.to_bytes()),),
    )
    raise AssertionError("abort returned")


def error_from_rpc(error: grpc.aio.AioRpcError) -> SegueError:
    """The typed error behind a failed call."""
    metadata = cast("Iterable[tuple[str, str | bytes]]", error.trailing_metadata() or ())
    for key, value in metadata:
        if key == ERROR_KEY and isinstance(value, bytes):
            return SegueError.from_bytes(value)
    code = error.code()
    cls = _BARE.get(code, Internal)
    detail = error.details() or code.name
    if _TOO_LARGE in detail:
        cls = InvalidArgument if detail.startswith(_ASKED_TOO_MUCH) else Internal
    if code is grpc.StatusCode.UNAVAILABLE and (reason := explain(detail)) is not None:
        return Unreachable(f"{reason.message} ({detail})", hint=reason.hint)
    hint = {
        Unreachable: "Check that the address is right and the node is running (`segue doctor`).",
        DeadlineExceeded: "The node is slow or stuck; try again.",
    }.get(cls, "")
    if _closed_at_once(detail):
        hint = (
            "It ends new connections at once: it may want TLS (SEGUE_CA, --tls-ca), or a client "
            "certificate. `segue doctor` says which."
        )
    return cls(f"The call failed: {detail}.", hint=hint)


def concerns_tls(detail: str) -> bool:
    """Whether a connection failed, or may have, for its certificates."""
    return explain(detail) is not None or _closed_at_once(detail)


def _closed_at_once(detail: str) -> bool:
    return detail.startswith("failed to connect") and detail.endswith(_CLOSED_AT_ONCE)


def as_segue_error(error: BaseException) -> SegueError:
    """Any failure as one of ours: what was raised, a mapped gRPC error, or `Internal`."""
    if isinstance(error, SegueError):
        return error
    if isinstance(error, grpc.aio.AioRpcError):
        return error_from_rpc(error)
    if isinstance(error, TimeoutError):
        return DeadlineExceeded("It took longer than its bound.", hint="Try again.")
    return Internal(f"An unexpected {type(error).__name__} happened.", hint="See the node's log.")


class ErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Turns what a handler raises into a status; what is no SegueError is logged and hidden."""

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler: Any = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        if handler is None:
            return cast("grpc.RpcMethodHandler[Any, Any]", handler)
        return around(
            handler,
            lambda inner: _guard_unary(inner, method),
            lambda inner: _guard_stream(inner, method),
        )


async def _fail(context: Any, method: str, error: Exception) -> NoReturn:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    known = as_segue_error(error)
    if isinstance(known, Internal):
        # only nodes get here: the client SDK maps errors too, and does without structlog
        import structlog

        log = structlog.get_logger("segue.rpc")
        log.error("rpc_failed", method=method, exc_info=error)
    await abort(context, known)


def _stopped(error: asyncio.CancelledError) -> Unreachable:
    """A call that this one made was cancelled, by its other side or by gRPC: for a handler's own
    CancelledError gRPC sends no status at all, and the caller would wait for its deadline.

    Raises:
        CancelledError: this call itself was cancelled.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise error
    return Unreachable("What the node asked another one for was cancelled.", hint="Try again.")


def _guard_unary(inner: Callable[[Any, Any], Awaitable[Any]], method: str) -> Any:
    async def call(request: Any, context: Any) -> Any:
        try:
            return await inner(request, context)
        except asyncio.CancelledError as error:
            await _fail(context, method, _stopped(error))
        except Exception as error:
            await _fail(context, method, error)

    return call


def _guard_stream(inner: Callable[[Any, Any], AsyncIterator[Any]], method: str) -> Any:
    async def call(request: Any, context: Any) -> AsyncIterator[Any]:
        stream = inner(request, context)
        try:
            async for item in stream:
                yield item
        except asyncio.CancelledError as error:
            await _fail(context, method, _stopped(error))
        except Exception as error:
            await _fail(context, method, error)
        finally:
            if inspect.isasyncgen(stream):
                await stream.aclose()

    return call
