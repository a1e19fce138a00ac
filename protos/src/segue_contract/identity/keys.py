"""The API keys of tenants: Ed25519 key pairs. Whoever holds one issues tokens for that tenant.

The private half is one line of text, "segue-key-<tenant>-<kid>-<base64url>", which fits a variable
(`API_KEY_VARIABLE`); the public halves of all tenants are one JSON file that nodes read:

    {"keys": [{"kid": ..., "tenant": ..., "public": <base64url>, "created": <Unix seconds>,
               "revoked_before": <Unix seconds, optional>, "revoked": <optional, too>}]}

Pure in what it does: no file, clock or chance of its own. A key's `kid` is made from its public
half (the first 80 bits of its SHA-256), so a key that was copied wrong is noticed.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Final

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from segue_contract import base64url
from segue_contract.errors import UNREADABLE, InvalidArgument, Unauthenticated
from segue_contract.ids import check_id, new_id
from segue_contract.limits import MAX_KEY_FILE_BYTES, MAX_TENANT_KEYS

API_KEY_VARIABLE: Final = "SEGUE_API_KEY"
KEY_BYTES: Final = 32  # of an Ed25519 key, either half (RFC 8032)

# Both parts after the tenant have a fixed length, so that a tenant's name may hold "-".
_API_KEY = re.compile(r"segue-key-(.+)-([0-9a-z]{16})-([A-Za-z0-9_-]{43})", re.ASCII)


@dataclass(frozen=True, slots=True)
class IssuerKey:
    """The private half: what an app's back end holds. Neither `repr` nor an error shows it."""

    tenant: str
    kid: str
    private: Ed25519PrivateKey = field(repr=False, compare=False)

    @classmethod
    def new(cls, tenant: str, random_bytes: Callable[[int], bytes]) -> IssuerKey:
        """A fresh key of `random_bytes` (`os.urandom`).

        Raises:
            InvalidArgument: `tenant` is no name.
        """
        check_id(tenant, "tenant")
        return cls._of(tenant, random_bytes(KEY_BYTES))

    @classmethod
    def parse(cls, text: str) -> IssuerKey:
        """The key that `text` is.

        Raises:
            InvalidArgument: it is none, or a damaged one; the text is not quoted.
        """
        found = _API_KEY.fullmatch(text.strip())
        if found is None:
            raise InvalidArgument(
                "The API key does not read segue-key-<tenant>-<kid>-<secret>.",
                hint="Copy the whole line that `segue tenant add` printed.",
            )
        tenant, kid, secret = found.groups()
        check_id(tenant, "tenant")
        key = cls._of(tenant, _unbase64(secret, "API key"))
        if key.kid != kid:
            raise InvalidArgument(
                "The API key is damaged: its secret does not belong to its key id.",
                hint="Copy the whole line that `segue tenant add` printed.",
                kid=kid,
            )
        return key

    @classmethod
    def _of(cls, tenant: str, secret: bytes) -> IssuerKey:
        private = Ed25519PrivateKey.from_private_bytes(secret)
        return cls(tenant, key_id(private.public_key().public_bytes_raw()), private)

    def text(self) -> str:
        """The secret line that `parse` reads: show it once, and to its owner alone."""
        secret = base64url.encode(self.private.private_bytes_raw())
        return f"segue-key-{self.tenant}-{self.kid}-{secret}"

    def public(self, created_s: float) -> PublicKey:
        """What nodes have to know of it."""
        raw = self.private.public_key().public_bytes_raw()
        return PublicKey(self.kid, self.tenant, raw, created_s)


@dataclass(frozen=True, slots=True)
class PublicKey:
    """The public half: what nodes check tokens with.

    Attributes:
        public: 32 bytes, RFC 8032.
        created_s: Unix seconds.
        revoked_before_s: tokens that were issued before are void, later ones are not.
        revoked_s: since when nothing that the key signed counts; inf: it counts.
    """

    kid: str
    tenant: str
    public: bytes
    created_s: float
    revoked_before_s: float = 0.0
    revoked_s: float = math.inf

    @property
    def is_revoked(self) -> bool:
        return self.revoked_s < math.inf

    def verifier(self) -> Ed25519PublicKey:
        return Ed25519PublicKey.from_public_bytes(self.public)


class KeySet:
    """The public keys that a node knows, by key id: a value, made anew when its file changes."""

    def __init__(self, keys: Iterable[PublicKey] = ()) -> None:
        """Raises InvalidArgument: two keys of one id, or more than `MAX_TENANT_KEYS`."""
        self._keys: dict[str, PublicKey] = {}
        for key in keys:
            if key.kid in self._keys:
                raise InvalidArgument(
                    f"The key {key.kid} is there twice.", hint="Take one of them out of the file."
                )
            self._keys[key.kid] = key
        if len(self._keys) > MAX_TENANT_KEYS:
            raise InvalidArgument(
                f"There are {len(self._keys)} keys of tenants; {MAX_TENANT_KEYS} are allowed.",
                hint="Take out those that were revoked.",
            )

    @classmethod
    def read(cls, text: str) -> KeySet:
        """The keys in a file's text.

        Raises:
            InvalidArgument: it is no such file; all of it is refused, never a part.
        """
        if len(text) > MAX_KEY_FILE_BYTES:
            raise InvalidArgument(
                f"The file of tenants' keys is larger than {MAX_KEY_FILE_BYTES} bytes.",
                hint="Name the file that `segue tenant add` writes.",
            )
        try:
            entries = msgspec.json.decode(text, type=_File).keys
        except UNREADABLE as error:
            raise InvalidArgument(
                f"This is no file of tenants' keys: {error}.",
                hint="Name the file that `segue tenant add` writes.",
            ) from error
        return cls(_read(entry) for entry in entries)

    def text(self) -> str:
        """What `read` reads."""
        file = _File([_entry(key) for key in self.keys])
        return msgspec.json.format(msgspec.json.encode(file), indent=2).decode() + "\n"

    @property
    def keys(self) -> tuple[PublicKey, ...]:
        """In the file's order."""
        return tuple(self._keys.values())

    def key(self, kid: str) -> PublicKey:
        """Whose token is checked.

        Raises:
            Unauthenticated: no such key, or it was revoked. Nothing is asked for elsewhere.
        """
        found = self._keys.get(kid)
        if found is None:
            raise Unauthenticated(
                "The token was signed with a key that this node does not know.",
                hint="Add the tenant's key to the node's --tenant-keys, or issue with a known one.",
            )
        if found.is_revoked:
            raise Unauthenticated(
                "The token was signed with a key that was revoked.",
                hint="Issue tokens with another key: segue tenant add.",
            )
        return found

    def with_key(self, key: PublicKey) -> KeySet:
        """These and one more. Raises as the constructor."""
        return KeySet((*self.keys, key))

    def revoked(self, kid: str, now_s: float) -> KeySet:
        """These, of which one counts no more: whatever it signed, and will sign.

        Raises:
            InvalidArgument: no such key.
        """
        return self._changed(kid, lambda key: replace(key, revoked_s=min(key.revoked_s, now_s)))

    def revoked_before(self, kid: str, time_s: float) -> KeySet:
        """These; tokens of one key issued before `time_s` are void, and the key goes on.

        Raises:
            InvalidArgument: no such key.
        """
        # Tokens say whole seconds: those of the second that has begun are void, too.
        watermark = float(math.ceil(time_s))
        return self._changed(
            kid,
            lambda key: replace(key, revoked_before_s=max(key.revoked_before_s, watermark)),
        )

    def _changed(self, kid: str, change: Callable[[PublicKey], PublicKey]) -> KeySet:
        if kid not in self._keys:
            raise InvalidArgument(f"There is no key {kid!r}.", hint="See `segue tenant list`.")
        return KeySet(change(key) if key.kid == kid else key for key in self.keys)


def key_id(public: bytes) -> str:
    """The id of a key: the first 80 bits of its public half's SHA-256, in base 32."""
    digest = hashlib.sha256(public).digest()
    return new_id("", lambda count: digest[:count])


class _Entry(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    kid: str
    tenant: str
    public: str
    created: float
    revoked_before: float | None = None
    revoked: float | None = None


class _File(msgspec.Struct, forbid_unknown_fields=True):
    keys: list[_Entry]


def _read(entry: _Entry) -> PublicKey:
    check_id(entry.tenant, "tenant")
    public = _unbase64(entry.public, f"public key {entry.kid!r}")
    if len(public) != KEY_BYTES or key_id(public) != entry.kid:
        raise InvalidArgument(
            f"The public key {entry.kid!r} is damaged: it does not belong to its id.",
            hint="Take the entry as `segue tenant add` wrote it.",
        )
    return PublicKey(
        entry.kid,
        entry.tenant,
        public,
        entry.created,
        0.0 if entry.revoked_before is None else entry.revoked_before,
        math.inf if entry.revoked is None else entry.revoked,
    )


def _entry(key: PublicKey) -> _Entry:
    return _Entry(
        key.kid,
        key.tenant,
        base64url.encode(key.public),
        key.created_s,
        key.revoked_before_s or None,
        key.revoked_s if key.is_revoked else None,
    )


def _unbase64(text: str, what: str) -> bytes:
    """Raises InvalidArgument where `text` is not what `base64url.encode` makes."""
    try:
        data = base64url.decode(text)
    except ValueError:
        data = b""
    if base64url.encode(data) != text:
        raise InvalidArgument(
            f"The {what} is no base64url text.", hint="Copy it again, whole and unchanged."
        )
    return data
