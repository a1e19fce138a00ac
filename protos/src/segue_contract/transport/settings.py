"""Settings of a node's TLS: flags and variables, the same for edge and cloud."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

import typer
from pydantic import Field, model_validator
from pydantic_settings import BaseSettings

from segue_contract.errors import InvalidArgument
from segue_contract.transport.tls import SYSTEM, Clients, TlsFiles

CertOption = Annotated[
    Path | None, typer.Option("--tls-cert", help="This node's certificate chain, PEM: TLS on.")
]
KeyOption = Annotated[Path | None, typer.Option("--tls-key", help="The key of --tls-cert, PEM.")]
CaOption = Annotated[
    Path | None,
    typer.Option(
        "--tls-ca",
        help="Authorities of other nodes' certificates, PEM; 'system': the public ones.",
    ),
]
ClientsOption = Annotated[
    str | None,
    typer.Option(
        "--tls-clients", help="none, or required: callers need a certificate of --tls-ca."
    ),
]

TenantKeysOption = Annotated[
    Path | None,
    typer.Option(
        "--tenant-keys", help="Tenants' public keys (`segue tenant`): callers show session tokens."
    ),
]


HealthPortOption = Annotated[
    int | None,
    typer.Option(
        "--health-port",
        help="One more port, gRPC health alone, without TLS and tokens: for orchestrators' probes.",
    ),
]
HealthHostOption = Annotated[
    str | None,
    typer.Option("--health-host", help="Address of --health-port; a pod's own. [127.0.0.1]"),
]


class TlsSettings(BaseSettings):
    """To inherit from. Nodes that it connects to have TLS where `tls_ca` is given."""

    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_ca: Path | None = None
    tls_clients: Clients = "none"
    tenant_keys: Path | None = None
    health_port: int | None = Field(None, ge=0, le=65535)  # None: no such port
    health_host: str = "127.0.0.1"

    @property
    def health(self) -> tuple[str, int] | None:
        """Where probes ask whether this node serves."""
        return None if self.health_port is None else (self.health_host, self.health_port)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise InvalidArgument(
                "A certificate goes with its key, and one of the two is not given.",
                hint="Give both: --tls-cert and --tls-key.",
            )
        if self.tls_clients == "required" and (
            self.tls_cert is None or self.tls_ca in (None, SYSTEM)
        ):
            raise InvalidArgument(
                "Client certificates are required, and the listener has not all that it needs.",
                hint="Give --tls-cert, --tls-key and --tls-ca FILE, your own authority's.",
            )
        return self

    @property
    def listener_tls(self) -> TlsFiles | None:
        """Of our own listener; None: it has none."""
        if self.tls_cert is None:
            return None
        return TlsFiles(self.tls_cert, self.tls_key, self.tls_ca)

    @property
    def channel_tls(self) -> TlsFiles | None:
        """Of channels to other nodes; None: they have none."""
        if self.tls_ca is None:
            return None
        return TlsFiles(self.tls_cert, self.tls_key, self.tls_ca)
