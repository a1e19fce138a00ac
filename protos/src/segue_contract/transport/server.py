"""One way to start a gRPC server: loopback only, health, reflection, bounded messages."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from segue_contract.errors import Internal, InvalidArgument, NotLoopback, PortInUse
from segue_contract.limits import MAX_GRPC_MESSAGE_BYTES, PING_TIMEOUT_S, SHUTDOWN_GRACE_S
from segue_contract.transport.status import ErrorInterceptor

_OPTIONS: Sequence[tuple[str, Any]] = (
    ("grpc.max_send_message_length", MAX_GRPC_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_GRPC_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),  # a port in use is an error, not a second listener
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", int(PING_TIMEOUT_S * 1000)),
    # While bytes flow gRPC's ping for the bandwidth is nearly always under way and the keep-alive
    # waits for it: without this a peer that fell silent is noticed after a minute.
    ("grpc.http2.ping_timeout_ms", int(PING_TIMEOUT_S * 1000)),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
)


def check_loopback(host: str) -> str:
    """Return `host` if it cannot be reached from outside this machine.

    Raises:
        NotLoopback: any other address, until listeners authenticate their callers.
    """
    if host == "localhost":
        return host
    try:
        loopback = ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise NotLoopback(
            f"Listening on {host!r} would open this node to the network without authentication.",
            hint="Use 127.0.0.1, and a tunnel (ssh -L) to reach it from elsewhere.",
        )
    return host


@dataclass
class RunningServer:
    server: grpc.aio.Server
    host: str
    port: int
    _health: HealthServicer

    @property
    def address(self) -> str:
        return _authority(self.host, self.port)

    async def set_serving(self, serving: bool) -> None:
        """What the health service answers for the whole server."""
        status = health_pb2.HealthCheckResponse
        await self._health.set("", status.SERVING if serving else status.NOT_SERVING)

    async def stop(self, grace_s: float = SHUTDOWN_GRACE_S) -> None:
        """Say NOT_SERVING, let running calls end within `grace_s`, then close."""
        await self._health.enter_graceful_shutdown()
        await self.server.stop(grace_s)


async def start_server(
    host: str,
    port: int,
    services: Sequence[tuple[str, Callable[[grpc.aio.Server], None]]],
) -> RunningServer:
    """Listen and serve.

    Args:
        host: a loopback address.
        port: 0 picks a free one.
        services: (full service name, function that adds its servicer to the server).

    Raises:
        NotLoopback, PortInUse, InvalidArgument.
        Internal: the address cannot be listened on for another reason.
    """
    check_loopback(host)
    if not 0 <= port <= 65535:
        raise InvalidArgument(f"{port} is no port.", hint="Use 0 to 65535; 0 picks a free one.")
    server = grpc.aio.server(interceptors=[ErrorInterceptor()], options=_OPTIONS)
    for _, add in services:
        add(server)
    health = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    names = [name for name, _ in services]
    reflection.enable_server_reflection(
        (*names, "grpc.health.v1.Health", reflection.SERVICE_NAME), server
    )
    try:
        bound = server.add_insecure_port(_authority(host, port))
    except RuntimeError as error:
        raise _refused(host, port, error) from error
    await server.start()
    running = RunningServer(server, host, bound, health)
    for name in names:
        await health.set(name, health_pb2.HealthCheckResponse.SERVING)
    await running.set_serving(True)
    return running


def _authority(host: str, port: int) -> str:
    """ "host:port", with brackets around an IPv6 address."""
    bare = host.strip("[]")
    return f"[{bare}]:{port}" if ":" in bare else f"{bare}:{port}"


def _refused(host: str, port: int, error: RuntimeError) -> PortInUse | Internal:
    """Why gRPC could not listen: it does not say, so a plain socket tries the same."""
    reason: Exception = error
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
        for family, kind, protocol, _, address in found:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                probe.listen()
    except OSError as refusal:
        if refusal.errno == errno.EADDRINUSE:
            return PortInUse(
                f"Port {port} on {host} is taken by another program.",
                hint="Stop it, choose another --port, or use --port 0 for a free one.",
                port=port,
            )
        reason = refusal
    return Internal(
        f"This machine does not let us listen on {_authority(host, port)}: {reason}.",
        hint="Use another --host (127.0.0.1) or --port.",
    )
