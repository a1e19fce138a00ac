"""A private certificate authority: what it signs, as values. Files and clocks are the caller's.

Keys are on P-256: gRPC takes no Ed25519 certificates. A node's name stands in the certificate's
alternative names as the URI "segue:edge/SITE/NAME" or "segue:cloud/NAME", never in its subject.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from segue_contract.errors import InvalidArgument
from segue_contract.transport.tls import NODE_SCHEME, check_node_name

AUTHORITY_DAYS = 3650
NODE_DAYS = 90  # as long as public authorities: rotation is practised, and takes no restart
# A node whose clock is a little late would refuse a certificate made just now.
_CLOCK_SKEW = timedelta(minutes=10)


@dataclass(frozen=True, slots=True)
class Issued:
    """PEM. `key` is empty where the key stayed with who asked."""

    certificate: bytes
    key: bytes = b""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a certificate says."""

    subject: str
    nodes: tuple[str, ...]
    hosts: tuple[str, ...]
    authority: bool
    issuer: str
    begins: datetime
    ends: datetime
    serial: str


def new_authority(name: str, now: datetime, *, days: int = AUTHORITY_DAYS) -> Issued:
    """A root that signs nodes' certificates, and no other authority's."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    usage = _usage(signs=True)
    certificate = (
        _builder(subject, subject, key.public_key(), now, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, hashes.SHA256())
    )
    return Issued(_pem(certificate), _key_pem(key))


def issue(
    authority: Issued,
    name: str,
    hosts: Sequence[str],
    now: datetime,
    *,
    days: int = NODE_DAYS,
    request: bytes = b"",
) -> Issued:
    """A node's certificate. What it says is `name` and `hosts`, whatever `request` asks for.

    Args:
        name: "edge/SITE/NAME", "cloud/NAME"; "operator/NAME", of a person who looks after nodes;
            "": a server's without such a name (a broker, a store).
        hosts: names and IP addresses that it is reached by.
        request: the PEM of a signing request, whose key is certified; empty: a key is made.

    Raises:
        InvalidArgument: a name, a host, the request or the authority cannot be used.
    """
    names = _alternative_names(name, hosts)
    root, signer = _authority(authority)
    key: ec.EllipticCurvePrivateKey | None = None
    if request:
        public = _requested_key(request)
    else:
        key = ec.generate_private_key(ec.SECP256R1())
        public = key.public_key()
    ends = now + timedelta(days=days)
    if ends > root.not_valid_after_utc:
        raise InvalidArgument(
            f"The authority itself ends on {root.not_valid_after_utc:%Y-%m-%d}, before that.",
            hint="Use fewer --days, or make a new one (`segue ca rotate --authority`).",
        )
    builder = _builder(x509.Name([]), root.subject, public, now, days)
    certificate = (
        builder.add_extension(x509.SubjectAlternativeName(names), critical=True)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage(_uses(name)),
            critical=False,
        )
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
        .sign(signer, hashes.SHA256())
    )
    return Issued(_pem(certificate), _key_pem(key) if key is not None else b"")


def _uses(name: str) -> list[x509.ObjectIdentifier]:
    """A person serves nobody, and a server without a name is nobody's client."""
    uses = []
    if not name.startswith("operator/"):
        uses.append(ExtendedKeyUsageOID.SERVER_AUTH)
    if name:
        uses.append(ExtendedKeyUsageOID.CLIENT_AUTH)
    return uses


def new_request() -> tuple[bytes, bytes]:
    """A signing request and its key, PEM: the key stays where it is made."""
    key = ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    signed = request.sign(key, hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM), _key_pem(key)


def read_certificates(pem: bytes, shown: str) -> list[Facts]:
    """Raises InvalidArgument, which names the file as `shown`."""
    try:
        return [_facts(one) for one in x509.load_pem_x509_certificates(pem)]
    except ValueError:
        raise InvalidArgument(f"{shown} holds no certificate in PEM form.") from None


def facts_of(der: bytes) -> Facts:
    """Of a certificate as a peer shows it. Raises ValueError."""
    return _facts(x509.load_der_x509_certificate(der))


def _facts(certificate: x509.Certificate) -> Facts:
    nodes: list[str] = []
    hosts: list[str] = []
    authority = False
    for extension in certificate.extensions:
        value = extension.value
        if isinstance(value, x509.SubjectAlternativeName):
            for uri in value.get_values_for_type(x509.UniformResourceIdentifier):
                nodes.append(uri.removeprefix(NODE_SCHEME))
            hosts += value.get_values_for_type(x509.DNSName)
            hosts += [str(ip) for ip in value.get_values_for_type(x509.IPAddress)]
        elif isinstance(value, x509.BasicConstraints):
            authority = value.ca
    return Facts(
        subject=certificate.subject.rfc4514_string(),
        nodes=tuple(nodes),
        hosts=tuple(hosts),
        authority=authority,
        issuer=certificate.issuer.rfc4514_string(),
        begins=certificate.not_valid_before_utc,
        ends=certificate.not_valid_after_utc,
        serial=f"{certificate.serial_number:x}",
    )


def _alternative_names(name: str, hosts: Sequence[str]) -> list[x509.GeneralName]:
    names: list[x509.GeneralName] = []
    if name:
        names.append(x509.UniformResourceIdentifier(NODE_SCHEME + check_node_name(name)))
    for host in hosts:
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host.strip("[]"))))
            continue
        except ValueError:
            pass
        label = host.removeprefix("*.").replace(".", "").replace("-", "")
        if not (label.isascii() and label.isalnum()):
            raise InvalidArgument(
                f"{host!r} is no host.", hint="Write a DNS name or an IP address, without port."
            )
        names.append(x509.DNSName(host))
    if not names:
        raise InvalidArgument(
            "A certificate needs a name or a host.",
            hint="Write edge/SITE/NAME, cloud/NAME or operator/NAME, and --host for each address.",
        )
    return names


def _authority(authority: Issued) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    try:
        roots = x509.load_pem_x509_certificates(authority.certificate)
        key = serialization.load_pem_private_key(authority.key, password=None)
    except (ValueError, TypeError):
        raise InvalidArgument("The authority's files cannot be read.") from None
    # Where a rotation was broken off, the newest certificate of the bundle has no key yet.
    if isinstance(key, ec.EllipticCurvePrivateKey):
        for root in roots:
            if root.public_key() == key.public_key():
                return root, key
    raise InvalidArgument("The authority's key is that of none of its certificates.")


def signing_certificate(authority: Issued) -> bytes:
    """Of its certificates the one whose key signs, PEM. Raises InvalidArgument: there is none."""
    return _pem(_authority(authority)[0])


def _requested_key(request: bytes) -> ec.EllipticCurvePublicKey:
    try:
        asked = x509.load_pem_x509_csr(request)
        public = asked.public_key()
        if not asked.is_signature_valid:
            raise InvalidSignature
    except (ValueError, InvalidSignature):
        raise InvalidArgument(
            "The signing request cannot be read, or is not signed by its own key.",
            hint="Make one with `segue ca request`.",
        ) from None
    if not (
        isinstance(public, ec.EllipticCurvePublicKey) and isinstance(public.curve, ec.SECP256R1)
    ):
        raise InvalidArgument("The request's key must be on P-256.")
    return public


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    now: datetime,
    days: int,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=days))
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
