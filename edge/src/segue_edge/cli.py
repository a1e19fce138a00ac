"""`segue edge`: start an edge node and serve until it is told to stop."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import structlog
import typer

from segue_contract.errors import SegueError
from segue_contract.telemetry import EVENT_READY
from segue_contract.transport.logs import set_up_logs
from segue_contract.transport.process import keep_loaded
from segue_contract.transport.settings import (
    CaOption,
    CertOption,
    ClientsOption,
    HealthHostOption,
    HealthPortOption,
    KeyOption,
    TenantKeysOption,
)
from segue_edge.config import DEFAULT_CLOUD, DEFAULT_PORT, EdgeConfig, read_config

if TYPE_CHECKING:
    from segue_edge.node import EdgeNode

app = typer.Typer(
    help="Run an edge node: prefill near the user, decode in the cloud.", add_completion=False
)
log = structlog.get_logger("segue.edge")

_STARTED = time.monotonic()


@app.callback(invoke_without_command=True)
def edge(
    host: Annotated[
        str | None,
        typer.Option(help="Address to listen on; off loopback with TLS and authentication only."),
    ] = None,
    port: Annotated[
        int | None, typer.Option(help=f"Port; 0 picks a free one. Default {DEFAULT_PORT}.")
    ] = None,
    cloud: Annotated[
        list[str] | None,
        typer.Option(help=f"HOST:PORT of a cloud, may be repeated. Default {DEFAULT_CLOUD}."),
    ] = None,
    public_url: Annotated[
        str | None,
        typer.Option(help="host:port as devices reach it: clouds tell those that look."),
    ] = None,
    tls_cert: CertOption = None,
    tls_key: KeyOption = None,
    tls_ca: CaOption = None,
    tls_clients: ClientsOption = None,
    tenant_keys: TenantKeysOption = None,
    health_port: HealthPortOption = None,
    health_host: HealthHostOption = None,
    model: Annotated[
        str | None, typer.Option(help="Name of a built model, or its directory.")
    ] = None,
    plan: Annotated[
        str | None, typer.Option(help="auto, or force a shape: edge, ship, text.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; 0: one per core.")] = None,
    providers: Annotated[str | None, typer.Option(help="auto, cuda or cpu.")] = None,
    cache_mb: Annotated[int | None, typer.Option(help="Prefix cache, MiB.")] = None,
    ledger: Annotated[
        Path | None, typer.Option(help="Append one JSON line per turn to this file.")
    ] = None,
    outbox: Annotated[
        Path | None,
        typer.Option(help="File for turns that wait for the cloud; by default in ~/.local/state."),
    ] = None,
    max_turns: Annotated[
        int | None, typer.Option(help="Turns at once, beyond which it refuses.")
    ] = None,
    link_mbps: Annotated[
        float | None, typer.Option(help="Pace the uplink to this rate (for measurements).")
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning, error.")] = None,
) -> None:
    """Serve devices from this machine. Settings also come from SEGUE_EDGE_* variables."""
    try:
        config = read_config(
            host=host,
            port=port,
            cloud=tuple(cloud) if cloud else None,
            public_url=public_url,
            tls_cert=tls_cert,
            tls_key=tls_key,
            tls_ca=tls_ca,
            tls_clients=tls_clients,
            tenant_keys=tenant_keys,
            health_port=health_port,
            health_host=health_host,
            model=model,
            plan=plan,
            threads=threads,
            providers=providers,
            cache_mb=cache_mb,
            ledger=ledger,
            outbox=outbox,
            max_turns=max_turns,
            link_mbps=link_mbps,
            log_level=log_level,
        )
        set_up_logs(config.log_level)
        asyncio.run(_serve(config))
    except SegueError as error:
        typer.echo(f"segue edge: {error}", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


async def _serve(config: EdgeConfig) -> None:
    from segue_edge.node import EdgeNode  # the model's runtime is loaded only to serve

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with EdgeNode(config) as node:
        keep_loaded()
        _say_ready(node)
        await stop.wait()
        log.info("stopping", turns=len(node.registry))


def _say_ready(node: EdgeNode) -> None:
    ready = {
        "event": EVENT_READY,
        "role": "edge",
        "port": node.server.port,
        "host": node.server.host,
        "instance": node.instance,
        "seconds": round(time.monotonic() - _STARTED, 3),
        "model": node.tools.manifest.name,
        "tls": node.server.tls,
        "provider": node.provider,
        "cloud": list(node.config.cloud),
        "plan": node.config.plan,
    }
    if node.server.health_port is not None:
        ready["health_port"] = node.server.health_port
    sys.stdout.write(msgspec.json.encode(ready).decode() + "\n")
    sys.stdout.flush()
    log.info(EVENT_READY, **{key: value for key, value in ready.items() if key != "event"})
