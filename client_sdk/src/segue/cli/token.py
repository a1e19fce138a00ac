"""`segue token`: issue a session token, and say what one holds.

Neither API keys nor tokens are arguments: those are seen by every process of the machine.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

import segue.tokens
from segue.cli.console import Output, OutputOption, err, print_json
from segue.cli.tenant import read_keys
from segue_contract.errors import InvalidArgument
from segue_contract.identity.principal import Right
from segue_contract.identity.tokens import TokenChecker, shown
from segue_contract.limits import MAX_TOKEN_BYTES, TOKEN_LIFETIME_S

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Issue and read tokens.")

TOKEN_VARIABLE = "SEGUE_TOKEN"


@app.command()
def issue(
    device: Annotated[str, typer.Option("--device", "-d", help="Whose token it is.")],
    session: Annotated[
        list[str],
        typer.Option(
            "--session", "-s", help="A name, or its beginning and *; again for others; *: all."
        ),
    ],
    right: Annotated[list[Right], typer.Option("--right", "-r", help="Again for others.")],
    lifetime: Annotated[float, typer.Option(help="Seconds.")] = TOKEN_LIFETIME_S,
    key_file: Annotated[
        Path | None, typer.Option(help="Holds the API key, instead of SEGUE_API_KEY.")
    ] = None,
    device_key: Annotated[
        str, typer.Option(help="RFC 7638 thumbprint of the key that the device proves.")
    ] = "",
    output: OutputOption = Output.TEXT,
) -> None:
    """Issue a token with the tenant's API key, which SEGUE_API_KEY holds."""
    token = segue.tokens.issue(
        device=device,
        sessions=session,
        rights=right,
        lifetime_s=lifetime,
        api_key=None if key_file is None else _text_of(key_file),
        device_key=device_key,
    )
    if output is Output.JSON:
        print_json({"token": token, **shown(token)})
    else:
        typer.echo(token)


@app.command()
def show(
    keys: Annotated[
        Path | None, typer.Option("--keys", help="Check it with this file of tenants' keys.")
    ] = None,
) -> None:
    """Print what a token says: of SEGUE_TOKEN, else of standard input."""
    token = os.environ.get(TOKEN_VARIABLE) or sys.stdin.read(MAX_TOKEN_BYTES + 2)
    token = token.strip()
    print_json(shown(token))
    if keys is None:
        err().print("Not verified: --keys names the file of tenants' keys.", style="dim")
        return
    now = time.time()
    found = TokenChecker(read_keys(keys), bound=True).principal(token, now)
    err().print(f"Valid for {found.expires_s - now:.0f} s.", style="dim")


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(
            f"{path} cannot be read.", hint="Name a file with an API key and nothing else."
        ) from error
