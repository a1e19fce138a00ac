"""Prometheus metrics of the cloud, read from the running parts at scrape time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from segue_cloud.engine.port import Engine
from segue_cloud.turns.manager import TurnManager
from segue_contract import telemetry
from segue_contract.errors import PortInUse


class CloudMetrics(Collector):
    def __init__(
        self,
        engine: Engine,
        manager: TurnManager,
        replica_waits: Callable[[], Mapping[str, int]],
        kv_checks: Mapping[str, int],
    ) -> None:
        self._kv_checks = kv_checks
        self._engine = engine
        self._replica_waits = replica_waits
        self._manager = manager

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        gauges = {
            telemetry.TURNS_RUNNING: ("Turns this instance owns", float(self._manager.running)),
            telemetry.ENGINE_BATCH: ("Sequences in the batch", float(stats.running)),
            telemetry.ENGINE_PAGES_FREE: ("Free KV pages", float(stats.pages_free)),
            telemetry.ENGINE_STEP: ("Seconds of a decode step", stats.decode_step_s),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value=value)
        yield CounterMetricFamily(
            telemetry.ENGINE_PREFIX_HITS.removesuffix("_total"),
            "Prompt tokens found in the prefix cache",
            value=float(stats.prefix_hit_tokens),
        )
        waits = CounterMetricFamily(
            telemetry.STORE_WAITS.removesuffix("_total"),
            "Writes of a turn's lease or end, by whether the store's replicas confirmed them",
            labels=["result"],
        )
        for result, count in self._replica_waits().items():
            waits.add_metric([result], float(count))
        yield waits
        checks = CounterMetricFamily(
            telemetry.KV_CHECKS.removesuffix("_total"),
            "Blocks of edges that were computed again, by whether they were right",
            labels=["result"],
        )
        for result, count in self._kv_checks.items():
            checks.add_metric([result], float(count))
        yield checks

    @asynccontextmanager
    async def listening(self, port: int) -> AsyncIterator[None]:
        """Serve /metrics on a loopback port. Raises PortInUse."""
        registry = CollectorRegistry()
        registry.register(self)
        try:
            server, thread = start_http_server(port, addr="127.0.0.1", registry=registry)
        except OSError as error:
            raise PortInUse(
                f"Port {port} is taken by another program.",
                hint="Choose another --metrics-port.",
            ) from error
        try:
            yield
        finally:
            # It waits for up to half a second, in which running turns must go on.
            await asyncio.to_thread(server.shutdown)
            thread.join()
