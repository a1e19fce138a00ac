"""What every MQTT connection of ours has in common."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

from segue_contract.errors import InvalidArgument
from segue_contract.urls import without_password

# Nagle's algorithm costs up to 40 ms of a 50 ms budget.
SocketOption = tuple[int, int, int]


def mqtt_socket_options() -> list[SocketOption]:
    """For `aiomqtt.Client(socket_options=...)`: TCP_NODELAY."""
    return [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)]


def parse_mqtt_url(url: str) -> tuple[str, int]:
    """Host and port of "mqtt://host[:port]".

    Raises:
        InvalidArgument: another scheme, no host, or a user and password: those would be dropped,
            and the connection would be anonymous.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port, parts = None, None, urlsplit("")
    if parts.scheme != "mqtt" or not host:
        raise InvalidArgument(
            f"{without_password(url)!r} is no broker address.",
            hint="Write mqtt://host:port (SEGUE_MQTT_URL).",
        )
    if "@" in parts.netloc:
        raise InvalidArgument(
            f"The address of the broker at {without_password(url)!r} has a user or a password, "
            "and Segue cannot log in to a broker yet.",
            hint="Write mqtt://host:port, of a broker that lets this machine in without them.",
        )
    return host, port or 1883


def canonical_mqtt_url(url: str) -> str:
    """One way to write an address, to compare two. Raises as `parse_mqtt_url`."""
    host, port = parse_mqtt_url(url)
    if host == "localhost":
        host = "127.0.0.1"
    return f"mqtt://[{host}]:{port}" if ":" in host else f"mqtt://{host}:{port}"
