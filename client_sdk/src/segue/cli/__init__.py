"""The `segue` command: its own subcommands, and those of the other packages, found by name.

Nothing of a subcommand is imported before it is invoked, so `segue --help` starts at once and works
with only the SDK installed.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from segue.cli.console import print_error
from segue_contract.errors import MissingExtra, SegueError

GROUP = "segue.commands"  # entry points of other packages
EXIT_ERROR = 1
COMPLETE = "_SEGUE_COMPLETE"  # how a shell's completion asks


@dataclass(frozen=True)
class Command:
    """A subcommand by name. `target`: "module:attribute" of our own, else an entry point's."""

    name: str
    panel: str
    help: str
    target: str = ""
    extra: str = ""  # the extra of the distribution that brings it and what it imports


_TALK, _RUN, _SERVE = "Talk", "Try on this machine", "Operate"

COMMANDS = (
    Command("chat", _TALK, "Talk; two terminals are two devices.", "segue.cli.chat:app"),
    Command("sessions", _TALK, "List the sessions of a node.", "segue.cli.sessions:app"),
    Command("session", _TALK, "Delete, export, import or expire sessions.",
            "segue.cli.sessions:keep_app"),
    Command("log", _TALK, "Print or follow a session's log.", "segue.cli.sessions:log_app"),
    Command("login", _TALK, "Keep a node's address, and a token for it.",
            "segue.cli.login:app"),
    Command("context", _TALK, "List, choose and remove what login keeps.",
            "segue.cli.login:context_app"),
    Command("config", _TALK, "Show which settings apply, and where they come from.",
            "segue.cli.login:config_app"),
    Command("demo", _RUN, "Play a reply that moves from phone to laptop, and measure it.",
            "segue.cli.demo:app", "embedded"),
    Command("up", _RUN, "Run edge, cloud, store and broker here until Ctrl-C.",
            "segue.cli.up:app", "embedded"),
    Command("doctor", _RUN, "Say what is installed, found, reachable, and too slow.",
            "segue.cli.doctor:app"),
    Command("edge", _SERVE, "Run an edge node.", extra="edge"),
    Command("cloud", _SERVE, "Run a cloud instance.", extra="cloud"),
    Command("model", _SERVE, "Build, list and verify models.", "segue.cli.model:app", "convert"),
    Command("ca", _SERVE, "Make certificates for a small site.", "segue.cli.ca:app"),
    Command("broker", _SERVE, "Make the files of a broker that clouds administer.",
            "segue.cli.broker:app"),
    Command("tenant", _SERVE, "Add, list and revoke tenants' API keys.", "segue.cli.tenant:app"),
    Command("token", _SERVE, "Issue session tokens, and read them.", "segue.cli.token:app"),
    Command("plan", _SERVE, "Explain who would compute which part of a turn.", extra="edge"),
)  # fmt: skip


def load(command: Command) -> Any:
    """The typer app behind a subcommand.

    Raises:
        MissingExtra: a package it needs, or the whole subcommand, is not installed.
    """
    target = command.target or _entry_points().get(command.name, "")
    module, _, attribute = target.partition(":")
    try:
        if not module:
            raise ModuleNotFoundError(name=command.name)
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise _missing(command, error.name or module) from error


def _missing(command: Command, module: str) -> MissingExtra:
    package = module.partition(".")[0]
    if package.startswith("segue") or module == command.name:
        message = f"`segue {command.name}` is not part of this installation."
    else:
        message = f"`segue {command.name}` needs the package {package}, which is not installed."
    extra = f"[{command.extra}]" if command.extra else ""
    return MissingExtra(message, hint=f"pip install 'segue{extra}'", package=package)


def _entry_points() -> dict[str, str]:
    return {point.name: point.value for point in importlib.metadata.entry_points(group=GROUP)}


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"segue {importlib.metadata.version('segue')}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Agent sessions that follow their user from device to device."""


def _runner(command: Command) -> Callable[[typer.Context], None]:
    def run(ctx: typer.Context) -> None:
        inner = typer.main.get_command(load(command))
        code = inner.main(
            args=list(ctx.args), prog_name=f"segue {command.name}", standalone_mode=False
        )
        if isinstance(code, int) and code:
            raise typer.Exit(code)

    run.__doc__ = command.help
    return run


def build_app(commands: Sequence[Command] = COMMANDS) -> typer.Typer:
    """The root app with a stand-in per subcommand, which passes its arguments on untouched."""
    app = typer.Typer(
        name="segue",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    known = {command.name for command in commands}
    others = [Command(name, "More", "") for name in sorted(_entry_points()) if name not in known]
    for command in (*commands, *others):
        app.command(
            command.name,
            help=command.help,
            rich_help_panel=command.panel,
            add_help_option=False,
            context_settings={
                "allow_extra_args": True,
                "ignore_unknown_options": True,
                "allow_interspersed_args": False,
            },
        )(_runner(command))
    return app


def _show_completion(root: Any, env: Mapping[str, str]) -> None:
    """Where a shell asks what may come next, the command that it is about stands for itself."""
    if COMPLETE not in env:
        return
    words = (env.get("COMP_WORDS") or env.get("_TYPER_COMPLETE_ARGS", "")).split()
    command = next((one for one in COMMANDS if one.name in words[1:2]), None)
    if command is not None:
        with contextlib.suppress(MissingExtra):
            root.commands[command.name] = typer.main.get_command(load(command))


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 an error of ours, 2 wrong usage, 130 Ctrl-C."""
    # gRPC writes each failed handshake to the terminal; ours says it in its errors
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    try:
        root = typer.main.get_command(build_app())
        _show_completion(root, os.environ)
        root.main(args=None if args is None else list(args), prog_name="segue")
    except SegueError as error:
        print_error(error)
        sys.exit(EXIT_ERROR)
    except BrokenPipeError:  # the reader of a pipe left: `segue log | head`
        sys.stderr.close()
        sys.exit(EXIT_ERROR)
