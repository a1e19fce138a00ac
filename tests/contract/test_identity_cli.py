"""`segue tenant`, `segue token` and `segue.tokens`: from a tenant's key to a token and its end."""

from __future__ import annotations

import json
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import segue
from segue.cli import tenant, token
from segue.cli.tenant import read_keys
from segue_contract.errors import InvalidArgument, SegueError, Unauthenticated
from segue_contract.identity.keys import API_KEY_VARIABLE, IssuerKey, PublicKey
from segue_contract.identity.principal import Principal, Right
from segue_contract.identity.tokens import TokenChecker


@pytest.fixture(autouse=True)
def _no_secrets_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (API_KEY_VARIABLE, "SEGUE_TOKEN", "SEGUE_TENANT_KEYS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def run(app: Any, *args: object, stdin: str = "", **env: str) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], input=stdin, env=env)


def added(keys: Path, name: str = "acme") -> str:
    """A new tenant's API key."""
    done = run(tenant.app, "add", name, "--keys", keys)
    assert done.exit_code == 0, done.output
    return done.stdout.strip()


def issued(api_key: str, *args: str) -> str:
    done = run(
        token.app, "issue", "-d", "phone", "-s", "ann.*", "-r", "read", *args, SEGUE_API_KEY=api_key
    )
    assert done.exit_code == 0, done.output
    return done.stdout.strip()


def bearer(text: str, keys: Path) -> Principal:
    return TokenChecker(read_keys(keys)).principal(text, time.time())


def test_an_added_tenants_token_is_known_to_who_has_the_file(keys: Path) -> None:
    found = bearer(issued(added(keys), "-r", "send", "--lifetime", "60"), keys)
    assert (found.tenant, found.name, found.sessions) == ("acme", "phone", ("ann.*",))
    assert found.rights == {Right.READ, Right.SEND}
    assert found.expires_s - found.issued_s == 60


def test_the_file_holds_no_secret_and_the_key_is_shown_once(keys: Path) -> None:
    api_key = added(keys)
    secret = api_key[-43:]
    listed = run(tenant.app, "list", "--keys", keys)
    assert IssuerKey.parse(api_key).kid in listed.stdout
    assert secret not in keys.read_text() + listed.stdout
    assert [path.name for path in keys.parent.iterdir()] == [keys.name]


def test_programs_are_told_the_same(keys: Path) -> None:
    made = json.loads(run(tenant.app, "add", "acme", "--keys", keys, "-o", "json").stdout)
    assert IssuerKey.parse(made["api_key"]).kid == made["kid"]
    (listed,) = json.loads(run(tenant.app, "list", "--keys", keys, "-o", "json").stdout)
    assert (listed["tenant"], listed["kid"], listed["revoked"]) == ("acme", made["kid"], None)
    said = json.loads(issued(made["api_key"], "-o", "json"))
    assert said["claims"]["sub"] == "phone"
    assert bearer(said["token"], keys).token_id == said["claims"]["jti"]


def test_a_revoked_key_counts_no_more_and_others_do(keys: Path) -> None:
    first, second = added(keys), added(keys)
    assert run(tenant.app, "revoke", IssuerKey.parse(first).kid, "--keys", keys).exit_code == 0
    with pytest.raises(Unauthenticated, match="revoked"):
        bearer(issued(first), keys)
    assert bearer(issued(second), keys).tenant == "acme"
    assert "revoked" in run(tenant.app, "list", "--keys", keys).stdout


def test_a_keys_tokens_may_be_revoked_alone(keys: Path) -> None:
    api_key = added(keys)
    old = issued(api_key)
    kid = IssuerKey.parse(api_key).kid
    assert run(tenant.app, "revoke", kid, "--tokens", "--keys", keys).exit_code == 0
    known = read_keys(keys)
    with pytest.raises(Unauthenticated, match="was revoked"):
        bearer(old, keys)
    assert not known.key(kid).is_revoked
    assert "are void" in run(tenant.app, "list", "--keys", keys).stdout


def test_the_file_keeps_its_mode(keys: Path) -> None:
    assert run(tenant.app, "add", "acme", "--keys", keys).exit_code == 0
    for mode in (0o640, 0o600):
        keys.chmod(mode)
        assert run(tenant.app, "add", "acme", "--keys", keys).exit_code == 0
        assert stat.S_IMODE(keys.stat().st_mode) == mode


def test_tenants_added_at_once_are_all_there(keys: Path) -> None:
    made = [IssuerKey.new(f"t{n}", bytes_of(n)).public(1.0) for n in range(16)]

    def add(key: PublicKey) -> None:
        tenant._change(keys, lambda known: known.with_key(key), create=True)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, made))
    assert {key.tenant for key in read_keys(keys).keys} == {f"t{n}" for n in range(16)}


def bytes_of(seed: int) -> Any:
    return lambda count: bytes([seed]) * count


def test_a_file_that_cannot_be_changed_stays_as_it_was(keys: Path) -> None:
    keys.write_text('{"keys": [{"kid": "other"}]}')
    for args in (("add", "acme"), ("list",), ("revoke", "x")):
        done = run(tenant.app, *args, "--keys", keys)
        assert isinstance(done.exception, InvalidArgument), args
    assert keys.read_text() == '{"keys": [{"kid": "other"}]}'


@pytest.mark.parametrize("path", ["none/keys.json", "."])
def test_a_file_that_is_not_there_is_said_so(tmp_path: Path, path: str) -> None:
    for args in (("add", "acme"), ("list",), ("revoke", "x")):
        done = run(tenant.app, *args, "--keys", tmp_path / path)
        assert isinstance(done.exception, InvalidArgument), args
        assert done.exception.hint


def test_show_prints_what_a_token_says_and_checks_it_where_asked(keys: Path) -> None:
    text = issued(added(keys))
    done = run(token.app, "show", stdin=f"{text}\n")
    assert json.loads(done.stdout)["claims"]["sub"] == "phone"
    assert "Not verified" in done.stderr
    done = run(token.app, "show", "--keys", keys, SEGUE_TOKEN=text)
    assert "Valid for" in done.stderr
    stranger = keys.with_name("others.json")
    added(stranger)
    done = run(token.app, "show", "--keys", stranger, stdin=text)
    assert isinstance(done.exception, Unauthenticated)
    assert isinstance(run(token.app, "show", stdin="x").exception, Unauthenticated)


def test_a_key_may_lie_in_a_file(keys: Path, tmp_path: Path) -> None:
    secret = tmp_path / "api-key"
    args = ("issue", "-d", "phone", "-s", "trip", "-r", "read", "--key-file", secret)
    assert isinstance(run(token.app, *args).exception, InvalidArgument)
    secret.write_text(f"{added(keys)}\n")
    assert bearer(run(token.app, *args).stdout.strip(), keys).name == "phone"


# -- segue.tokens -------------------------------------------------------------------------------


def test_a_back_end_issues_tokens(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api_key = added(keys)
    asked: dict[str, Any] = {"device": "phone", "sessions": ["trip"], "rights": ["read", "stop"]}
    given = bearer(segue.tokens.issue(**asked, api_key=api_key), keys)
    monkeypatch.setenv(API_KEY_VARIABLE, api_key)
    found = bearer(segue.tokens.issue(**asked), keys)
    assert (found.name, found.rights) == ("phone", {Right.READ, Right.STOP})
    assert found.expires_s - found.issued_s == 600
    assert found.token_id != given.token_id


@pytest.mark.parametrize(
    "changes",
    [{"api_key": ""}, {"api_key": "segue-key-acme"}, {"rights": ["root"]}, {"sessions": "trip"}],
)
def test_what_it_cannot_issue_it_says(keys: Path, changes: dict[str, Any]) -> None:
    asked: dict[str, Any] = {
        "device": "phone", "sessions": ["trip"], "rights": ["read"], "api_key": added(keys)
    }  # fmt: skip
    with pytest.raises(InvalidArgument) as caught:
        segue.tokens.issue(**{**asked, **changes})
    assert caught.value.hint


def test_no_error_shows_a_secret(keys: Path) -> None:
    api_key = added(keys)
    for damaged in (api_key[:-1], api_key[1:], f"{api_key} ", api_key.replace("acme", "a cme")):
        with pytest.raises(SegueError) as caught:
            segue.tokens.issue(device="*", sessions=["a"], rights=["read"], api_key=damaged)
        assert api_key[-40:-1] not in f"{caught.value} {caught.value.fields}"
