"""One way to start a gRPC server: open on loopback only, health, reflection, bounded messages."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from segue_contract.errors import Internal, InvalidArgument, NotLoopback, PortInUse
from segue_contract.ids import DEFAULT_TENANT
from segue_contract.limits import MAX_GRPC_MESSAGE_BYTES, PING_TIMEOUT_S, SHUTDOWN_GRACE_S
from segue_contract.transport.gate import Gate
from segue_contract.transport.health_port import health_server
from segue_contract.transport.hosts import is_loopback
from segue_contract.transport.status import ErrorInterceptor
from segue_contract.transport.tls import Clients, TlsFiles, server_credentials

AUTHENTICATION_FLAGS = "--tenant-keys FILE"

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


def check_listener(
    host: str,
    *,
    tls: TlsFiles | None = None,
    authenticated: bool = False,
) -> str:
    """Return `host` if one may listen there: only this machine reaches it, or TLS and
    authentication guard it.

    Args:
        authenticated: callers are known. A certificate alone says which node speaks, not for whom.

    Raises:
        NotLoopback: says which of the two is missing.
    """
    if is_loopback(host):
        return host
    missing, flags = [], []
    if tls is None:
        missing.append("encryption")
        flags.append("--tls-cert FILE and --tls-key FILE")
    if not authenticated:
        missing.append("authentication")
        flags.append(AUTHENTICATION_FLAGS)
    if missing:
        raise NotLoopback(
            f"Listening on {host!r} would open this node to the network without "
            f"{' and '.join(missing)}.",
            hint=f"Give {', and '.join(flags)}; or use 127.0.0.1.",
        )
    return host


@dataclass
class RunningServer:
    server: grpc.aio.Server
    host: str
    port: int
    _health: HealthServicer
    gate: Gate
    node_port: int | None = None
    tls: bool = False
    health_port: int | None = None
    _health_server: grpc.aio.Server | None = None

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
        if self._health_server is not None:
            await self._health_server.stop(None)
        self.gate.close()


async def start_server(
    host: str,
    port: int,
    services: Sequence[tuple[str, Callable[[grpc.aio.Server], None]]],
    *,
    tls: TlsFiles | None = None,
    clients: Clients = "none",
    node_port: int | None = None,
    health: tuple[str, int] | None = None,
    gate: Gate | None = None,
) -> RunningServer:
    """Listen and serve.

    Args:
        host: a loopback address, or any other where TLS and authentication guard it.
        port: 0 picks a free one.
        services: (full service name, function that adds its servicer to the server).
        tls: None: without. The files are read again when they change.
        clients: whether callers need a certificate signed by `tls.ca`.
        node_port: the same services here too, always with client certificates: for edges, where
            devices come without. 0 picks a free one, None: not at all.
        health: host and port where anybody may ask whether the server serves, and nothing else.
        gate: checks each call; by default everybody on this machine is the default tenant's.

    Raises:
        NotLoopback, PortInUse, InvalidArgument.
        Internal: the address cannot be listened on for another reason.
    """
    gate = gate or Gate(DEFAULT_TENANT)
    check_listener(host, tls=tls, authenticated=gate.authenticates)
    for asked in (port, node_port or 0, health[1] if health is not None else 0):
        if not 0 <= asked <= 65535:
            raise InvalidArgument(
                f"{asked} is no port.", hint="Use 0 to 65535; 0 picks a free one."
            )
    if node_port is not None and tls is None:
        raise InvalidArgument(
            "A port for nodes knows them by their certificates, and this listener has no TLS.",
            hint="Give --tls-cert, --tls-key and --tls-ca.",
        )
    server = grpc.aio.server(interceptors=[ErrorInterceptor(), gate], options=_OPTIONS)
    for _, add in services:
        add(server)
    servicer = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    names = [name for name, _ in services]
    reflection.enable_server_reflection(
        (*names, "grpc.health.v1.Health", reflection.SERVICE_NAME), server
    )
    bound = _listen(server, host, port, tls, clients)
    node_bound = None
    if node_port is not None:
        node_bound = _listen(server, host, node_port, tls, "required")
    probed, probed_port = None, None
    if health is not None:
        probed = health_server(servicer)
        probed_port = _listen(probed, *health, None, "none")
        await probed.start()
    await server.start()
    running = RunningServer(
        server, host, bound, servicer, gate, node_bound, tls is not None, probed_port, probed
    )
    for name in names:
        await servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
    await running.set_serving(True)
    return running


def _listen(
    server: grpc.aio.Server, host: str, port: int, tls: TlsFiles | None, clients: Clients
) -> int:
    """The port. Raises PortInUse, Internal, InvalidArgument."""
    place = _authority(host, port)
    try:
        if tls is None:
            return server.add_insecure_port(place)
        return server.add_secure_port(place, server_credentials(tls, clients=clients))
    except RuntimeError as error:
        raise _refused(host, port, error) from error


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
