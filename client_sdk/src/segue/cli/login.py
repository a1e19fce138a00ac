"""`segue login`, `segue context` and `segue config`: where clients connect, and as whom.

A token is no argument: those are seen by every process of the machine.
"""

from __future__ import annotations

import getpass
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from segue._config_file import config_path, read_contexts, write_contexts
from segue._contexts import Context, Contexts
from segue._settings import Setting, addresses_of, find_settings
from segue.cli.chat import default_device
from segue.cli.console import Output, OutputOption, out, print_json
from segue.cli.runner import run
from segue_contract.errors import InvalidArgument, NotFound, PermissionDenied
from segue_contract.limits import MAX_TOKEN_BYTES

app = typer.Typer(add_completion=False)
context_app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="List, choose and remove contexts."
)
config_app = typer.Typer(add_completion=False, help="Show which settings apply.")

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="A context's.")]


@app.command()
def login(
    url: Annotated[
        str, typer.Argument(metavar="URL", help="host:port of a node; several with commas.")
    ],
    context: Annotated[str, typer.Option(help="The name to keep it under.")] = "default",
    ca: Annotated[
        str, typer.Option(help="PEM file of the authorities to believe, or system: TLS on.")
    ] = "",
    token_stdin: Annotated[
        bool, typer.Option("--token-stdin", help="Read the token from standard input.")
    ] = False,
    token_command: Annotated[
        str, typer.Option(help="A command that prints a token; asked whenever one is needed.")
    ] = "",
    check: Annotated[bool, typer.Option(help="Ask the node whether it takes it.")] = True,
) -> None:
    """Keep a node's address, and a token for it, for `segue.Client()` and all commands here."""
    if token_stdin and token_command:
        raise InvalidArgument("Two sources for the token.", hint="Give one of them.")
    path = config_path(os.environ)
    kept = read_contexts(path)
    made = Context(
        url=",".join(addresses_of(url)),
        token="" if token_command else _token(token_stdin),
        token_command=token_command,
        ca=ca if ca in ("", "system") else str(Path(ca).absolute()),
    )
    changed = kept.put(context, made)  # a bad value is said before anybody is asked
    if check:
        run(_ask(made))
    write_contexts(path, changed)
    out().print(f"{context} is the current context, kept in {path}.", soft_wrap=True)


def _token(from_stdin: bool) -> str:
    if from_stdin:
        token = sys.stdin.read(MAX_TOKEN_BYTES + 2).strip()
        if not token:
            raise InvalidArgument("Standard input holds no token.")
        return token
    if sys.stdin.isatty():
        return getpass.getpass("Token (empty: none): ").strip()
    return ""


async def _ask(made: Context) -> None:
    """Raises Unauthenticated, Unreachable, ..."""
    import segue
    from segue._token_command import TokenCommand

    token = TokenCommand(made.token_command) if made.token_command else made.token
    device = default_device()
    async with segue.Client(
        addresses_of(made.url), device=device, token=token, tls_ca=made.ca
    ) as client:
        try:
            await client.sessions(1)
        except PermissionDenied:
            pass  # it is known who asks, and that is all that was wanted


@context_app.command("list")
def list_(output: OutputOption = Output.TEXT) -> None:
    """List the contexts; the current one is marked."""
    known = _known()
    if output is Output.JSON:
        print_json([_facts(known, name) for name in sorted(known.contexts)])
        return
    if not known.contexts:
        out().print("No contexts yet. Make one: segue login HOST:PORT", style="dim")
        return
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("", "context", "url", "token"):
        table.add_column(column, no_wrap=True)
    for name, context in sorted(known.contexts.items()):
        mark = "*" if name == known.current else ""
        table.add_row(mark, Text(name, "bold"), Text(context.url), Text(_told_token(context)))
    out().print(table)


@context_app.command()
def use(name: NameArgument) -> None:
    """Make a context the current one."""
    write_contexts(config_path(os.environ), _known().use(name))
    out().print(f"{name} is the current context.")


@context_app.command()
def remove(name: NameArgument) -> None:
    """Forget a context, and its token."""
    write_contexts(config_path(os.environ), _known().without(name))
    out().print(f"{name} is removed.")


@context_app.command()
def show(
    name: Annotated[str, typer.Argument(help="By default the current one.")] = "",
    output: OutputOption = Output.TEXT,
) -> None:
    """Show a context, without its token."""
    known = _known()
    chosen = name or known.current
    if not chosen:
        raise NotFound("There is no current context.", hint="`segue context use` chooses one.")
    facts = _facts(known, chosen)
    if output is Output.JSON:
        print_json(facts)
        return
    for key, value in facts.items():
        out().print(Text.assemble((f"{key:<14}", "dim"), str(value)), soft_wrap=True)


@config_app.callback()
def config() -> None:
    """Show which settings apply."""


@config_app.command("show")
def show_config(output: OutputOption = Output.TEXT) -> None:
    """Show each setting that `segue.Client()` takes here, and where it comes from."""
    path = config_path(os.environ)
    found = find_settings(os.environ, lambda: read_contexts(path))
    rows = [(one.name, _masked(one.name, getattr(found, one.name))) for one in fields(found)]
    if output is Output.JSON:
        values = {name: {"value": one.value, "source": one.source} for name, one in rows}
        print_json({"file": str(path), **values})
        return
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("setting", "value", "from"):
        table.add_column(column, overflow="fold")
    table.add_row("file", Text(str(path)), "")
    for name, one in rows:
        table.add_row(name.replace("_", " "), Text(one.value or "-"), one.source)
    out().print(table)


def _masked(name: str, setting: Setting) -> Setting:
    hidden = name == "token" and setting.value
    return Setting("(hidden)", setting.source) if hidden else setting


def _known() -> Contexts:
    return read_contexts(config_path(os.environ))


def _facts(known: Contexts, name: str) -> dict[str, object]:
    context = known.get(name)
    return {
        "context": name, "current": name == known.current, "url": context.url,
        "ca": context.ca, "token": _told_token(context), "token_command": context.token_command,
    }  # fmt: skip


def _told_token(context: Context) -> str:
    if context.token_command:
        return "of a command"
    return "(hidden)" if context.token else "none"
