"""Tenants' API keys: their text, the file of public halves, and what a damaged one becomes."""

from __future__ import annotations

import contextlib
import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segue_contract import base64url
from segue_contract.errors import InvalidArgument, Unauthenticated
from segue_contract.identity import keys
from segue_contract.identity.keys import IssuerKey, KeySet, PublicKey

names = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,12}[A-Za-z0-9])?", fullmatch=True)
seeds = st.integers(0, 2**32)


def make(tenant: str = "acme", seed: int = 1) -> IssuerKey:
    return IssuerKey.new(tenant, random.Random(seed).randbytes)


@given(tenant=names | names.map(lambda name: f"segue-key-{name}"), seed=seeds)
def test_an_api_key_survives_as_text(tenant: str, seed: int) -> None:
    key = make(tenant, seed)
    read = IssuerKey.parse(f" {key.text()}\n")
    assert (read.tenant, read.kid) == (tenant, key.kid)
    assert read.public(5.0) == key.public(5.0)
    assert key.text().startswith(f"segue-key-{tenant}-")


@given(seed=seeds, at=st.integers(0, 200), to=st.characters(codec="ascii"))
def test_a_damaged_api_key_is_refused_or_of_a_misspelt_tenant(seed: int, at: int, to: str) -> None:
    text = make("acme", seed).text()
    at %= len(text)
    damaged = text[:at] + to + text[at + 1 :]
    if damaged.strip() == text:
        return
    with contextlib.suppress(InvalidArgument):
        # the tenant's name has no check of its own: nodes compare it with that of the public half
        assert IssuerKey.parse(damaged).tenant != "acme"


def test_secrets_are_not_shown() -> None:
    key = make()
    secret = key.text()[-43:]
    assert secret not in f"{key!r} {key} {key.public(0.0)!r}"
    with pytest.raises(InvalidArgument) as caught:
        IssuerKey.parse(key.text()[:-1])
    assert secret[:20] not in f"{caught.value} {caught.value.fields}"


@pytest.mark.parametrize("tenant", ["", "a/b", "a*", "+", "ä", "a b", "-a", "x" * 65])
def test_a_tenant_has_a_name(tenant: str) -> None:
    with pytest.raises(InvalidArgument, match="tenant"):
        make(tenant)


public_keys = st.builds(
    lambda tenant, seed, created, before, revoked: PublicKey(
        *(make(tenant, seed).public(created).__getattribute__(name)
          for name in ("kid", "tenant", "public", "created_s")),
        before,
        revoked,
    ),
    names,
    seeds,
    st.floats(0, 2**40),
    st.floats(0, 2**40),
    st.floats(0, 2**40) | st.just(math.inf),
)  # fmt: skip


@given(found=st.lists(public_keys, max_size=4, unique_by=lambda key: key.kid))
def test_a_file_of_keys_survives(found: list[PublicKey]) -> None:
    read = KeySet.read(KeySet(found).text())
    assert read.keys == tuple(found)
    assert read.text() == KeySet(found).text()


def test_the_file_has_the_form_that_is_documented() -> None:
    key = make()
    whole = KeySet([key.public(1.5)]).revoked_before(key.kid, 9.2)
    assert json.loads(whole.text()) == {
        "keys": [
            {
                "kid": key.kid,
                "tenant": "acme",
                "public": base64url.encode(key.public(0).public),
                "created": 1.5,
                "revoked_before": 10.0,
            }
        ]
    }


@given(text=st.text(max_size=60))
def test_other_texts_are_no_file_of_keys(text: str) -> None:
    with contextlib.suppress(InvalidArgument):
        assert KeySet.read(text).keys == ()


@pytest.mark.parametrize(
    "change",
    [
        {"public": "A" * 43}, {"public": "A" * 42}, {"public": "="}, {"kid": "0" * 16}, {"kid": 7},
        {"tenant": "*"}, {"tenant": ""}, {"created": "now"}, {"revokd": 5}, {"revoked": "yes"},
    ],
)  # fmt: skip
def test_a_file_with_one_bad_entry_is_refused_whole(change: dict[str, object]) -> None:
    good, bad = (make(seed=seed).public(1.0) for seed in (1, 2))
    file = json.loads(KeySet([good, bad]).text())
    file["keys"][1].update(change)
    with pytest.raises(InvalidArgument) as caught:
        KeySet.read(json.dumps(file))
    assert caught.value.hint


def test_a_file_is_bounded_and_has_each_key_once(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (make(seed=seed).public(1.0) for seed in (1, 2))
    with pytest.raises(InvalidArgument, match="twice"):
        KeySet([one, one])
    with pytest.raises(InvalidArgument, match="larger"):
        KeySet.read(" " * (keys.MAX_KEY_FILE_BYTES + 1))
    monkeypatch.setattr(keys, "MAX_TENANT_KEYS", 1)
    with pytest.raises(InvalidArgument, match="2 keys"):
        KeySet([one, two])


def test_unknown_and_revoked_keys_are_told_apart() -> None:
    key, other = make(), make(seed=2)
    known = KeySet([key.public(1.0)]).with_key(other.public(1.0))
    assert known.key(key.kid).tenant == "acme"
    with pytest.raises(Unauthenticated, match="does not know"):
        known.key("0" * 16)
    gone = known.revoked(key.kid, 7.0).revoked(key.kid, 9.0)
    assert gone.keys[0].revoked_s == 7.0
    with pytest.raises(Unauthenticated, match="revoked"):
        gone.key(key.kid)
    assert gone.key(other.kid)
    with pytest.raises(InvalidArgument, match="no key"):
        known.revoked("0" * 16, 7.0)


def test_a_watermark_only_rises() -> None:
    key = make()
    known = KeySet([key.public(1.0)]).revoked_before(key.kid, 9.0).revoked_before(key.kid, 4.0)
    assert known.key(key.kid).revoked_before_s == 9.0
