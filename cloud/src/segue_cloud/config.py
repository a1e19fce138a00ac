"""Settings of `segue cloud`: defaults, then `SEGUE_CLOUD_*`, then flags.

No file of the working directory is read: whose it is, nobody knows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, AliasChoices, Field
from pydantic_settings import SettingsConfigDict

from segue_contract.errors import InvalidArgument
from segue_contract.ids import check_id
from segue_contract.limits import MAX_RANKS, MAX_TURNS_PER_CLOUD
from segue_contract.model.manifest import DEFAULT_MODEL
from segue_contract.store_url import check_login_stays, with_tls_files
from segue_contract.transport.hosts import is_loopback
from segue_contract.transport.mqtt import MqttLogin, parse_mqtt_url, read_mqtt_login
from segue_contract.transport.settings import TlsSettings
from segue_contract.transport.tls import SYSTEM, TlsFiles


def _name(value: str) -> str:
    try:
        return check_id(value, "tenant")
    except InvalidArgument as error:
        raise ValueError(str(error)) from error


class CloudSettings(TlsSettings):
    """Frozen once built. A bad value stops the program at start-up and is named."""

    model_config = SettingsConfigDict(
        env_prefix="SEGUE_CLOUD_",
        extra="ignore",
        frozen=True,
        populate_by_name=True,
    )

    host: str = "127.0.0.1"
    port: int = Field(7412, ge=0, le=65535)
    # for edges, always with client certificates; None: they use `port`
    node_port: int | None = Field(None, ge=0, le=65535)
    model: str = DEFAULT_MODEL
    tenant: Annotated[str, AfterValidator(_name)] = "default"  # part of keys and topics
    instance: str = ""
    # Empty: an embedded server on a free loopback port, for a laptop.
    redis_url: str = Field(
        "", validation_alias=AliasChoices("SEGUE_REDIS_URL", "SEGUE_CLOUD_REDIS_URL")
    )
    mqtt_url: str = Field(
        "", validation_alias=AliasChoices("SEGUE_MQTT_URL", "SEGUE_CLOUD_MQTT_URL")
    )
    redis_ca: Path | None = None  # None: as tls_ca
    redis_trusted_network: bool = False  # a password may go to the store without TLS
    # What devices are told, and the operator's word that this broker checks who reads what, where
    # it takes no logins of ours or this has one. Empty: its own address where they reach it.
    public_mqtt_url: str = Field(
        "", validation_alias=AliasChoices("SEGUE_PUBLIC_MQTT_URL", "SEGUE_CLOUD_PUBLIC_MQTT_URL")
    )
    mqtt_login: Path | None = None  # a file of one line, user:password
    mqtt_ca: Path | None = None  # None: as tls_ca
    dtype: str = Field("auto", pattern="^(auto|bf16|fp32)$")
    device: str = Field("auto", pattern="^(auto|cpu|cuda(:[0-9]+)?)$")  # auto: a card if any
    threads: int = Field(0, ge=0, le=1024)  # 0: one per core
    pool_mb: int = Field(0, ge=0)  # 0: a bounded share of memory
    # for KV that the pool gave up; None: a bounded share of memory, 0: none is kept
    host_mb: int | None = Field(None, ge=0)
    window: int = Field(0, ge=0)  # tokens that a token sees; 0: as the model says
    sinks: int = Field(4, ge=0)  # first tokens that stay in sight of a window
    tensor_parallel: int = Field(1, ge=1, le=MAX_RANKS)  # processes that share the model
    max_turns: int = Field(MAX_TURNS_PER_CLOUD, ge=1, le=65536)
    quotas: Path | None = None  # None: the usual ones beside tenant_keys, else none
    session_ttl: float = Field(0.0, ge=0.0, le=36500.0)  # days without use; 0: kept for ever
    metrics_port: int = Field(0, ge=0, le=65535)  # 0: no metrics listener
    log_level: str = Field("info", pattern="^(debug|info|warning|error)$")

    @property
    def store_url(self) -> str:
        """`redis_url` with the certificates that it does not name itself.

        Raises:
            InvalidArgument: it is none, or its password would travel unencrypted.
        """
        if self.redis_url:
            check_login_stays(self.redis_url, trusted=self.redis_trusted_network)
        ca = self.redis_ca or self.tls_ca
        return with_tls_files(
            self.redis_url,
            ca=str(ca) if ca is not None and ca != SYSTEM else "",
            certificate=str(self.tls_cert or ""),
            key=str(self.tls_key or ""),
        )

    @property
    def broker_login(self) -> MqttLogin:
        """How this instance shows itself to the broker. Raises InvalidArgument."""
        tls = TlsFiles(self.tls_cert, self.tls_key, self.mqtt_ca or self.tls_ca)
        given = parse_mqtt_url(self.mqtt_url) if self.mqtt_url else None
        if given is not None and given.username:
            return MqttLogin(given.username, given.password, tls)
        return (
            MqttLogin(tls=tls) if self.mqtt_login is None else read_mqtt_login(self.mqtt_login, tls)
        )

    def told_mqtt_url(self, own: str, *, logins: bool = False) -> str:
        """What devices are told where this instance publishes through `own`; "": they follow over
        gRPC. A broker on this machine's loopback is none that others reach; and where callers are
        known, the broker has to know them too: by `logins` that it is given, or by the operator's
        word."""
        if self.public_mqtt_url or (self.tenant_keys is not None and not logins):
            return self.public_mqtt_url
        reached = is_loopback(self.host) or not is_loopback(parse_mqtt_url(own).host)
        return own if reached else ""
