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

import msgspec
import structlog

from segue_cloud.tenants.usage import UNLIMITED
from segue_contract.errors import UNREADABLE, InvalidArgument, SegueError
from segue_contract.ids import check_id
from segue_contract.limits import (
    GATE_LOOK_S,
    MAX_KEY_FILE_BYTES,
    MAX_TENANT_WEIGHT,
    MIN_TENANT_WEIGHT,
    TenantQuotas,
)

log = structlog.get_logger("segue.quotas")


class QuotasFile:
    """`of` a tenant, as the file has it now; the last good one where it cannot be read. It is
    looked at once in `GATE_LOOK_S`.

    Raises:
        InvalidArgument: the file cannot be read at the start.
    """

    def __init__(self, path: Path, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._monotonic = monotonic
        self._stamp = self._stat()
        self._default, self._tenants = self._read()
        self._looked_s = monotonic()

    def of(self, tenant: str) -> TenantQuotas:
        if self._monotonic() - self._looked_s >= GATE_LOOK_S:
            self._look()
        return self._tenants.get(tenant, self._default)

    def _look(self) -> None:
        self._looked_s = self._monotonic()
        stamp = self._stat()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._default, self._tenants = self._read()
        except SegueError as error:
            log.error("quotas_kept", file=str(self._path), error=str(error),
                      hint="The last good ones are used until the file is right.")  # fmt: skip

    def _stat(self) -> tuple[int, int, int]:
        try:
            found = self._path.stat()
        except OSError:
            return (0, 0, 0)
        return (found.st_mtime_ns, found.st_size, found.st_ino)

    def _read(self) -> tuple[TenantQuotas, dict[str, TenantQuotas]]:
        try:
            with self._path.open("rb") as file:
                data = file.read(MAX_KEY_FILE_BYTES + 1)
        except OSError as error:
            raise InvalidArgument(
                f"The tenants' quotas {self._path} cannot be read.",
                hint="Give a file as in docs/security.md as --quotas.",
            ) from error
        return read_quotas(data)


def quotas_of(path: Path | None, *, keyed: bool) -> Callable[[str], TenantQuotas]:
    """Quotas by tenant: the file's; without one the usual ones where tenants have keys, and none on
    an open loopback, where there is one tenant. Raises InvalidArgument."""
    if path is not None:
        return QuotasFile(path).of
    usual = TenantQuotas() if keyed else UNLIMITED
    return lambda tenant: usual


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
