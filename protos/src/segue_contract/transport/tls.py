"""TLS of gRPC listeners and channels, from PEM files that may be replaced while we run.

A listener reads its files again with the first connection after they changed, and keeps the last
good ones where they are broken: a rotation neither restarts a program nor ends a stream. A channel
reads them when it is opened.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import grpc

from segue_contract.errors import InvalidArgument

if TYPE_CHECKING:
    import ssl

    from cryptography import x509

Clients = Literal["none", "required"]
"""Whether a listener asks for client certificates. gRPC for Python cannot ask and go on without."""

SYSTEM = Path("system")
"""As `ca`: the public authorities that this installation knows."""

NODE_SCHEME = "segue:"
_NODE_NAME = re.compile(r"(edge/[\w.-]{1,64}/[\w.-]{1,64}|(cloud|operator)/[\w.-]{1,64})", re.ASCII)
_MAX_FILE_BYTES = 1 << 20  # a bundle of authorities has 200 KiB

_Stamp = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files: our chain, its key, and the authorities (`ca`) whose certificates we believe.

    As a channel's: `ca` None or `SYSTEM` believes public authorities.
    """

    certificate: Path | None = None
    key: Path | None = None
    ca: Path | None = None

    def stamp(self) -> _Stamp:
        """Differs once a file was replaced or rewritten; a missing file has one, too."""
        stamps = []
        for path in (self.certificate, self.key, self.ca):
            try:
                found = path.stat() if path is not None and path != SYSTEM else None
            except OSError:
                found = None
            facts = (found.st_mtime_ns, found.st_size, found.st_ino) if found else (0, 0, 0)
            stamps.append(facts)
        return tuple(stamps)


@dataclass(frozen=True, slots=True)
class _Loaded:
    chain: bytes
    key: bytes
    roots: bytes | None
    leaf: x509.Certificate | None


def check_node_name(name: str) -> str:
    """Return `name` where it reads "edge/SITE/NAME", "cloud/NAME" or "operator/NAME".

    Raises:
        InvalidArgument: it does not.
    """
    if not _NODE_NAME.fullmatch(name):
        raise InvalidArgument(
            f"{name!r} is no name of a node.",
            hint="Write edge/SITE/NAME, cloud/NAME or operator/NAME with letters, digits, '.', '_' "
            "and '-'.",
        )
    return name


def peer_name(context: Any) -> str:
    """The node behind a call, as its verified certificate names it; "" where it has no such name.

    A certificate with several nodes' names names none.
    """
    facts = context.auth_context()
    if facts.get("transport_security_type") != [b"ssl"]:
        return ""
    names = set()
    # Of the URIs alone: an authority that signs e-mail addresses checks them as such.
    for value in facts.get("peer_uri", ()):
        text = value.decode("utf-8", "replace")
        if text.startswith(NODE_SCHEME):
            names.add(text.removeprefix(NODE_SCHEME))
    (name,) = names if len(names) == 1 else ("",)
    return name if _NODE_NAME.fullmatch(name) else ""


def server_credentials(files: TlsFiles, *, clients: Clients = "none") -> grpc.ServerCredentials:
    """Of a listener; new connections get what the files hold then.

    Raises:
        InvalidArgument: the files are missing or fit not together.
    """
    if files.certificate is None or files.key is None:
        raise InvalidArgument(
            "A listener with TLS needs a certificate and its key.",
            hint="Give --tls-cert FILE and --tls-key FILE (`segue ca issue` makes both).",
        )
    if clients == "required" and (files.ca is None or files.ca == SYSTEM):
        raise InvalidArgument(
            "Client certificates are required, and no authority of theirs is given.",
            hint="Give --tls-ca FILE, the certificate of your own authority.",
        )
    required = clients == "required"
    source = _Reloading(files, required)
    return grpc.dynamic_ssl_server_credentials(
        source.initial, source.fetch, require_client_authentication=required
    )


def channel_credentials(files: TlsFiles) -> grpc.ChannelCredentials:
    """Of a channel, as the files are now.

    Raises:
        InvalidArgument: the files are missing or fit not together.
    """
    loaded = _load(files, roots=True)
    return grpc.ssl_channel_credentials(
        root_certificates=loaded.roots,
        private_key=loaded.key or None,
        certificate_chain=loaded.chain or None,
    )


def client_context(files: TlsFiles) -> ssl.SSLContext:
    """For clients that use Python's TLS (brokers, stores), as the files are now.

    Raises:
        InvalidArgument: the files are missing or fit not together.
    """
    import ssl

    loaded = _load(files, roots=True)
    roots = loaded.roots.decode("ascii", "replace") if loaded.roots is not None else None
    context = ssl.create_default_context(cadata=roots)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if files.certificate is not None:
        context.load_cert_chain(files.certificate, files.key)
    return context


class _Reloading:
    """A listener's certificates; `fetch` is gRPC's, from a thread of its own, once a handshake."""

    def __init__(self, files: TlsFiles, required: bool) -> None:
        self._files = files
        self._required = required
        self._stamp = files.stamp()
        self.initial = self._configuration()

    def fetch(self) -> Any:
        """What changed, else None. Never raises: the last good ones stay."""
        stamp: _Stamp = ()
        try:
            stamp = self._files.stamp()
            if stamp == self._stamp:
                return None
            return self._configuration()
        except Exception as error:
            _log().error("certificate_kept", error=str(error),
                         hint="The last good one is used until the files are right.")  # fmt: skip
            return None
        finally:
            self._stamp = stamp or self._stamp

    def _configuration(self) -> Any:
        loaded = _load(self._files, roots=self._required)
        if loaded.leaf is not None:
            _log().info("certificate", expires=loaded.leaf.not_valid_after_utc.isoformat(),
                        serial=f"{loaded.leaf.serial_number:x}")  # fmt: skip
        return grpc.ssl_server_certificate_configuration(
            [(loaded.key, loaded.chain)],
            root_certificates=loaded.roots if self._required else None,
        )


def _load(files: TlsFiles, *, roots: bool) -> _Loaded:
    """Raises InvalidArgument; the key is in no message."""
    pair, key, leaf = b"", b"", None
    if files.certificate is not None and files.key is not None:
        pair, key = _read(files.certificate), _read(files.key)
        leaf = _certificates(files.certificate, pair)[0]
        _check_pair(files, leaf, key)
    elif files.certificate is not None or files.key is not None:
        raise InvalidArgument(
            "A certificate goes with its key, and one of the two is not given.",
            hint="Give both: --tls-cert and --tls-key.",
        )
    bundle = None
    if roots and files.ca is not None and files.ca != SYSTEM:
        bundle = _read(files.ca)
        _certificates(files.ca, bundle)
    return _Loaded(pair, key, bundle, leaf)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InvalidArgument(
            f"{path} cannot be read: {error.strerror or error}.",
            hint="Check the path, and that this user may read it.",
        ) from None
    if len(data) > _MAX_FILE_BYTES:
        raise InvalidArgument(f"{path} is too large for certificates.")
    return data


def _certificates(path: Path, data: bytes) -> list[x509.Certificate]:
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificates(data)
    except ValueError:
        raise InvalidArgument(
            f"{path} holds no certificate in PEM form.",
            hint="It begins with -----BEGIN CERTIFICATE-----; it may be half written.",
        ) from None


def _check_pair(files: TlsFiles, leaf: x509.Certificate, key: bytes) -> None:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        private = load_pem_private_key(key, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise InvalidArgument(
            f"{files.key} holds no private key that can be used.",
            hint="It must be PEM and without a passphrase; it may be half written.",
        ) from None
    if not isinstance(private, (ec.EllipticCurvePrivateKey, rsa.RSAPrivateKey)):
        raise InvalidArgument(
            f"{files.key} is of a kind that gRPC does not take.",
            hint="Use a key on P-256, or RSA.",
        )
    if private.public_key() != leaf.public_key():
        raise InvalidArgument(
            f"{files.key} is not the key of {files.certificate}.",
            hint="Give the pair that was issued together.",
        )


def _log() -> Any:
    import structlog  # nodes have it; the client SDK only opens channels

    return structlog.get_logger("segue.tls")
