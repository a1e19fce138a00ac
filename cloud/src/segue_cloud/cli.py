"""`segue cloud`: the command line of the cloud service."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from segue_cloud.config import CloudSettings
from segue_contract.errors import InvalidArgument
from segue_contract.transport.settings import (
    CaOption,
    CertOption,
    ClientsOption,
    HealthHostOption,
    HealthPortOption,
    KeyOption,
    TenantKeysOption,
)

app = typer.Typer(
    help="Run the cloud service: decode engine, session log, fan-out.", add_completion=False
)


@app.callback(invoke_without_command=True)
def cloud(
    host: Annotated[
        str | None,
        typer.Option(help="Address to listen on; off loopback with TLS and authentication only."),
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 picks a free one.")] = None,
    node_port: Annotated[
        int | None, typer.Option(help="One more port, for edges: client certificates required.")
    ] = None,
    tls_cert: CertOption = None,
    tls_key: KeyOption = None,
    tls_ca: CaOption = None,
    tls_clients: ClientsOption = None,
    tenant_keys: TenantKeysOption = None,
    health_port: HealthPortOption = None,
    health_host: HealthHostOption = None,
    model: Annotated[str | None, typer.Option(help="Built model: a name or a folder.")] = None,
    redis_url: Annotated[
        str | None,
        typer.Option(help="redis://…, redis+sentinel://… ; embedded Valkey where not given."),
    ] = None,
    redis_ca: Annotated[
        Path | None, typer.Option(help="Authority of a rediss:// store. [--tls-ca]")
    ] = None,
    redis_trusted_network: Annotated[
        bool | None,
        typer.Option(
            "--redis-trusted-network",
            help="The store's password may go over the network without TLS: nobody listens there.",
        ),
    ] = None,
    mqtt_url: Annotated[
        str | None, typer.Option(help="mqtt://… or mqtts://… ; embedded broker where not given.")
    ] = None,
    public_mqtt_url: Annotated[
        str | None,
        typer.Option(
            help="The broker as devices reach it, with a login of theirs. Beside --tenant-keys: "
            "your word that it checks who reads which topics; without, they follow over gRPC."
        ),
    ] = None,
    mqtt_login: Annotated[
        Path | None, typer.Option(help="File of one line, user:password, for the broker.")
    ] = None,
    mqtt_ca: Annotated[
        Path | None, typer.Option(help="Authority of an mqtts:// broker. [--tls-ca]")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, bf16 or fp32.")] = None,
    device: Annotated[
        str | None, typer.Option(help="auto (a CUDA card where there is one), cpu, cuda, cuda:N.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Compute threads; 0: one a core.")] = None,
    pool_mb: Annotated[int | None, typer.Option(help="KV pool in MiB; 0: chosen.")] = None,
    host_mb: Annotated[
        int | None,
        typer.Option(help="MiB for KV that the pool gives up, in 8 bits; 0: off. [chosen]"),
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Tokens that a token sees (sliding window); 0: the model's.")
    ] = None,
    sinks: Annotated[
        int | None, typer.Option(help="First tokens that stay in sight of a window.")
    ] = None,
    tensor_parallel: Annotated[
        int | None,
        typer.Option(help="Processes that share the model and its threads; on CUDA one a device."),
    ] = None,
    max_turns: Annotated[
        int | None, typer.Option(help="Turns served or waiting, beyond which it refuses.")
    ] = None,
    quotas: Annotated[
        Path | None,
        typer.Option(help="File of what each tenant may have, and its weight; docs/security.md."),
    ] = None,
    session_ttl: Annotated[
        float | None,
        typer.Option(help="Days without any use after which a session is deleted; 0: never."),
    ] = None,
    instance: Annotated[str | None, typer.Option(help="Name of this instance.")] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="Prometheus metrics on this loopback port; 0: off.")
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
) -> None:
    """Run the cloud service until Ctrl-C or SIGTERM.

    Every flag can also be set as SEGUE_CLOUD_… in the environment; the store
    and the broker also as SEGUE_REDIS_URL and SEGUE_MQTT_URL.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    settings = load_settings(given)
    from segue_cloud.app import serve  # heavy imports only once the arguments are right

    asyncio.run(serve(settings))


def load_settings(given: dict[str, Any]) -> CloudSettings:
    """Raises InvalidArgument that names the first bad setting."""
    try:
        return CloudSettings(**given)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise InvalidArgument(
            f"The setting {name} is wrong: {first['msg']}.",
            hint="See `segue cloud --help`.",
        ) from error
