"""The tenants' quotas as a file that may be replaced while a cloud runs.

    {"default": {"tokens_per_min": 600000},
     "tenants": {"acme": {"weight": 2, "turns": 64, "sessions": null}}}

What a tenant's entry does not say is as in "default", and what that does not say as in
`TenantQuotas`. null: no bound.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import msgspec

from segue_cloud.tenants.usage import UNLIMITED
from segue_contract.errors import UNREADABLE, InvalidArgument
from segue_contract.ids import check_id
from segue_contract.limits import (
    MAX_KEY_FILE_BYTES,
    MAX_TENANT_WEIGHT,
    MIN_TENANT_WEIGHT,
    TenantQuotas,
)
from segue_contract.transport.watched_file import WatchedFile


class _Quotas(NamedTuple):
    default: TenantQuotas
    tenants: dict[str, TenantQuotas]

    def of(self, tenant: str) -> TenantQuotas:
        return self.tenants.get(tenant, self.default)


def quotas_of(
    path: Path | None, *, keyed: bool, monotonic: Callable[[], float] = time.monotonic
) -> Callable[[str], TenantQuotas]:
    """Quotas by tenant: the file's; without one the usual ones where tenants have keys, and none on
    an open loopback, where there is one tenant. Raises InvalidArgument."""
    if path is not None:
        file = WatchedFile(path, _read, "quotas_kept", monotonic)
        return lambda tenant: file.value.of(tenant)
    usual = TenantQuotas() if keyed else UNLIMITED
    return lambda tenant: usual


def _read(path: Path) -> _Quotas:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_KEY_FILE_BYTES + 1)
    except OSError as error:
        raise InvalidArgument(
            f"The tenants' quotas {path} cannot be read.",
            hint="Give a file as in docs/security.md as --quotas.",
        ) from error
    return _Quotas(*read_quotas(data))


def read_quotas(data: bytes) -> tuple[TenantQuotas, dict[str, TenantQuotas]]:
    """The default, and what single tenants have.

    Raises:
        InvalidArgument: it is no such file; all of it is refused, never a part.
    """
    if len(data) > MAX_KEY_FILE_BYTES:
        raise _bad(f"it is larger than {MAX_KEY_FILE_BYTES} bytes")
    try:
        file = msgspec.json.decode(data, type=_File)
    except UNREADABLE as error:
        raise _bad(str(error)) from error
    default = _changed(TenantQuotas(), file.default, "default")
    tenants = {
        check_id(tenant, "tenant"): _changed(default, entry, tenant)
        for tenant, entry in file.tenants.items()
    }
    return default, tenants


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    weight: float | msgspec.UnsetType = msgspec.UNSET
    sessions: float | msgspec.UnsetType | None = msgspec.UNSET
    devices: float | msgspec.UnsetType | None = msgspec.UNSET
    attaches: float | msgspec.UnsetType | None = msgspec.UNSET
    turns: float | msgspec.UnsetType | None = msgspec.UNSET
    ops_per_s: float | msgspec.UnsetType | None = msgspec.UNSET
    bytes_per_s: float | msgspec.UnsetType | None = msgspec.UNSET
    tokens_per_min: float | msgspec.UnsetType | None = msgspec.UNSET


class _File(msgspec.Struct, forbid_unknown_fields=True):
    default: _Entry = _Entry()
    tenants: dict[str, _Entry] = {}


def _changed(quotas: TenantQuotas, entry: _Entry, of: str) -> TenantQuotas:
    given = {name: getattr(entry, name) for name in asdict(quotas)}
    said = {
        name: math.inf if value is None else value
        for name, value in given.items()
        if value is not msgspec.UNSET
    }
    for name, value in said.items():
        least = MIN_TENANT_WEIGHT if name == "weight" else 0.0
        most = MAX_TENANT_WEIGHT if name == "weight" else math.inf
        # A rate of nothing would never be free again.
        if not least <= value <= most or (name.endswith(("_s", "_min")) and value == 0):
            raise _bad(f"{name} of {of!r} is {value:g}")
    return replace(quotas, **said)


def _bad(why: str) -> InvalidArgument:
    return InvalidArgument(
        f"This is no file of tenants' quotas: {why}.",
        hint="See docs/security.md for its form; a weight lies between "
        f"{MIN_TENANT_WEIGHT:g} and {MAX_TENANT_WEIGHT:g}.",
    )
