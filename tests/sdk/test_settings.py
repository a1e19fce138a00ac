"""Where a client connects and as whom: arguments, environment, contexts; the file of contexts."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import segue
from segue._config_file import config_path, read_contexts, write_contexts
from segue._contexts import Context, Contexts, format_contexts, parse_contexts
from segue._settings import Setting, find_settings
from segue._token_command import TokenCommand
from segue_contract.errors import InvalidArgument, NotFound, Unauthenticated
from segue_contract.limits import RENEW_LEAD_S
from tests.support.fake_agent import FakeAgent, FakeLog

WORK = Context("edge.example:7411", token="kept", ca="work.crt")
BOTH = Contexts("work", {"work": WORK, "home": Context("home.example:7411")})


def test_what_is_given_comes_first_then_the_environment_then_the_context() -> None:
    assert find_settings({}, Contexts).url == Setting("127.0.0.1:7411", "default")

    found = find_settings({}, lambda: BOTH)
    assert found.url == Setting("edge.example:7411", "context work")
    assert found.token == Setting("kept", "context work")
    assert found.ca == Setting("work.crt", "context work")

    found = find_settings({"SEGUE_TOKEN": "of-env"}, lambda: BOTH)
    assert found.url == Setting("edge.example:7411", "context work")
    assert found.token == Setting("of-env", "SEGUE_TOKEN")

    found = find_settings({"SEGUE_CONTEXT": "home"}, lambda: BOTH)
    assert found.context == Setting("home", "SEGUE_CONTEXT")
    assert found.url.value == "home.example:7411"
    assert found.token.value == ""
    with pytest.raises(NotFound, match="nowhere"):
        find_settings({"SEGUE_CONTEXT": "nowhere"}, lambda: BOTH)


@pytest.mark.parametrize(
    ("env", "address"), [({"SEGUE_URL": "other.example:1"}, None), ({}, "other.example:1")]
)
def test_a_contexts_token_goes_to_its_own_address_alone(
    env: dict[str, str], address: str | None
) -> None:
    found = find_settings(env, lambda: BOTH, address=address)
    assert found.url.value == "other.example:1"
    assert (found.token.value, found.ca.value, found.context.value) == ("", "", "")


def test_a_variable_for_the_token_displaces_the_contexts_command() -> None:
    known = Contexts("c", {"c": Context("h:1", token_command="print it")})
    assert find_settings({}, lambda: known).token_command.value == "print it"
    assert find_settings({"SEGUE_TOKEN": "t"}, lambda: known).token_command.value == ""


async def test_a_client_without_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.toml"
    monkeypatch.setenv("SEGUE_CONFIG", str(path))
    for variable in ("SEGUE_URL", "SEGUE_TOKEN", "SEGUE_CA", "SEGUE_CONTEXT"):
        monkeypatch.delenv(variable, raising=False)
    assert segue.Client(device="phone").addresses == ("127.0.0.1:7411",)
    async with FakeAgent(FakeLog("trip")) as agent:
        command = f"{sys.executable} -c 'print(\"a.b.c\")'"
        one = Context(f"127.0.0.1:1,{agent.address}", token_command=command)
        write_contexts(path, Contexts().put("work", one))
        async with segue.Client(device="phone") as client:
            assert client.addresses == ("127.0.0.1:1", agent.address)
            assert (await client.session("trip")).name == "trip"
    monkeypatch.setenv("SEGUE_URL", "127.0.0.1:2, 127.0.0.1:3")
    assert segue.Client(device="phone").addresses == ("127.0.0.1:2", "127.0.0.1:3")


_NAMES = st.text("abcXYZ019", min_size=1, max_size=8)
_VALUES = st.text(max_size=40).filter(str.isprintable)
_CONTEXTS = st.builds(
    Context, url=_VALUES, token_command=_VALUES, ca=_VALUES, token=st.just("")
) | st.builds(Context, url=_VALUES, token=_VALUES)


@given(st.dictionaries(_NAMES, _CONTEXTS, max_size=4))
def test_contexts_survive_their_file(contexts: dict[str, Context]) -> None:
    known = Contexts(next(iter(contexts), ""), contexts)
    assert parse_contexts(format_contexts(known)) == known


@pytest.mark.parametrize(
    "text",
    [
        "[contexts", "current = 1", 'current = "a"', "[contexts.a]",
        '[contexts.a]\nurl = "h:1"\nx = 1',
        '[contexts.a]\nurl = "h:1"\ntoken = "t"\ntoken_command = "c"',
        '[contexts."a b"]\nurl = "h:1"', '[contexts.a]\nurl = "h\\n1"', "a = \x00",
    ],
)  # fmt: skip
def test_a_file_that_is_none_is_a_typed_error(text: str, tmp_path: Path) -> None:
    with pytest.raises((InvalidArgument, NotFound)):
        parse_contexts(text)
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises((InvalidArgument, NotFound)):
        read_contexts(path)


def test_the_file_is_for_its_user_alone(tmp_path: Path) -> None:
    path = config_path({"XDG_CONFIG_HOME": str(tmp_path / "made")})
    assert read_contexts(path) == Contexts()
    os.umask(os.umask(0))  # whatever it is
    write_contexts(path, BOTH)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert [one.name for one in path.parent.iterdir()] == ["config.toml"]
    assert read_contexts(path) == BOTH
    path.chmod(0o640)
    with pytest.raises(InvalidArgument, match="others") as caught:
        read_contexts(path)
    assert "kept" not in str(caught.value)
    command = Contexts("c", {"c": Context("h:1", token_command="tell")})
    write_contexts(path, command)
    path.chmod(0o644)
    assert read_contexts(path) == command
    path.chmod(0o664)  # whoever writes it says what is run, and where tokens go
    with pytest.raises(InvalidArgument, match="write"):
        read_contexts(path)
    write_contexts(path, BOTH.without("work"))  # nothing secret is left in it
    path.chmod(0o644)
    assert read_contexts(path).current == ""


def test_where_the_file_is() -> None:
    assert config_path({"SEGUE_CONFIG": "/x/y.toml"}) == Path("/x/y.toml")
    assert config_path({"XDG_CONFIG_HOME": "not/absolute"}) == config_path({})
    assert config_path({}).parts[-3:] == (".config", "segue", "config.toml")


class Clock:
    now_s = 1000.0


def _jwt(exp: float) -> str:
    import base64
    import json

    claims = base64.urlsafe_b64encode(json.dumps({"exp": exp}).encode()).decode().rstrip("=")
    return f"h.{claims}.s"


def test_a_command_is_asked_again_before_its_token_ends() -> None:
    clock, asked, done = Clock(), 0, threading.Event()

    def run(arguments: list[str]) -> str:
        nonlocal asked
        assert arguments == ["tell", "me a token"]
        asked += 1
        done.set()
        return _jwt(clock.now_s + 600) + "\n"

    token = TokenCommand("tell 'me a token'", now_s=lambda: clock.now_s, run=run)
    first = token()
    clock.now_s += 600 - 2 * RENEW_LEAD_S - 1
    assert token() == first
    assert asked == 1
    done.clear()
    clock.now_s += 2
    assert token() == first  # good yet: nobody waits for the command
    assert done.wait(30)
    token.refresh()  # behind the one that asks
    assert asked == 2
    assert token() != first
    clock.now_s += 3600
    token()
    assert asked == 3


@pytest.mark.parametrize("code", ["print()", "raise SystemExit(3)", "print('x' * 9000)"])
def test_a_command_that_gives_no_token_says_so_without_its_output(
    code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = TokenCommand(f'{sys.executable} -c "{code}"')
    with pytest.raises(Unauthenticated) as caught:
        command()
    assert "xxx" not in str(caught.value)
    with pytest.raises(Unauthenticated, match="FileNotFoundError"):
        TokenCommand("/no/such/program")()
    monkeypatch.setattr("segue._token_command.TOKEN_COMMAND_TIMEOUT_S", 0.2)
    slow = f'{sys.executable} -c "import time; print(1, flush=True); time.sleep(60)"'
    with pytest.raises(Unauthenticated, match="longer") as caught:
        TokenCommand(slow)()
    assert caught.value.__cause__ is None
    for wrong in ("", "  ", "open 'quote"):
        with pytest.raises(InvalidArgument):
            TokenCommand(wrong)


def test_a_token_that_says_no_end_is_asked_for_again_once_it_was_refused() -> None:
    told = iter(["first", "second", _jwt(2000.0)])
    token = TokenCommand("tell", now_s=lambda: 1000.0, run=lambda _: next(told))
    assert (token(), token()) == ("first", "first")
    token.forget()
    assert token() == "second"
    token.forget()
    ends = token()
    token.forget()  # it says itself until when it is good
    assert token() == ends
