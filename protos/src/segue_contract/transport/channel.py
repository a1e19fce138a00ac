"""One way to open a gRPC channel. gRPC sets TCP_NODELAY on its sockets itself."""

from __future__ import annotations

import grpc

from segue_contract.errors import InvalidArgument
from segue_contract.limits import (
    CONNECT_ATTEMPT_S,
    MAX_GRPC_MESSAGE_BYTES,
    PING_INTERVAL_S,
    PING_TIMEOUT_S,
)

_OPTIONS = (
    ("grpc.max_send_message_length", MAX_GRPC_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_GRPC_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", int(PING_INTERVAL_S * 1000)),
    ("grpc.keepalive_timeout_ms", int(PING_TIMEOUT_S * 1000)),
    # While bytes flow gRPC's ping for the bandwidth is nearly always under way and the keep-alive
    # waits for it: without this a peer that fell silent is noticed after a minute.
    ("grpc.http2.ping_timeout_ms", int(PING_TIMEOUT_S * 1000)),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # Despite its name this is how long one attempt to connect may take, first frames included:
    # a far link needs two round trips, and a busy machine is slow to answer.
    ("grpc.min_reconnect_backoff_ms", int(CONNECT_ATTEMPT_S * 1000)),
    ("grpc.enable_http_proxy", 0),  # a proxy of the environment has no business on these links
    ("grpc.use_local_subchannel_pool", 1),  # one TCP connection per channel, closed with it
)


def check_target(target: str) -> str:
    """Return `target` if it reads "host:port".

    Raises:
        InvalidArgument: it does not.
    """
    host, separator, port = target.rpartition(":")
    if not separator or not host or not port.isdigit() or not 0 < int(port) <= 65535:
        raise InvalidArgument(
            f"{target!r} is no address.", hint="Write host:port, for example 127.0.0.1:7411."
        )
    return target


def open_channel(target: str, *, reconnect_ms: int = 1_000) -> grpc.aio.Channel:
    """A channel to "host:port"; it connects on first use and reconnects by itself.

    Args:
        reconnect_ms: the longest pause between two attempts to connect; calls fail at once
            meanwhile, also when the other side is back already.

    Raises:
        InvalidArgument: `target` is no address.
    """
    return grpc.aio.insecure_channel(
        check_target(target), options=(*_OPTIONS, ("grpc.max_reconnect_backoff_ms", reconnect_ms))
    )
