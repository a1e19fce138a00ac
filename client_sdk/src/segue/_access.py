"""How a client shows who it is, and whom it believes: arguments, else the environment."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc

from segue_contract.errors import InvalidArgument
from segue_contract.transport.channel import Token, check_stays_here, check_target, open_channel
from segue_contract.transport.tls import TlsFiles


@dataclass(frozen=True, slots=True)
class Access:
    """`tls` None: without. `token` None: none is sent."""

    tls: TlsFiles | None = None
    token: Token | None = None

    def check(self, target: str) -> str:
        """Return `target`. Raises InvalidArgument where no channel may be opened to it."""
        check_target(target)
        if self.token is not None and self.tls is None:
            check_stays_here(target)
        return target

    def stamp(self) -> tuple[object, ...]:
        """Differs once a certificate was replaced."""
        return self.tls.stamp() if self.tls is not None else ()

    def channel(self, target: str) -> grpc.aio.Channel:
        """Raises InvalidArgument: no address, or files that cannot be used."""
        return open_channel(target, tls=self.tls, token=self.token)


def read_access(
    env: Mapping[str, str],
    *,
    token: str | Callable[[], str] | None = None,
    tls_ca: str | Path | None = None,
    tls_cert: str | Path | None = None,
    tls_key: str | Path | None = None,
) -> Access:
    """Arguments of None are taken from SEGUE_TOKEN, SEGUE_CA, SEGUE_CERT and SEGUE_KEY; "" means
    none.

    Raises:
        InvalidArgument: a certificate is given without TLS, or without its key.
    """
    ca = _path(env.get("SEGUE_CA", "") if tls_ca is None else tls_ca)
    certificate = _path(env.get("SEGUE_CERT", "") if tls_cert is None else tls_cert)
    key = _path(env.get("SEGUE_KEY", "") if tls_key is None else tls_key)
    if (certificate is None) != (key is None):
        raise InvalidArgument(
            "A certificate goes with its key, and one of the two is not given.",
            hint="Give both: tls_cert= and tls_key=, or SEGUE_CERT and SEGUE_KEY.",
        )
    given = env.get("SEGUE_TOKEN", "") if token is None else token
    if not given:
        teller: Token | None = None
    elif callable(given):
        teller = given
    else:
        text = given
        teller = lambda: text  # noqa: E731
    tls = TlsFiles(certificate, key, ca) if ca is not None else None
    return Access(tls, teller)


def _path(given: str | Path) -> Path | None:
    return Path(given) if str(given) else None
