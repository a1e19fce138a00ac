"""How a client shows who it is, and whom it believes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc

from segue._settings import Settings
from segue._token_command import TokenCommand
from segue_contract.errors import InvalidArgument
from segue_contract.transport.channel import Token, check_stays_here, check_target, open_channel
from segue_contract.transport.tls import TlsFiles


@dataclass(frozen=True, slots=True)
class Access:
    """`tls` None: without. `token` None: none is sent; with `renews` it may give another one.

    `open`: makes the channels; as `open_channel`.
    """

    tls: TlsFiles | None = None
    token: Token | None = None
    renews: bool = False
    open: Callable[..., grpc.aio.Channel] = open_channel

    async def prepare(self) -> None:
        """Have a token before the first call, where a command gives it.

        Raises:
            Unauthenticated: it gives none.
        """
        if isinstance(self.token, TokenCommand):
            await asyncio.to_thread(self.token.refresh)

    def refused(self) -> None:
        """A node takes the token no more."""
        if isinstance(self.token, TokenCommand):
            self.token.forget()

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
        return self.open(target, tls=self.tls, token=self.token)


def read_access(
    settings: Settings,
    *,
    token: str | Callable[[], str] | None = None,
    tls_ca: str | Path | None = None,
    tls_cert: str | Path | None = None,
    tls_key: str | Path | None = None,
) -> Access:
    """Arguments of None are taken from `settings`; "" means none.

    Raises:
        InvalidArgument: a certificate is given without TLS, or without its key.
    """
    ca = _path(settings.ca.value if tls_ca is None else tls_ca)
    certificate = _path(settings.cert.value if tls_cert is None else tls_cert)
    key = _path(settings.key.value if tls_key is None else tls_key)
    if (certificate is None) != (key is None):
        raise InvalidArgument(
            "A certificate goes with its key, and one of the two is not given.",
            hint="Give both: tls_cert= and tls_key=, or SEGUE_CERT and SEGUE_KEY.",
        )
    if certificate is not None and ca is None and tls_ca is None:
        raise InvalidArgument(
            "A certificate is shown over TLS alone, and TLS is off.",
            hint="Say whom to believe: tls_ca=, or SEGUE_CA.",
        )
    given = settings.token.value if token is None else token
    if token is None and not given and settings.token_command.value:
        given = TokenCommand(settings.token_command.value)
    if not given:
        teller: Token | None = None
    elif callable(given):
        teller = given
    else:
        text = given
        teller = lambda: text  # noqa: E731
    tls = TlsFiles(certificate, key, ca) if ca is not None else None
    return Access(tls, teller, renews=callable(given))


def _path(given: str | Path) -> Path | None:
    return Path(given) if str(given) else None
