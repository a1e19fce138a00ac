"""`segue tenant`: the API keys of tenants, and the file of their public halves that nodes read."""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from segue.cli.console import Output, OutputOption, err, out, print_json
from segue.cli.sessions import age
from segue_contract.errors import InvalidArgument
from segue_contract.identity.keys import API_KEY_VARIABLE, IssuerKey, KeySet, PublicKey
from segue_contract.limits import CLOCK_SKEW_S

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Add, list and revoke tenants' API keys."
)

KeysOption = Annotated[
    Path,
    typer.Option("--keys", envvar="SEGUE_TENANT_KEYS", help="The file that nodes read."),
]
DEFAULT_KEYS = Path("tenant-keys.json")


@app.command()
def add(
    tenant: Annotated[str, typer.Argument(metavar="NAME", help="A tenant; it may have several.")],
    keys: KeysOption = DEFAULT_KEYS,
    output: OutputOption = Output.TEXT,
) -> None:
    """Make an API key for a tenant, and print it: this once, for nobody keeps it."""
    key = IssuerKey.new(tenant, os.urandom)
    _change(keys, lambda known: known.with_key(key.public(round(time.time()))), create=True)
    if output is Output.JSON:
        print_json({"tenant": tenant, "kid": key.kid, "api_key": key.text()})
        return
    typer.echo(key.text())
    err().print(
        f"Keep it as a secret, and set {API_KEY_VARIABLE} to it where tokens are issued. "
        f"Nodes need only {keys}, which holds no secret.",
        style="dim",
    )


@app.command(name="list")
def list_(keys: KeysOption = DEFAULT_KEYS, output: OutputOption = Output.TEXT) -> None:
    """List the keys that nodes with this file know."""
    found = read_keys(keys).keys
    if output is Output.JSON:
        print_json(
            [
                {
                    "tenant": key.tenant, "kid": key.kid, "created": key.created_s,
                    "revoked_before": key.revoked_before_s or None,
                    "revoked": key.revoked_s if key.is_revoked else None,
                }
                for key in found
            ]
        )  # fmt: skip
        return
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("tenant", "key", "made", "state"):
        table.add_column(column, no_wrap=True)
    now = time.time()
    for key in found:
        made = age(now - key.created_s)
        table.add_row(Text(key.tenant, "bold"), key.kid, made, _state(key, now))
    out().print(table)


@app.command()
def revoke(
    kid: Annotated[str, typer.Argument(metavar="KEY", help="As `segue tenant list` names it.")],
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Only its tokens so far; the key itself goes on.")
    ] = False,
    keys: KeysOption = DEFAULT_KEYS,
) -> None:
    """Revoke a key: no token that it signed, or will sign, is taken any more."""
    now = time.time()
    if tokens:
        # An issuer whose clock is ahead has signed tokens of the next half minute already.
        _change(keys, lambda known: known.revoked_before(kid, now + CLOCK_SKEW_S))
        out().print(
            f"The tokens of {kid} so far are void. "
            "Those that are issued half a minute later count again."
        )
    else:
        _change(keys, lambda known: known.revoked(kid, round(now)))
        out().print(f"{kid} is revoked.")


def read_keys(path: Path) -> KeySet:
    """The keys in a file.

    Raises:
        InvalidArgument: it is missing, unreadable, or no such file.
    """
    try:
        return KeySet.read(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InvalidArgument(
            f"There is no file {path}.", hint="Name it with --keys, or make it: segue tenant add."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(
            f"{path} cannot be read: {error}.", hint="Name another file with --keys."
        ) from error


def _state(key: PublicKey, now_s: float) -> str:
    if key.is_revoked:
        return f"revoked {age(now_s - key.revoked_s)}"
    if key.revoked_before_s:
        return f"tokens older than {age(now_s - key.revoked_before_s)} are void"
    return "valid"


def _change(path: Path, change: Callable[[KeySet], KeySet], *, create: bool = False) -> None:
    """Replace the file by a changed one: whole, or not at all; one command after another."""
    path = path.resolve()  # of a link, what it points to is replaced
    try:
        with _alone(path.parent):
            known = KeySet() if create and not path.exists() else read_keys(path)
            text = change(known).text()
            fresh = path.with_name(f".{path.name}.new")
            with fresh.open("w", encoding="utf-8") as file:
                _as_before(path, file.fileno())
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
    except OSError as error:
        raise InvalidArgument(
            f"{path} cannot be written: {error.strerror}.", hint="Name another file with --keys."
        ) from error


def _as_before(path: Path, fresh: int) -> None:
    """Mode and owner of the file that is replaced: who could read it can, and nobody else."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return
    mine = os.fstat(fresh)
    if (found.st_uid, found.st_gid) != (mine.st_uid, mine.st_gid):
        os.fchown(fresh, found.st_uid, found.st_gid)
    os.fchmod(fresh, stat.S_IMODE(found.st_mode))


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    import fcntl

    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
