"""`segue ca`: a certificate authority for a small site. Keys are files that only their owner reads.

The authority's folder holds `ca.crt`, which every node and device gets, and `ca.key`, which stays.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from segue.cli.console import Output, OutputOption, err, out, print_json
from segue.local.authority import (
    AUTHORITY_DAYS,
    NODE_DAYS,
    Facts,
    Issued,
    issue,
    new_authority,
    new_request,
    read_certificates,
    signing_certificate,
)
from segue_contract.errors import InvalidArgument

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Make a site's certificates: an authority, and what it signs for nodes.",
)

DEFAULT_FOLDER = Path("ca")
CERTIFICATE, KEY = "ca.crt", "ca.key"

FolderOption = Annotated[
    Path, typer.Option("--ca", envvar="SEGUE_CA_FOLDER", help="The authority's folder.")
]
DaysOption = Annotated[int, typer.Option("--days", min=1, max=AUTHORITY_DAYS)]
RequestOption = Annotated[
    Path | None,
    typer.Option("--csr", help="A signing request: the node's key stays on its machine."),
]


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR")] = DEFAULT_FOLDER,
    name: Annotated[str, typer.Option("--name", help="What people call it.")] = "Segue",
    days: DaysOption = AUTHORITY_DAYS,
) -> None:
    """Make an authority: ca.crt for everybody, ca.key for nobody else."""
    for file in (folder / KEY, folder / CERTIFICATE):
        must_be_new(file, "`segue ca rotate --authority` replaces an authority.")
    made = new_authority(name, datetime.now(UTC), days=days)
    make_folder(folder, 0o700)
    write_file(folder / KEY, made.key, private=True)
    write_file(folder / CERTIFICATE, made.certificate)
    typer.echo(str(folder / CERTIFICATE))
    remark(f"Give it to nodes (--tls-ca) and devices (SEGUE_CA). Keep {folder / KEY} offline.")


@app.command(name="issue")
def issue_(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="edge/SITE/NAME, cloud/NAME, operator/NAME; '-': hosts only."
        ),
    ],
    host: Annotated[
        list[str] | None,
        typer.Option(help="A DNS name or IP address that it is reached by; may be repeated."),
    ] = None,
    csr: RequestOption = None,
    to: Annotated[
        Path, typer.Option("--out", help="Folder for NAME.crt and NAME.key, '/' written '-'.")
    ] = Path("."),
    ca: FolderOption = DEFAULT_FOLDER,
    days: DaysOption = NODE_DAYS,
) -> None:
    """Sign a node's certificate; without --csr its key is made here, too."""
    hosts = host or []
    node = "" if name == "-" else name
    stem = node.replace("/", "-") or (hosts[0].replace("*", "any") if hosts else "")
    request = _read(csr) if csr is not None else b""
    made = issue(_authority(ca), node, hosts, datetime.now(UTC), days=days, request=request)
    certificate, key = to / f"{stem}.crt", to / f"{stem}.key"
    must_be_new(certificate, "`segue ca rotate` replaces it.")
    if made.key:
        must_be_new(key, "`segue ca rotate` replaces it.")
    make_folder(to, 0o755)
    _put(made, certificate, key)


@app.command()
def request(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="FILE.csr and FILE.key are made.")],
) -> None:
    """Make a key and a signing request, on the machine that the key shall not leave."""
    asked, key = file.with_name(f"{file.name}.csr"), file.with_name(f"{file.name}.key")
    must_be_new(key, "Remove it first, or choose another name.")
    signed, secret = new_request()
    write_file(key, secret, private=True)
    write_file(asked, signed)
    typer.echo(str(asked))
    remark(f"Where the authority is: segue ca issue NAME --host HOST --csr {asked.name}")


@app.command()
def rotate(
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="CERTIFICATE...", help="FILE.crt of nodes.")
    ] = None,
    authority: Annotated[
        bool, typer.Option("--authority", help="Make a new authority beside the old one.")
    ] = False,
    csr: RequestOption = None,
    ca: FolderOption = DEFAULT_FOLDER,
    days: DaysOption = NODE_DAYS,
) -> None:
    """Replace certificates by new ones of the same names, with new keys; nodes that run read them.

    With --authority: from now on a new one signs, and ca.crt holds both, so that nothing breaks
    until every node has the new ca.crt and a certificate of the new authority.
    """
    now = datetime.now(UTC)
    if authority:
        _rotate_authority(ca, now)
    if csr is not None and len(files or []) != 1:
        raise InvalidArgument("--csr goes with one certificate.")
    for certificate in files or []:
        old = read_certificates(_read(certificate), str(certificate))[0]
        if old.authority or len(old.nodes) > 1:
            raise InvalidArgument(
                f"{certificate} is no node's.", hint="--authority replaces ca.crt."
            )
        asked = _read(csr) if csr is not None else b""
        node = old.nodes[0] if old.nodes else ""
        made = issue(_authority(ca), node, old.hosts, now, days=days, request=asked)
        _put(made, certificate, certificate.with_suffix(".key"))


@app.command()
def show(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Certificates, PEM.")],
    output: OutputOption = Output.TEXT,
) -> None:
    """Print whom certificates name, who signed them, and until when they are good."""
    found = [(file, one) for file in files for one in read_certificates(_read(file), str(file))]
    if output is Output.JSON:
        print_json([{"file": str(file), **_as_json(one)} for file, one in found])
        return
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("file", "names", "signed by", "until", "days left"):
        table.add_column(column, overflow="fold")
    now = datetime.now(UTC)
    for file, one in found:
        names = ", ".join((*one.nodes, *one.hosts)) or one.subject
        left = (one.ends - now).days
        table.add_row(
            str(file),
            Text(names, "bold"),
            "itself" if one.issuer == one.subject else one.issuer,
            f"{one.ends:%Y-%m-%d}",
            Text(str(left), "red" if left < 0 else "yellow" if left < 14 else ""),
        )
    out().print(table)


def _as_json(one: Facts) -> dict[str, object]:
    return {
        "nodes": one.nodes, "hosts": one.hosts, "authority": one.authority,
        "subject": one.subject, "issuer": one.issuer, "serial": one.serial,
        "begins": one.begins.isoformat(), "ends": one.ends.isoformat(),
    }  # fmt: skip


def _rotate_authority(folder: Path, now: datetime) -> None:
    old = _authority(folder)
    signing = signing_certificate(old)
    known = read_certificates(signing, str(folder / CERTIFICATE))
    made = new_authority(known[0].subject.removeprefix("CN="), now)
    # First what says whom to believe: between the two writes the old key still signs, and what it
    # signs is believed. Older ones than the last are believed no more.
    both = made.certificate + signing
    write_file(folder / CERTIFICATE, both)
    write_file(folder / KEY, made.key, private=True)
    typer.echo(str(folder / CERTIFICATE))
    remark("It holds both authorities: give it to all, then rotate every node's certificate.")


def _authority(folder: Path) -> Issued:
    if not (folder / KEY).exists():
        raise InvalidArgument(
            f"There is no authority in {folder}.",
            hint="Make one with `segue ca init`, or name its folder with --ca.",
        )
    return Issued(_read(folder / CERTIFICATE), _read(folder / KEY))


def _put(made: Issued, certificate: Path, key: Path) -> None:
    if made.key:
        write_file(key, made.key, private=True)
    write_file(certificate, made.certificate)
    typer.echo(str(certificate))


def must_be_new(file: Path, hint: str) -> None:
    if file.exists():
        raise InvalidArgument(f"{file} is there already.", hint=hint)


def make_folder(folder: Path, mode: int) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=mode)
    except OSError as error:
        raise InvalidArgument(f"{folder} cannot be made: {error.strerror}.") from error


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InvalidArgument(f"{file} cannot be read: {error.strerror}.") from error


def write_file(file: Path, data: bytes, *, private: bool = False) -> None:
    """Whole, or not at all; a private one is never readable by others, not for a moment."""
    fresh = file.with_name(f".{file.name}.new")
    try:
        fresh.unlink(missing_ok=True)
        number = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o644)
        with os.fdopen(number, "wb") as writer:
            writer.write(data)
            writer.flush()
            os.fsync(writer.fileno())
        fresh.replace(file)
    except OSError as error:
        raise InvalidArgument(f"{file} cannot be written: {error.strerror}.") from error


def remark(text: str) -> None:
    err().print(text, style="dim", soft_wrap=True)
