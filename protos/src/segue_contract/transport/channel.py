"""One way to open a gRPC channel. gRPC sets TCP_NODELAY on its sockets itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc

from segue_contract.errors import InvalidArgument
from segue_contract.limits import (
    CONNECT_ATTEMPT_S,
    MAX_GRPC_MESSAGE_BYTES,
    MAX_URL_CHARS,
    PING_INTERVAL_S,
    PING_TIMEOUT_S,
)
from segue_contract.transport.bearer import bearer
from segue_contract.transport.hosts import is_loopback
from segue_contract.transport.tls import TlsFiles, channel_credentials

Token = Callable[[], str]
"""The token to send now; asked before each call, on the event loop's thread."""

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


def check_public_url(url: str) -> str:
    """Return `url` if devices may be told of it as a node's address.

    Raises:
        InvalidArgument: it is no "host:port", or too long to be one.
    """
    if len(url) > MAX_URL_CHARS or not url.isprintable():
        raise InvalidArgument("A node's public address is none.", hint="Write host:port.")
    return check_target(url)


def check_stays_here(target: str) -> None:
    """Raises InvalidArgument where a token to `target` leaves this machine without TLS."""
    if not is_loopback(target.rpartition(":")[0]):
        raise InvalidArgument(
            f"The token would travel to {target} unencrypted.",
            hint="Give the certificate of its authority: tls_ca=, SEGUE_CA or --tls-ca.",
        )


def open_channel(
    target: str,
    *,
    reconnect_ms: int = 1_000,
    tls: TlsFiles | None = None,
    token: Token | None = None,
) -> grpc.aio.Channel:
    """A channel to "host:port"; it connects on first use and reconnects by itself.

    Args:
        reconnect_ms: the longest pause between two attempts to connect; calls fail at once
            meanwhile, also when the other side is back already.
        tls: None: without. The files are read now; a channel that is opened later has what they
            hold then.
        token: goes with each call as `authorization: Bearer ...`.

    Raises:
        InvalidArgument: `target` is no address, the files cannot be used, or a token would leave
            this machine without TLS.
    """
    check_target(target)
    if token is not None and tls is None:
        check_stays_here(target)
    options = (*_OPTIONS, ("grpc.max_reconnect_backoff_ms", reconnect_ms))
    if tls is None:
        channel = grpc.aio.insecure_channel(target, options=options)
    else:
        channel = grpc.aio.secure_channel(target, channel_credentials(tls), options=options)
    return channel if token is None else _WithToken(channel, token)


class _WithToken(grpc.aio.Channel):
    """A channel whose calls carry a token.

    No call credentials, which gRPC asks for on a thread of its own and sends over TLS only, and no
    interceptor, under which streams can be read in one of two ways only.
    """

    def __init__(self, inner: grpc.aio.Channel, token: Token) -> None:
        self._inner = inner
        self._token = token

    def unary_unary(self, *args: Any, **kwargs: Any) -> Any:
        return self._bearing(self._inner.unary_unary(*args, **kwargs))

    def unary_stream(self, *args: Any, **kwargs: Any) -> Any:
        return self._bearing(self._inner.unary_stream(*args, **kwargs))

    def stream_unary(self, *args: Any, **kwargs: Any) -> Any:
        return self._bearing(self._inner.stream_unary(*args, **kwargs))

    def stream_stream(self, *args: Any, **kwargs: Any) -> Any:
        return self._bearing(self._inner.stream_stream(*args, **kwargs))

    def _bearing(self, method: Any) -> Any:
        def call(*args: Any, metadata: Any = (), **kwargs: Any) -> Any:
            header = bearer(_written(self._token())) or ()
            return method(*args, metadata=(*(metadata or ()), *header), **kwargs)

        return call

    async def close(self, grace: float | None = None) -> None:
        await self._inner.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._inner.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._inner.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._inner.channel_ready()

    async def __aenter__(self) -> grpc.aio.Channel:
        await self._inner.__aenter__()
        return self

    async def __aexit__(self, *reason: Any) -> None:
        await self._inner.__aexit__(*reason)


def _written(token: str) -> str:
    """The token, fit for a header. Raises InvalidArgument, which does not quote it."""
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise InvalidArgument(
            "The token is empty or has characters that no token has.",
            hint="Pass it as it was issued, without quotes or line breaks (SEGUE_TOKEN).",
        )
    return token
