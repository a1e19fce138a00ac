"""What every MQTT connection of ours has in common."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from segue_contract.errors import InvalidArgument
from segue_contract.transport.hosts import is_loopback
from segue_contract.transport.tls import TlsFiles, client_context
from segue_contract.urls import without_password

_PORTS = {"mqtt": 1883, "mqtts": 8883}

# Nagle's algorithm costs up to 40 ms of a 50 ms budget.
SocketOption = tuple[int, int, int]


def mqtt_socket_options() -> list[SocketOption]:
    """For `aiomqtt.Client(socket_options=...)`: TCP_NODELAY."""
    return [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)]


@dataclass(frozen=True, slots=True)
class MqttServer:
    """A broker's URL, taken apart; user and password are "" where it names none."""

    host: str
    port: int
    secure: bool
    username: str = ""
    password: str = field(default="", repr=False)

    @property
    def address(self) -> tuple[str, int]:
        return self.host, self.port

    @property
    def url(self) -> str:
        """One way to write it, without user and password."""
        host = "127.0.0.1" if self.host == "localhost" else self.host
        place = f"[{host}]" if ":" in host else host
        return f"{'mqtts' if self.secure else 'mqtt'}://{place}:{self.port}"


@dataclass(frozen=True, slots=True)
class MqttLogin:
    """How we show ourselves to a broker whose URL does not say it. `tls`: of mqtts:// only."""

    username: str = ""
    password: str = field(default="", repr=False)
    tls: TlsFiles = TlsFiles()


def parse_mqtt_url(url: str) -> MqttServer:
    """Of "mqtt://[user:password@]host[:port]", or "mqtts://..." with TLS.

    Raises:
        InvalidArgument: another scheme, no host. The password is in no message.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port, parts = None, None, urlsplit("")
    if parts.scheme not in _PORTS or not host:
        raise InvalidArgument(
            f"{without_password(url)!r} is no broker address.",
            hint="Write mqtt://host:port, or mqtts://user:password@host:port (SEGUE_MQTT_URL).",
        )
    login = parts.netloc.rpartition("@")[0]
    username, _, password = login.partition(":")
    return MqttServer(
        host,
        port or _PORTS[parts.scheme],
        parts.scheme == "mqtts",
        unquote(username),
        unquote(password),
    )


def canonical_mqtt_url(url: str) -> str:
    """One way to write an address, to compare two. Raises as `parse_mqtt_url`."""
    return parse_mqtt_url(url).url


def read_mqtt_login(path: Path, tls: TlsFiles) -> MqttLogin:
    """A file of one line, "user:password". Raises InvalidArgument."""
    try:
        text = path.read_text(encoding="utf-8").strip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise InvalidArgument(f"{path} cannot be read: {reason}.") from None
    username, colon, password = text.partition(":")
    if not username or not colon or "\n" in text:
        raise InvalidArgument(
            f"{path} holds no login for a broker.", hint="Write one line: user:password."
        )
    return MqttLogin(username, password, tls)


def connect_options(server: MqttServer, login: MqttLogin) -> dict[str, Any]:
    """For `MqttClient(*server.address, **options)`: who we are, and whom we believe.

    Certificates are read now.

    Raises:
        InvalidArgument: they cannot be used, or a password would leave this machine unencrypted.
    """
    options: dict[str, Any] = {}
    username = server.username or login.username
    if username:
        if not server.secure and not is_loopback(server.host):
            raise InvalidArgument(
                f"The password would travel to {server.url} unencrypted.",
                hint="Use mqtts://, a listener of the broker with TLS.",
            )
        options["username"] = username
        options["password"] = server.password if server.username else login.password
    if server.secure:
        options["tls_context"] = client_context(login.tls)
    return options
