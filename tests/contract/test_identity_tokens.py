"""Session tokens: what was issued is what is found, and nothing else passes."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import random
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from segue_contract.errors import InvalidArgument, Unauthenticated
from segue_contract.identity import tokens
from segue_contract.identity.keys import IssuerKey, KeySet
from segue_contract.identity.principal import Kind, Right
from segue_contract.identity.tokens import DEVICE_AUDIENCE, ISSUER, TokenChecker, issue, shown
from segue_contract.limits import (
    CLOCK_SKEW_S,
    MAX_TOKEN_BYTES,
    MAX_TOKEN_LIFETIME_S,
    MAX_TOKEN_SESSIONS,
)

NOW = 1_800_000_000.25
KEY = IssuerKey.new("acme", random.Random(1).randbytes)
OTHER = IssuerKey.new("other", random.Random(2).randbytes)
KEYS = KeySet([KEY.public(1.0), OTHER.public(1.0)])
THUMBPRINT = "0ZcOCORZNYy-DWpqq30jZyJGHTN0d2HglBV3uiguA4I"  # of RFC 9449's example

names = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,12}[A-Za-z0-9])?", fullmatch=True)
patterns = names | names.map(lambda name: f"{name}*") | names.map(lambda name: f"{name}.*")
some_rights = st.frozensets(st.sampled_from(Right), min_size=1)

CLAIMS: dict[str, Any] = {
    "iss": ISSUER, "aud": DEVICE_AUDIENCE, "sub": "phone", "ten": "acme", "ses": ["trip"],
    "ops": ["read", "send"], "nbf": int(NOW), "exp": int(NOW) + 600, "jti": "t1",
}  # fmt: skip
HEADER: dict[str, Any] = {"alg": "EdDSA", "kid": KEY.kid, "typ": "JWT"}


def part(value: object) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def signed(claims: object, header: object = HEADER, key: IssuerKey = KEY) -> str:
    """A token with any claims and header, and a right signature."""
    text = f"{part(header)}.{part(claims)}"
    return f"{text}.{part(key.private.sign(text.encode()))}"


def refused(token: str, why: str = "", *, now_s: float = NOW, keys: KeySet = KEYS) -> None:
    with pytest.raises(Unauthenticated, match=why or None) as caught:
        TokenChecker(keys).principal(token, now_s)
    assert caught.value.hint
    assert not token or token not in f"{caught.value} {caught.value.fields}"


def a_token(**changes: Any) -> str:
    asked: dict[str, Any] = {
        "device": "phone", "sessions": ["trip"], "rights": [Right.READ], "lifetime_s": 600,
        "now_s": NOW, "token_id": "t1",
    }  # fmt: skip
    return issue(KEY, **{**asked, **changes})


# -- what was issued is what is found -------------------------------------------------------------


@given(
    device=names,
    sessions=st.lists(patterns | st.just("*"), min_size=1, max_size=5),
    rights=some_rights,
    lifetime_s=st.floats(0.001, MAX_TOKEN_LIFETIME_S),
    now_s=st.floats(0, 2**33),
    token_id=names,
    device_key=st.sampled_from(["", THUMBPRINT]),
    age=st.floats(0, 0.99),
)
def test_a_token_says_what_it_was_issued_for(
    device: str, sessions: list[str], rights: frozenset[Right], lifetime_s: float, now_s: float,
    token_id: str, device_key: str, age: float,
) -> None:  # fmt: skip
    token = issue(
        KEY, device=device, sessions=sessions, rights=rights, lifetime_s=lifetime_s, now_s=now_s,
        token_id=token_id, device_key=device_key,
    )  # fmt: skip
    checker = TokenChecker(KEYS, bound=True)
    found = checker.principal(token, now_s + age * (lifetime_s - 1) if lifetime_s > 1 else now_s)
    assert (found.kind, found.tenant, found.name) == (Kind.DEVICE, "acme", device)
    assert (found.sessions, found.rights) == (tuple(sessions), rights)
    assert (found.token_id, found.device_key, found.via) == (token_id, device_key, "")
    assert 0 <= now_s - found.issued_s < 1
    assert lifetime_s <= found.expires_s - found.issued_s < lifetime_s + 1
    assert checker.principal(token, now_s) == found
    with pytest.raises(Unauthenticated, match="expired"):
        checker.principal(token, found.expires_s)


def test_the_largest_token_fits() -> None:
    token = a_token(
        device="d" * 64, sessions=["s" * 63 + "*"] * MAX_TOKEN_SESSIONS, rights=list(Right),
        lifetime_s=MAX_TOKEN_LIFETIME_S, token_id="t" * 64, device_key=THUMBPRINT,
    )  # fmt: skip
    assert len(token) <= MAX_TOKEN_BYTES
    assert TokenChecker(KEYS, bound=True).principal(token, NOW).device_key == THUMBPRINT


def test_a_token_has_the_form_that_is_documented() -> None:
    said = shown(a_token(rights=[Right.SEND, Right.READ], device_key=THUMBPRINT))
    assert said["header"] == HEADER
    assert said["claims"] == {**CLAIMS, "cnf": {"jkt": THUMBPRINT}}


@pytest.mark.parametrize(
    "changes",
    [
        {"device": ""}, {"device": "a*"}, {"device": "a/b"}, {"sessions": []}, {"sessions": "trip"},
        {"sessions": ["a*b"]}, {"sessions": ["+"]}, {"sessions": ["a"] * (MAX_TOKEN_SESSIONS + 1)},
        {"rights": []}, {"lifetime_s": 0}, {"lifetime_s": -1}, {"lifetime_s": float("nan")},
        {"lifetime_s": float("inf")}, {"lifetime_s": MAX_TOKEN_LIFETIME_S + 1}, {"token_id": ""},
        {"device_key": "short"}, {"device_key": THUMBPRINT + "\n"},
    ],
)  # fmt: skip
def test_what_no_node_takes_is_not_issued(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        a_token(**changes)
    assert caught.value.hint


# -- nothing else passes --------------------------------------------------------------------------


@given(bit=st.integers(0, 10_000))
def test_any_flipped_bit_is_noticed(bit: int) -> None:
    data = bytearray(a_token().encode())
    bit %= len(data) * 8
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(Unauthenticated):
        TokenChecker(KEYS).principal(data.decode("latin-1"), NOW)


def test_every_bit_of_the_signature_counts() -> None:
    """Base64 leaves bits of the last letter unused: another letter there is another token."""
    head, _, signature = a_token().rpartition(".")
    for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_":
        if letter != signature[-1]:
            refused(f"{head}.{signature[:-1]}{letter}")


@pytest.mark.parametrize("tail", ["=", "==", "\n", " ", ".", ".e30"])
def test_a_token_has_one_spelling(tail: str) -> None:
    refused(a_token() + tail)


def test_a_back_end_without_our_code_issues_tokens_as_the_docs_say() -> None:
    """From the API key's text alone, with claims in another order and white space between."""
    text = KEY.text()
    kid, secret = text[-60:-44], base64.urlsafe_b64decode(text[-43:] + "=")
    header = {"kid": kid, "typ": "JWT", "alg": "EdDSA"}
    claims = dict(reversed(CLAIMS.items()))
    body = ".".join(part(json.dumps(one, indent=1).encode()) for one in (header, claims))
    signature = Ed25519PrivateKey.from_private_bytes(secret).sign(body.encode())
    found = TokenChecker(KEYS).principal(f"{body}.{part(signature)}", NOW)
    assert (found.tenant, found.name) == ("acme", "phone")


@given(text=st.text(max_size=80) | st.text('ab.=_-{}[]"', max_size=80))
def test_text_that_is_no_token_is_refused(text: str) -> None:
    with pytest.raises(Unauthenticated):
        TokenChecker(KEYS).principal(text, NOW)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@given(claim=st.sampled_from([*CLAIMS, "cnf"]), value=json_values)
def test_a_claim_of_another_kind_is_refused(claim: str, value: object) -> None:
    """Signed well: what a back end may send that is not ours, or is hostile to other tenants."""
    with contextlib.suppress(Unauthenticated):
        found = TokenChecker(KEYS).principal(signed({**CLAIMS, claim: value}), NOW)
        assert claim in {"sub", "jti", "nbf", "exp", "ses", "ops", "cnf"}
        assert (found.tenant, found.kind) == ("acme", Kind.DEVICE)
        assert 0 < found.expires_s - found.issued_s <= MAX_TOKEN_LIFETIME_S


@given(name=st.sampled_from(["alg", "kid", "typ", "crit", "b64", "jwk"]), value=json_values)
def test_a_header_of_another_kind_is_refused(name: str, value: object) -> None:
    if HEADER.get(name) != value:
        refused(signed(CLAIMS, {**HEADER, name: value}))


@pytest.mark.parametrize("claims", [b"", b"{", b"[" * 2500, b"[]", b"1", b'{"exp":' + b"9" * 2500])
def test_a_payload_that_is_no_json_object_is_refused(claims: bytes) -> None:
    refused(signed(claims), "cannot be read")


@pytest.mark.parametrize("header", [b"", b"{", b"[" * 2500, b"[]", b"\xff", b"null"])
def test_a_header_that_is_no_json_object_is_refused(header: bytes) -> None:
    refused(signed(CLAIMS, header), "header")


@pytest.mark.parametrize("claim", [*CLAIMS])
def test_a_token_without_a_claim_is_refused(claim: str) -> None:
    """Without `exp`, too: it would never end."""
    left = {name: value for name, value in CLAIMS.items() if name != claim}
    refused(signed(left), "" if claim in ("iss", "aud") else f"has no {claim}")


def test_a_token_that_never_ends_is_refused() -> None:
    for end in (2**60, 10**30):
        refused(signed({**CLAIMS, "exp": end}))
    longest = int(NOW) + int(MAX_TOKEN_LIFETIME_S)
    assert TokenChecker(KEYS).principal(signed({**CLAIMS, "exp": longest}), NOW).name == "phone"
    refused(signed({**CLAIMS, "exp": longest + 1}), "lives for longer")
    refused(signed({**CLAIMS, "exp": CLAIMS["nbf"]}), "lives for longer|expired")
    refused(signed({**CLAIMS, "exp": None}), "has no exp")
    refused(signed({**CLAIMS, "exp": float("inf")}), "cannot be read")


@pytest.mark.parametrize("alg", ["none", "None", "", None])
def test_a_token_without_a_signature_is_refused(alg: object) -> None:
    bare = f"{part({**HEADER, 'alg': alg})}.{part(CLAIMS)}."
    refused(bare)
    refused(f"{part(HEADER)}.{part(CLAIMS)}.", "signature")
    refused(f"{part(HEADER)}.{part(CLAIMS)}")


@pytest.mark.parametrize("alg", ["HS256", "HS512", "EdDSA"])
def test_a_token_signed_with_the_public_key_as_a_secret_is_refused(alg: str) -> None:
    """The public half is known to all: as the secret of an HMAC it would let everybody sign."""
    text = f"{part({**HEADER, 'alg': alg})}.{part(CLAIMS)}"
    secret = KEY.public(0.0).public
    for form in (secret, part(secret).encode()):
        mac = hmac.new(form, text.encode(), hashlib.sha256).digest()
        refused(f"{text}.{part(mac)}", "EdDSA|signature")


def test_a_token_with_the_algorithm_of_another_key_is_refused() -> None:
    headers = {"kid": KEY.kid}
    curve = ec.generate_private_key(ec.SECP256R1())
    refused(jwt.encode(CLAIMS, curve, algorithm="ES256", headers=headers), "EdDSA")
    # EdDSA is the name of two curves' algorithms; ours is Ed25519
    longer = ed448.Ed448PrivateKey.generate()
    refused(jwt.encode(CLAIMS, longer, algorithm="EdDSA", headers=headers), "signature")


def test_a_token_for_another_audience_is_refused() -> None:
    refused(signed({**CLAIMS, "aud": "segue-operator"}), "audience")
    refused(signed({**CLAIMS, "aud": [DEVICE_AUDIENCE, "segue-operator"]}), "audience")
    refused(a_token(audience="segue-operator"), "audience")
    operators = TokenChecker(KEYS, "segue-operator")
    with pytest.raises(Unauthenticated, match="audience"):
        operators.principal(a_token(), NOW)


def test_a_token_of_another_issuer_is_refused() -> None:
    refused(signed({**CLAIMS, "iss": "somebody"}), "issuer")


def test_a_token_of_tomorrow_is_refused() -> None:
    day = 86_400
    tomorrow = {**CLAIMS, "nbf": int(NOW) + day, "exp": int(NOW) + day + 600}
    refused(signed(tomorrow), "not valid yet")
    ahead = int(NOW + CLOCK_SKEW_S)
    assert TokenChecker(KEYS).principal(signed({**CLAIMS, "nbf": ahead}), NOW).name == "phone"
    refused(signed({**CLAIMS, "nbf": ahead + 1}), "not valid yet")


def test_a_token_of_yesterday_is_refused() -> None:
    day = 86_400
    refused(signed({**CLAIMS, "nbf": int(NOW) - day, "exp": int(NOW) - day + 600}), "expired")
    refused(signed({**CLAIMS, "nbf": int(NOW) - 60, "exp": int(NOW)}), "expired")


def test_a_token_of_an_unknown_key_is_refused() -> None:
    stranger = IssuerKey.new("acme", random.Random(3).randbytes)
    refused(signed(CLAIMS, {**HEADER, "kid": stranger.kid}, stranger), "does not know")
    refused(signed(CLAIMS, HEADER, stranger), "signature")
    for kid in ("", "../../key", "https://example.org/keys", 7, None, ["a"]):
        refused(signed(CLAIMS, {**HEADER, "kid": kid}))


@pytest.mark.parametrize("name", ["*", "+", "#", "a/b", "a+", "a*", "a#", "$SYS", "", "ä"])
def test_a_wildcard_in_a_name_is_refused(name: str) -> None:
    """Names become parts of topics and of access patterns."""
    refused(signed({**CLAIMS, "sub": name}), "name")
    refused(signed({**CLAIMS, "jti": name}), "name")
    if name not in ("*", "a*"):
        refused(signed({**CLAIMS, "ses": ["trip", name]}), "name")
    refused(signed({**CLAIMS, "ses": [f"{name}*b"]}), "name")


def test_a_token_that_names_another_tenant_than_its_keys_is_refused() -> None:
    refused(signed({**CLAIMS, "ten": "other"}), "another tenant")
    crossed = signed({**CLAIMS, "ten": "other"}, {**HEADER, "kid": OTHER.kid})
    refused(crossed, "signature")
    found = TokenChecker(KEYS).principal(
        signed({**CLAIMS, "ten": "other"}, {**HEADER, "kid": OTHER.kid}, OTHER), NOW
    )
    assert found.tenant == "other"


def test_a_token_with_a_right_that_is_none_is_refused() -> None:
    for ops in (["read", "root"], [], ["READ"], "read", {"read": 1}):
        refused(signed({**CLAIMS, "ops": ops}))


def test_a_token_bound_in_a_way_that_is_not_checked_is_refused() -> None:
    for bound in ({}, {"jwk": {}}, {"jkt": "x"}, {"jkt": THUMBPRINT, "x5t#S256": "x"}):
        token = signed({**CLAIMS, "cnf": bound})
        with pytest.raises(Unauthenticated):
            TokenChecker(KEYS, bound=True).principal(token, NOW)


def test_a_bound_token_is_refused_where_nobody_asks_for_the_key() -> None:
    refused(a_token(device_key=THUMBPRINT), "bound to a key")


def test_tokens_of_before_a_keys_watermark_are_void() -> None:
    marked = KEYS.revoked_before(KEY.kid, NOW)
    refused(a_token(), "revoked", keys=marked)
    fresh = a_token(now_s=NOW + 1)
    assert TokenChecker(marked).principal(fresh, NOW + 1).name == "phone"
    refused(fresh, "key that was revoked", keys=marked.revoked(KEY.kid, NOW), now_s=NOW + 1)


# -- what is remembered ---------------------------------------------------------------------------


def test_what_was_verified_is_not_verified_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    verify = TokenChecker._verified
    monkeypatch.setattr(
        TokenChecker, "_verified", lambda self, token: asked.append(token) or verify(self, token)
    )
    checker = TokenChecker(KEYS)
    token = a_token()
    assert checker.principal(token, NOW) is checker.principal(token, NOW + 599)
    assert asked == [token]
    for late in (NOW + 600, NOW - 60):
        with pytest.raises(Unauthenticated):
            checker.principal(token, late)


def test_memory_of_tokens_is_bounded_and_the_latest_used_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokens, "TOKEN_CACHE", 3)
    checker = TokenChecker(KEYS)
    made = [a_token(token_id=f"t{number}") for number in range(9)]
    for token in made:
        checker.principal(made[0], NOW)
        checker.principal(token, NOW)
        assert len(checker._known) <= 3
    known = {principal.token_id for principal in checker._known.values()}
    assert known == {"t0", "t7", "t8"}
    with pytest.raises(Unauthenticated):
        checker.principal("no token", NOW)
    assert len(checker._known) == 3


def test_what_cannot_be_read_is_not_shown() -> None:
    for text in ("", "a.b.c", "\ud800", a_token()[:30]):
        with pytest.raises(Unauthenticated):
            shown(text)
