"""Session tokens: EdDSA JWTs of some minutes, issued by an app's back end to its users' devices.

Claims: `iss aud sub(device) ten ses[] ops[] nbf exp jti`, and `cnf.jkt` where the token is bound to
a device's key (RFC 7519, RFC 7800, RFC 9449). The header has `alg`, `kid` and `typ`, nothing else.

Pure in what it does: no clock, no chance, no I/O. PyJWT is asked for signature, issuer, audience
and that every claim is there; times are compared here, with the time that the caller gives.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Final, Literal, TypeAlias

import jwt
import msgspec

from segue_contract import base64url
from segue_contract.errors import UNREADABLE, InvalidArgument, Unauthenticated
from segue_contract.identity.keys import IssuerKey, KeySet
from segue_contract.identity.principal import Kind, Principal, Right, check_session_pattern
from segue_contract.ids import check_id
from segue_contract.limits import (
    CLOCK_SKEW_S,
    MAX_COUNT,
    MAX_TOKEN_BYTES,
    MAX_TOKEN_LIFETIME_S,
    MAX_TOKEN_SESSIONS,
    TOKEN_CACHE,
)

ISSUER: Final = "segue-tenant"
DEVICE_AUDIENCE: Final = "segue-device"  # principals of another kind have another one

_ALGORITHM: Final = "EdDSA"
_REQUIRED: Final = ("iss", "aud", "sub", "ten", "ses", "ops", "nbf", "exp", "jti")
_OPTIONS: Any = {
    "require": list(_REQUIRED),
    "verify_signature": True,
    "verify_iss": True,
    "verify_aud": True,
    "strict_aud": True,
    "verify_sub": True,
    "verify_jti": True,
    # with the caller's clock, below
    "verify_exp": False,
    "verify_nbf": False,
    "verify_iat": False,
}
_THUMBPRINT = re.compile(r"[A-Za-z0-9_-]{43}", re.ASCII)
_RENEW = "Ask the app's back end for a new token (segue.tokens.issue, or `segue token issue`)."


def issue(
    key: IssuerKey,
    *,
    device: str,
    sessions: Sequence[str],
    rights: Iterable[Right],
    lifetime_s: float,
    now_s: float,
    token_id: str,
    audience: str = DEVICE_AUDIENCE,
    device_key: str = "",
) -> str:
    """A token of the key's tenant.

    Args:
        sessions: names, or a name's beginning and "*"; ["*"]: all of the tenant.
        lifetime_s: up to `MAX_TOKEN_LIFETIME_S`; rounded up to whole seconds, the begun one is one.
        now_s: Unix seconds; it is valid from here on.
        token_id: unique among the tenant's tokens, for logs.
        device_key: RFC 7638 thumbprint of the key that the device has to prove; "": none.

    Raises:
        InvalidArgument: a value that no node would take.
    """
    asked = frozenset(rights)
    if not asked:
        raise InvalidArgument("The token has no right.", hint=f"Give some of: {_all_rights()}.")
    if not 0 < lifetime_s <= MAX_TOKEN_LIFETIME_S:
        raise InvalidArgument(
            f"The token would live for {lifetime_s} s.",
            hint=f"Use more than 0 and at most {MAX_TOKEN_LIFETIME_S:g} s; devices renew theirs.",
        )
    if device_key and not _THUMBPRINT.fullmatch(device_key):
        raise InvalidArgument(
            "The device's key is no thumbprint of a key.",
            hint="Give the RFC 7638 thumbprint: 43 characters of base64url.",
        )
    begin = math.floor(now_s)
    claims: dict[str, Any] = {
        "iss": ISSUER,
        "aud": audience,
        "sub": check_id(device, "device"),
        "ten": key.tenant,
        "ses": list(_check_sessions(sessions)),
        "ops": sorted(asked),
        "nbf": begin,
        "exp": begin + math.ceil(lifetime_s),
        "jti": check_id(token_id, "token"),
    }
    if device_key:
        claims["cnf"] = {"jkt": device_key}
    return jwt.encode(claims, key.private, algorithm=_ALGORITHM, headers={"kid": key.kid})


class TokenChecker:
    """Says who bears a token. For one thread; it remembers what it verified until that expires.

    Args:
        keys: of all tenants. Where their file changes, make a new checker: it remembers nothing.
        audience: what kind of principal it is asked about.
        bound: take tokens that are bound to a device's key; whoever sets it has the device prove
            `Principal.device_key`. Otherwise they are refused: taken unproven, they would bind
            nobody.
    """

    def __init__(
        self, keys: KeySet, audience: str = DEVICE_AUDIENCE, *, bound: bool = False
    ) -> None:
        self._bound = bound
        self._keys = keys
        self._audience = audience
        self._known: dict[bytes, Principal] = {}  # by the token's hash, the latest used last

    def principal(self, token: str, now_s: float, *, late_s: float = 0.0) -> Principal:
        """Who bears `token`, at `now_s` (Unix seconds); also `late_s` after it expired.

        Raises:
            Unauthenticated: it is no token of ours, damaged, of another audience, not valid yet or
                not any more. The token is not quoted.
        """
        if not token.isascii() or len(token) > MAX_TOKEN_BYTES:
            raise _refused("has characters or a length that no token has")
        name = hashlib.sha256(token.encode()).digest()
        known = self._known.pop(name, None)
        found = self._verified(token) if known is None else known
        _check_times(found, now_s, late_s)
        while len(self._known) >= TOKEN_CACHE:
            del self._known[next(iter(self._known))]
        self._known[name] = found
        return found

    def knows(self, token: str) -> bool:
        """It was verified before: to ask for it again is no work."""
        return hashlib.sha256(token.encode("utf-8", "replace")).digest() in self._known

    def changes(self) -> int:
        """How often the keys changed."""
        return 0

    def key_of(self, token: str) -> str:
        """The id of the key that a token names. Raises Unauthenticated where it cannot be read."""
        return _header(token).kid

    def void_before(self, key: str) -> float:
        """Unix seconds: tokens of that key which are valid since before are void; inf: all are."""
        try:
            return self._keys.key(key).revoked_before_s
        except Unauthenticated:
            return math.inf

    def _verified(self, token: str) -> Principal:
        """What a token says whose signature, issuer and audience are right; not its times."""
        try:
            header = _header(token)
            key = self._keys.key(header.kid)
            claims = jwt.decode(
                token,
                key.verifier(),
                algorithms=[_ALGORITHM],
                options=_OPTIONS,
                audience=self._audience,
                issuer=ISSUER,
            )
            said = msgspec.convert(claims, _Claims)
        except jwt.MissingRequiredClaimError as error:
            raise _refused(f"has no {error.claim}") from None
        except jwt.InvalidSignatureError:
            raise _refused("has a signature that is not of its key") from None
        except jwt.InvalidAudienceError:
            raise _refused("is for another audience") from None
        except jwt.InvalidIssuerError:
            raise _refused("is of another issuer") from None
        except (jwt.PyJWTError, msgspec.ValidationError):
            raise _refused("cannot be read") from None
        if said.ten != key.tenant:
            raise _refused("names another tenant than that of its key")
        if said.cnf is not None and not self._bound:
            raise _refused("is bound to a key, and this node asks no device to prove its own")
        if said.nbf < key.revoked_before_s:
            raise _refused("was revoked")
        return said.principal()


def shown(token: str) -> dict[str, Any]:
    """Header and claims of a token, for people: nothing of it is verified.

    Raises:
        Unauthenticated: it cannot be read.
    """
    try:
        found = jwt.decode_complete(token, options={"verify_signature": False})
    except (jwt.PyJWTError, UnicodeEncodeError):
        raise _refused("cannot be read") from None
    return {"header": found["header"], "claims": found["payload"]}


def rights_of(names: Iterable[str]) -> frozenset[Right]:
    """The rights of those names. Raises InvalidArgument where one is none."""
    found = set()
    for name in names:
        if name not in frozenset(Right):
            raise InvalidArgument(f"There is no right {name!r}.", hint=f"Use {_all_rights()}.")
        found.add(Right(name))
    return frozenset(found)


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Nothing else may stand there: no key, no address of one, no extension (RFC 7515 4.1)."""

    alg: str
    kid: str
    typ: Literal["JWT"]


def _header(token: str) -> _Header:
    """Which key is said to have signed it: a tenth of the time of PyJWT's own look.

    Raises:
        Unauthenticated: another header than ours, or another algorithm.
    """
    head, dot, _ = token.partition(".")
    try:
        header = msgspec.json.decode(base64url.decode(head), type=_Header)
    except (*UNREADABLE, ValueError):
        raise _refused("has another header than ours") from None
    if not dot or "=" in token:
        raise _refused("cannot be read")
    if header.alg != _ALGORITHM:
        raise _refused(f"is not signed with {_ALGORITHM}")
    return header


# beyond what a float counts exactly no time is one
_Seconds: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=MAX_COUNT)]


class _Bound(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """To a key by its thumbprint; bound otherwise, a token is refused, not taken as free."""

    jkt: str


class _Claims(msgspec.Struct, frozen=True):
    """What is read of a payload; `iss` and `aud` were compared before."""

    sub: str
    ten: str
    ses: list[str]
    ops: list[Right]
    nbf: _Seconds
    exp: _Seconds
    jti: str
    cnf: _Bound | None = None

    def principal(self) -> Principal:
        """Raises Unauthenticated where a value is outside what `issue` allows."""
        try:
            check_id(self.sub, "device")
            check_id(self.jti, "token")
            sessions = _check_sessions(self.ses)
        except InvalidArgument as error:
            raise _refused("has a name that cannot be one", error.message) from None
        if not self.ops:
            raise _refused("has no right")
        if not 0 < self.exp - self.nbf <= MAX_TOKEN_LIFETIME_S:
            raise _refused(f"lives for longer than {MAX_TOKEN_LIFETIME_S:g} s, or never")
        if self.cnf is not None and not _THUMBPRINT.fullmatch(self.cnf.jkt):
            raise _refused("is bound to what is no key's thumbprint")
        return Principal(
            kind=Kind.DEVICE,
            tenant=self.ten,
            name=self.sub,
            sessions=sessions,
            rights=frozenset(self.ops),
            expires_s=float(self.exp),
            issued_s=float(self.nbf),
            token_id=self.jti,
            device_key="" if self.cnf is None else self.cnf.jkt,
        )


def _check_times(found: Principal, now_s: float, late_s: float) -> None:
    if now_s >= found.expires_s + late_s:
        raise _refused("has expired")
    if now_s < found.issued_s - CLOCK_SKEW_S:
        raise _refused("is not valid yet", "Compare the clocks of its issuer and of this node.")


def _check_sessions(sessions: Sequence[str]) -> tuple[str, ...]:
    if isinstance(sessions, str):
        raise InvalidArgument("sessions is one text.", hint='Give a list: sessions=["..."].')
    if not 0 < len(sessions) <= MAX_TOKEN_SESSIONS:
        raise InvalidArgument(
            f"The token names {len(sessions)} sessions.",
            hint=f"Name 1 to {MAX_TOKEN_SESSIONS}, or beginnings of names with * at the end.",
        )
    return tuple(check_session_pattern(session) for session in sessions)


def _refused(why: str, hint: str = _RENEW) -> Unauthenticated:
    return Unauthenticated(f"The token {why}.", hint=hint)


def _all_rights() -> str:
    return ", ".join(Right)
