"""Why a TLS connection failed, in words, from what gRPC and OpenSSL say. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reason:
    message: str
    hint: str


_UNTRUSTED = Reason(
    "Its certificate is signed by none of the authorities that are believed here.",
    "Give the certificate of its authority: --tls-ca FILE, tls_ca= or SEGUE_CA.",
)
_EXPIRED = Reason(
    "Its certificate has expired, or this machine's clock is wrong.",
    "Issue a new one there (`segue ca rotate`); running programs read it by themselves.",
)
_EARLY = Reason("Its certificate is not valid yet.", "Compare both machines' clocks.")
_NAME = Reason(
    "Its certificate is for other names than the address that was asked for.",
    "Use a name that it has (`segue ca show FILE`), or issue one with --host for this address.",
)
_PLAIN = Reason(
    "It does not speak TLS on this port.",
    "Leave out --tls-ca (tls_ca=, SEGUE_CA), or use the port that has TLS.",
)
_WANTS_CLIENT = Reason(
    "It wants a client certificate that it believes.",
    "Give --tls-cert and --tls-key (SEGUE_CERT, SEGUE_KEY), issued by its authority.",
)

# In order: the first part found decides. Lower case.
_PARTS = (
    ("certificate has expired", _EXPIRED),
    ("certificate is not yet valid", _EARLY),
    ("is not in peer certificate", _NAME),
    ("hostname verification check failed", _NAME),
    ("hostname mismatch", _NAME),
    ("ip address mismatch", _NAME),
    ("certificate_required", _WANTS_CLIENT),
    ("certificate required", _WANTS_CLIENT),
    ("alert_bad_certificate", _WANTS_CLIENT),
    ("alert_unknown_ca", _WANTS_CLIENT),
    ("alert unknown ca", _WANTS_CLIENT),
    ("alert bad certificate", _WANTS_CLIENT),
    ("certificate_verify_failed", _UNTRUSTED),
    ("certificate verify failed", _UNTRUSTED),
    ("wrong_version_number", _PLAIN),
    ("wrong version number", _PLAIN),
    ("record layer failure", _PLAIN),
    ("http_request", _PLAIN),
)


def explain(detail: str) -> Reason | None:
    """None where `detail` speaks of something else than certificates."""
    text = detail.lower()
    return next((reason for part, reason in _PARTS if part in text), None)
