"""Settings of the edge node: flags, or `SEGUE_EDGE_*` in the environment. Checked at start-up."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from segue_contract.errors import InvalidArgument, SegueError
from segue_contract.limits import MAX_TURNS_PER_EDGE
from segue_contract.model.manifest import DEFAULT_MODEL, model_home
from segue_contract.transport.channel import check_public_url, check_target
from segue_contract.transport.hosts import is_loopback
from segue_contract.transport.settings import TlsSettings
from segue_edge.planner.plan import parse_force

DEFAULT_PORT = 7411
DEFAULT_CLOUD = "127.0.0.1:7412"


class EdgeConfig(TlsSettings):
    """Never written to after it was read."""

    model_config = SettingsConfigDict(env_prefix="SEGUE_EDGE_", frozen=True, extra="ignore")

    host: str = "127.0.0.1"
    port: int = Field(DEFAULT_PORT, ge=0, le=65535)
    public_url: str = ""  # host:port, as devices reach it; empty: clouds do not tell of this edge
    # several: SEGUE_EDGE_CLOUD="host:port,host:port"
    cloud: Annotated[tuple[str, ...], NoDecode] = (DEFAULT_CLOUD,)
    model: str = DEFAULT_MODEL
    plan: str = "auto"
    threads: int = Field(0, ge=0, le=256)  # 0: one per core
    providers: str = Field("auto", pattern="^(auto|cuda|cpu)$")
    cache_mb: int = Field(512, ge=1, le=1_000_000)
    ledger: Path | None = None
    outbox: Path | None = None
    link_mbps: float | None = Field(None, gt=0)
    max_turns: int = Field(MAX_TURNS_PER_EDGE, ge=1, le=65536)
    log_level: str = Field("info", pattern="^(debug|info|warning|error)$")

    @field_validator("cloud", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part for part in value.split(",") if part) if isinstance(value, str) else value

    @field_validator("cloud")
    @classmethod
    def _addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for target in value:
            check_target(target)
        return value

    @field_validator("public_url")
    @classmethod
    def _public(cls, value: str) -> str:
        return check_public_url(value) if value else value

    @field_validator("plan")
    @classmethod
    def _shape(cls, value: str) -> str:
        parse_force(value)
        return value

    @model_validator(mode="after")
    def _tokens_stay_private(self) -> Self:
        far = [target for target in self.cloud if not is_loopback(target.rpartition(":")[0])]
        if self.tenant_keys is not None and self.tls_ca is None and far:
            raise InvalidArgument(
                f"Devices' tokens would go to {far[0]} in clear text.",
                hint="Give --tls-ca, whose certificates this edge believes.",
            )
        return self

    @property
    def model_directory(self) -> Path:
        """A name in the model home, or a directory as it is."""
        as_path = Path(self.model).expanduser()
        is_path = as_path.is_absolute() or len(as_path.parts) > 1 or self.model.startswith(".")
        return as_path if is_path else model_home() / self.model

    @property
    def outbox_path(self) -> Path | None:
        """The file of turns served offline; None, and memory alone, for an edge on any free port
        that was given none: no later one could find it."""
        if self.outbox is not None:
            return self.outbox.expanduser()
        if not self.port:
            return None
        state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
        return Path(state).expanduser() / "segue" / f"edge-{self.port}.outbox"

    @property
    def link_bytes_per_s(self) -> float | None:
        return None if self.link_mbps is None else self.link_mbps * 1e6 / 8


def read_config(**flags: object) -> EdgeConfig:
    """Settings with `flags` before the environment; a flag of None counts as not given.

    Raises:
        InvalidArgument: a value is no setting; the message names it.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return EdgeConfig(**given)  # type: ignore[arg-type]
    except SegueError:
        raise
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "setting"
        raise InvalidArgument(
            f"{name} = {first.get('input')!r}: {first['msg']}.",
            hint=f"Correct --{name.replace('_', '-')} or SEGUE_EDGE_{name.upper()}.",
        ) from error
