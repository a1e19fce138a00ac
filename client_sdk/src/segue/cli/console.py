"""How every command prints: tables and errors calm, colours only where a terminal shows them."""

from __future__ import annotations

import functools
from enum import StrEnum
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.markup import escape

from segue_contract.errors import SegueError


class Output(StrEnum):
    """What `-o` chooses."""

    TEXT = "text"
    JSON = "json"


OutputOption = Annotated[
    Output, typer.Option("--output", "-o", help="Print for people or for programs.")
]


@functools.cache
def out() -> Console:
    """The console of standard output."""
    return Console(highlight=False, soft_wrap=False)


@functools.cache
def err() -> Console:
    """The console of standard error."""
    return Console(highlight=False, stderr=True)


def print_json(value: Any) -> None:
    """`value` as indented JSON on standard output, unwrapped and uncoloured."""
    text = msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
    typer.echo(text)


def print_error(error: SegueError) -> None:
    """One red line that says what happened; below it what to do, where that is known."""
    console = err()
    console.print(f"[red]error:[/] {escape(error.message)}", soft_wrap=True)
    if error.hint:
        console.print(f"[dim]hint:[/]  {escape(error.hint)}", soft_wrap=True)
