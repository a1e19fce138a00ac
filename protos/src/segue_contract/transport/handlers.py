"""One way to put something around what serves a call, whatever kind of call it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc


def around(
    handler: Any, unary: Callable[[Any], Any], stream: Callable[[Any], Any]
) -> grpc.RpcMethodHandler[Any, Any]:
    """The same method, served by what `unary`, or `stream` for one that streams its replies, makes
    of its behaviour: a function of request, or requests, and context."""
    common = {
        "request_deserializer": handler.request_deserializer,
        "response_serializer": handler.response_serializer,
    }
    wrapped: Any
    if handler.unary_unary:
        wrapped = grpc.unary_unary_rpc_method_handler(unary(handler.unary_unary), **common)
    elif handler.unary_stream:
        wrapped = grpc.unary_stream_rpc_method_handler(stream(handler.unary_stream), **common)
    elif handler.stream_unary:
        wrapped = grpc.stream_unary_rpc_method_handler(unary(handler.stream_unary), **common)
    else:
        wrapped = grpc.stream_stream_rpc_method_handler(stream(handler.stream_stream), **common)
    return wrapped  # type: ignore[no-any-return]
