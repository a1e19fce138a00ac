"""`segue broker`: the files of a Mosquitto whose logins the clouds administer."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import Annotated

import typer

from segue.cli.ca import make_folder, must_be_new, remark, write_file
from segue.local.broker_files import broker_files
from segue_contract.errors import InvalidArgument
from segue_contract.transport.hosts import is_loopback

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Make the files of an MQTT broker whose logins the clouds administer.",
)

_PLUGIN = "mosquitto_dynamic_security.so"
_PLACES = (
    "/usr/lib/*",
    "/usr/lib",
    "/usr/local/lib",
    "/opt/homebrew/lib",
    "/opt/homebrew/opt/*/lib",
)


@app.callback()
def _group() -> None:
    """One command so far, and it is named."""


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR")] = Path("broker"),
    host: Annotated[str, typer.Option(help="Address that it listens on.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="[8883 with TLS, else 1883]")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Its certificate chain, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="The certificate's key.")] = None,
    plugin: Annotated[
        Path | None, typer.Option(help=f"Mosquitto's {_PLUGIN}. [where packages put it]")
    ] = None,
) -> None:
    """Make mosquitto.conf, logins.json, and the clouds' login: cloud.login."""
    if (tls_cert is None) != (tls_key is None):
        raise InvalidArgument("Of --tls-cert and --tls-key one is missing.", hint="Give both.")
    if tls_cert is None and not is_loopback(host):
        raise InvalidArgument(
            f"A broker on {host} needs TLS: logins would travel unencrypted.",
            hint="Give --tls-cert and --tls-key; `segue ca issue - --host HOST` makes them.",
        )
    folder = folder.absolute()
    made = broker_files(
        folder,
        host=host,
        port=port or (1883 if tls_cert is None else 8883),
        plugin=plugin or _find_plugin(),
        certificate=tls_cert.absolute() if tls_cert is not None else None,
        key=tls_key.absolute() if tls_key is not None else None,
        random_bytes=os.urandom,
    )
    files = {"cloud.login": made.login, "logins.json": made.logins, "mosquitto.conf": made.config}
    for name in files:
        must_be_new(folder / name, "Remove the folder to make a new broker of it.")
    make_folder(folder, 0o700)
    for name, text in files.items():
        write_file(folder / name, text.encode(), private=True)
    typer.echo(str(folder / "mosquitto.conf"))
    remark(
        f"Give clouds {folder / 'cloud.login'} (--mqtt-login). The broker writes logins.json, so "
        "the folder belongs to the user that runs it: mosquitto -c mosquitto.conf"
    )


def _find_plugin() -> Path:
    for place in _PLACES:
        for found in sorted(glob.glob(f"{place}/{_PLUGIN}")):
            return Path(found)
    raise InvalidArgument(
        f"{_PLUGIN} was not found.", hint="Install Mosquitto 2, or name it with --plugin."
    )
