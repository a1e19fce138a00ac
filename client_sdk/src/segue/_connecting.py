"""One node of a client's; waiting for its channel to stand, and why it does not."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import grpc

from segue_contract.errors import Unreachable
from segue_contract.limits import CONNECT_TIMEOUT_S
from segue_contract.transport.status import concerns_tls, error_from_rpc

SERVING = b"\x08\x01"  # grpc.health.v1.HealthCheckResponse with status SERVING
HEALTH_METHOD = "/grpc.health.v1.Health/Check"


@dataclass(slots=True)
class Node:
    """One address. `failed_at` is a monotonic time; -inf: it did not fail lately.

    `full_until`, alike: it refused, and may have room by then.
    `reviving` runs while it counts as silent: until a new connection gets an answer.
    """

    address: str
    failed_at: float = float("-inf")
    full_until: float = float("-inf")
    channel: grpc.aio.Channel | None = None
    stub: Any = None
    reviving: asyncio.Task[None] | None = None
    files: tuple[object, ...] = ()  # the certificates as its channel was opened with them
    _calls: list[Any] = field(default_factory=list)

    def keep(self, call: Any) -> Any:
        """Return `call`, which runs here until it is done."""
        self._calls = [one for one in self._calls if not one.done()]
        self._calls.append(call)
        return call

    @property
    def busy(self) -> bool:
        """Whether a call runs here."""
        return any(not one.done() for one in self._calls)


async def connected(channel: grpc.aio.Channel) -> None:
    """Wait until the channel is ready; a refused connection fails at once.

    Raises:
        Unreachable: with a hint where it is known what is wrong.
    """
    while True:
        state = channel.get_state(try_to_connect=True)
        if state is grpc.ChannelConnectivity.READY:
            return
        if state in (
            grpc.ChannelConnectivity.TRANSIENT_FAILURE,
            grpc.ChannelConnectivity.SHUTDOWN,
        ):
            raise await _why(channel)
        await channel.wait_for_state_change(state)


async def _why(channel: grpc.aio.Channel) -> Unreachable:
    """Why the last attempt to connect failed: only a call is told."""
    refused = Unreachable("The connection was refused.")
    try:
        await channel.unary_unary(HEALTH_METHOD, None, None)(b"", timeout=CONNECT_TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        found = error_from_rpc(error)
        if isinstance(found, Unreachable) and concerns_tls(error.details() or ""):
            return found
    except grpc.aio.UsageError:  # closed meanwhile
        pass
    return refused
