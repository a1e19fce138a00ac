"""`segue login`, `context`, `config`; what every command has; completion; a bare installation."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from segue.cli import COMMANDS, build_app, load
from segue.cli.login import app, config_app, context_app
from segue_contract.errors import SegueError, Unreachable
from tests.support.fake_agent import FakeAgent, FakeLog

SECRET = "hush.hush.hush"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "config.toml"
    monkeypatch.setenv("SEGUE_CONFIG", str(path))
    for variable in ("SEGUE_URL", "SEGUE_TOKEN", "SEGUE_CA", "SEGUE_CONTEXT"):
        monkeypatch.delenv(variable, raising=False)
    return path


def said(what: typer.Typer, *args: str, given: str = "") -> str:
    result = CliRunner().invoke(what, list(args), input=given)
    if result.exception is not None:
        raise result.exception
    return result.output


def test_contexts_are_kept_listed_chosen_and_removed(config: Path) -> None:
    said(app, "127.0.0.1:1", "--no-check", "--token-stdin", given=f"{SECRET}\n")
    said(app, "127.0.0.1:2,127.0.0.1:3", "--no-check", "--context", "home", "--ca", "ca.crt")
    assert SECRET in config.read_text()
    listed = json.loads(said(context_app, "list", "-o", "json"))
    assert [(one["context"], one["current"]) for one in listed] == [
        ("default", False), ("home", True),
    ]  # fmt: skip
    assert listed[1]["ca"] == str(Path("ca.crt").absolute())
    assert json.loads(said(context_app, "show", "-o", "json"))["url"] == "127.0.0.1:2,127.0.0.1:3"
    said(context_app, "use", "default")
    everything = [
        said(context_app, "list"), said(context_app, "show"), said(context_app, "show", "home"),
        said(context_app, "list", "-o", "json"), said(config_app, "show"),
        said(config_app, "show", "-o", "json"),
    ]  # fmt: skip
    assert not any(SECRET in text for text in everything)
    shown = json.loads(everything[-1])
    assert shown["token"] == {"value": "(hidden)", "source": "context default"}
    assert shown["url"] == {"value": "127.0.0.1:1", "source": "context default"}
    said(context_app, "remove", "default")
    assert SECRET not in config.read_text()
    assert json.loads(said(config_app, "show", "-o", "json"))["url"]["source"] == "default"
    with pytest.raises(SegueError, match="There is no context"):
        said(context_app, "use", "default")


def test_what_a_node_does_not_take_is_not_kept(config: Path) -> None:
    with pytest.raises(Unreachable):
        said(app, "127.0.0.1:1")
    with pytest.raises(SegueError, match="Two sources"):
        said(app, "127.0.0.1:1", "--token-stdin", "--token-command", "x")
    with pytest.raises(SegueError, match="unencrypted"):
        said(app, "edge.example:7411", "--token-stdin", given=SECRET)
    assert not config.exists()


async def test_login_asks_the_node(config: Path) -> None:
    async with FakeAgent(FakeLog("trip")) as agent:
        command = [sys.executable, "-m", "segue", "login", agent.address, "--token-stdin"]
        child = await asyncio.create_subprocess_exec(
            *command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        async with asyncio.timeout(60):
            told, wrong = await child.communicate(SECRET.encode())
        assert child.returncode == 0, wrong
        assert b"current context" in told
        assert agent.calls == 1
    assert SECRET in await asyncio.to_thread(config.read_text)


def leaves(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    if hasattr(command, "commands"):
        for name, inner in command.commands.items():
            yield from leaves(inner, f"{path} {name}")
    else:
        yield path, command


# What tells facts, and so has to tell them to programs, too.
TELLS = {"list", "show", "sessions", "log", "doctor", "explain", "quality"}
ACTS = {
    "chat", "demo", "up", "edge", "cloud", "login", "use", "remove", "delete", "revoke", "expire",
    "export", "import", "build", "verify", "tensorrt", "init", "issue", "request", "rotate", "add",
}  # fmt: skip
ALWAYS_JSON = {"token show"}


def test_what_tells_facts_tells_them_as_json_too() -> None:
    found: dict[str, bool] = {}
    for command in COMMANDS:
        for path, leaf in leaves(typer.main.get_command(load(command)), command.name):
            found[path] = any("--output" in option.opts for option in leaf.params)
    unknown = {path for path in found if path.split()[-1] not in TELLS | ACTS}
    assert not unknown, "say of each new command whether it tells facts or acts"
    silent = {path for path, told in found.items() if path.split()[-1] in TELLS and not told}
    assert silent == ALWAYS_JSON
    assert len(found) > 25


@pytest.mark.parametrize(
    ("words", "offered"),
    [("segue ses", "sessions"), ("segue chat --sess", "--session"), ("segue context ", "use")],
)
def test_a_shell_completes_commands_and_their_options(words: str, offered: str) -> None:
    env = {
        **os.environ, "_SEGUE_COMPLETE": "complete_bash", "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "segue"], env=env, capture_output=True, text=True, timeout=60
    )
    assert offered in done.stdout.split(), done.stderr


def test_completion_can_be_installed() -> None:
    options = {opt for param in typer.main.get_command(build_app()).params for opt in param.opts}
    assert "--install-completion" in options


BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(name, name=name)

BLOCKED = set(PACKAGES)
sys.meta_path.insert(0, Blocked())
"""
CLI = ("typer", "click", "rich", "prompt_toolkit", "shellingham", "pydantic")
NODE = ("pydantic_settings", "numpy", "structlog", "redis", "torch", "onnxruntime")


def run(code: str) -> subprocess.CompletedProcess[str]:
    blocked = BLOCKED.replace("PACKAGES", repr((*CLI, *NODE)))
    return subprocess.run(
        [sys.executable, "-c", blocked + code], capture_output=True, text=True, timeout=60
    )


def test_the_sdk_does_without_the_commands_packages() -> None:
    done = run(
        "import segue, segue._mqtt, segue.testing, segue.tokens, segue_contract.transport.tls\n"
        "for name in segue.__all__: getattr(segue, name)\n"
        "segue.Client('127.0.0.1:1', tls_ca='system')\n"
    )
    assert done.returncode == 0, done.stderr


def test_the_command_without_its_packages_names_the_extra() -> None:
    done = run("import segue.__main__; segue.__main__.main()")
    assert done.returncode == 1
    assert "pip install 'segue[cli]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_extra_of_one_command_is_its_own() -> None:
    done = run(
        f"BLOCKED -= set({CLI!r})\n"
        "import segue.__main__; sys.argv = ['segue', 'cloud']; segue.__main__.main()"
    )
    assert done.returncode == 1
    assert "pip install 'segue[cloud]'" in done.stderr
