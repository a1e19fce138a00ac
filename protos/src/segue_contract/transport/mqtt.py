"""What every MQTT connection of ours has in common."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

from segue_contract.errors import InvalidArgument

# Nagle's algorithm costs up to 40 ms of a 50 ms budget.
SocketOption = tuple[int, int, int]


def mqtt_socket_options() -> list[SocketOption]:
    """For `aiomqtt.Client(socket_options=...)`: TCP_NODELAY."""
    return [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)]


def parse_mqtt_url(url: str) -> tuple[str, int]:
    """Host and port of "mqtt://host[:port]".

    Raises:
        InvalidArgument: another scheme, or no host.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port, parts = None, None, urlsplit("")
    if parts.scheme != "mqtt" or not host:
        raise InvalidArgument(
            f"{url!r} is no broker address.", hint="Write mqtt://host:port (SEGUE_MQTT_URL)."
        )
    return host, port or 1883
