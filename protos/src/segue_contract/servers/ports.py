"""Free ports of this machine."""

from __future__ import annotations

import random
import socket

from segue_contract.errors import PortInUse

# Below the range from which systems take the source ports of outgoing connections (Linux: from
# 32768). A client that keeps dialling a dead server's port inside that range can end up connected
# to itself, and then the server cannot come back.
_FIRST, _LAST = 20_000, 32_000
_ATTEMPTS = 200


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a listener could be bound to `port` right now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def free_port(avoid: frozenset[int] = frozenset()) -> int:
    """A port on loopback that nothing listens on.

    Raises:
        PortInUse: none found, which means that something is very wrong with this machine.
    """
    choice = random.SystemRandom()
    for _ in range(_ATTEMPTS):
        port = choice.randrange(_FIRST, _LAST)
        if port not in avoid and is_free(port):
            return port
    raise PortInUse(
        f"No free port between {_FIRST} and {_LAST} on 127.0.0.1.",
        hint="Close some programs that listen there.",
    )


def check_free(port: int, flag: str) -> None:
    """Raises PortInUse where `port` is taken; `flag` is the option that chooses another."""
    if not is_free(port):
        raise PortInUse(
            f"Port {port} on 127.0.0.1 is taken by another program.",
            hint=f"Stop it, or choose another with {flag} (0 picks a free one).",
            port=port,
        )
