"""Whether a node serves, said to whoever asks on a port of its own, without TLS and tokens: probes
of orchestrators (Kubernetes' gRPC probes) have neither. Nothing else is served there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from segue_contract.limits import HEALTH_CALLS, HEALTH_IDLE_MS, HEALTH_MESSAGE_BYTES

OPTIONS: Sequence[tuple[str, Any]] = (
    ("grpc.max_receive_message_length", HEALTH_MESSAGE_BYTES),
    ("grpc.max_metadata_size", HEALTH_MESSAGE_BYTES),
    ("grpc.max_concurrent_streams", HEALTH_CALLS),
    ("grpc.max_connection_idle_ms", HEALTH_IDLE_MS),
    ("grpc.so_reuseport", 0),
)


class _CheckOnly(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """`Watch` is left out: it would last."""

    def __init__(self, health: HealthServicer) -> None:
        self._health = health

    async def Check(self, request: Any, context: Any) -> Any:
        return await self._health.Check(request, context)


def health_server(health: HealthServicer) -> grpc.aio.Server:
    """Has no address yet."""
    server = grpc.aio.server(options=OPTIONS, maximum_concurrent_rpcs=HEALTH_CALLS)
    health_pb2_grpc.add_HealthServicer_to_server(_CheckOnly(health), server)
    return server
