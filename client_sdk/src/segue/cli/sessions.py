"""`segue sessions`, `segue session` and `segue log`: what a node keeps, for people and programs."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.table import Table
from rich.text import Text

from segue.cli.chat import AddressOption, DeviceOption, default_device
from segue.cli.console import Output, OutputOption, out, print_json
from segue.cli.runner import run
from segue.errors import SegueError
from segue_contract.plan import decode_plan
from segue_contract.sync.branches import branch_of
from segue_contract.sync.export import Export
from segue_contract.sync.ops import TurnStarted
from segue_contract.sync.replica import Replica
from segue_contract.sync.state import Cursor, SessionState, TurnState

app = typer.Typer(add_completion=False)
log_app = typer.Typer(add_completion=False)
keep_app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Delete, export or import sessions."
)


@app.command()
def sessions(
    address: AddressOption = None,
    output: OutputOption = Output.TEXT,
    limit: Annotated[
        int, typer.Option("--limit", "-n", min=0, help="So many at most; 0: all.")
    ] = 100,
) -> None:
    """List the sessions of a node, newest first."""
    run(_sessions(address, output, limit))


async def _sessions(addresses: list[str] | None, output: Output, limit: int) -> None:
    import segue

    async with segue.Client(addresses, device=default_device()) as client:
        if limit:
            found = await client.sessions(limit)
        else:
            found = [one async for one in client.all_sessions()]
    if output is Output.JSON:
        print_json(
            [
                {
                    "session": one.session, "turns": one.turns, "title": one.title,
                    "offset": one.cursor.offset, "generation": one.cursor.generation,
                    "updated_ms": one.updated_ms, "running_turn": one.running_turn,
                }
                for one in found
            ]
        )  # fmt: skip
        return
    if not found:
        out().print("No sessions yet. Begin one: segue chat --session NAME", style="dim")
        return
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    for column, justify in (("session", "left"), ("turns", "right"), ("changed", "left")):
        table.add_column(column, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("begins with", overflow="ellipsis", no_wrap=True)
    now = time.time()
    for one in found:
        changed = "now, replying" if one.running_turn else age(now - one.updated_ms / 1000)
        title = " ".join(one.title.split())
        table.add_row(Text(one.session, "bold"), str(one.turns), changed, Text(title))
    out().print(table)


def age(seconds: float) -> str:
    """ "3 min ago", from seconds; clocks that disagree read as now."""
    for unit, length in (("day", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count = int(seconds // length)
        if count > 0:
            plural = "s" if unit == "day" and count > 1 else ""
            return f"{count} {unit}{plural} ago"
    return "now"


_DAY_S = 86400.0


@keep_app.command()
def delete(
    names: Annotated[list[str], typer.Argument(help="Sessions.", metavar="NAME...")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    address: AddressOption = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Delete sessions with all they hold, for all devices."""
    if not yes:
        typer.confirm(f"Delete {', '.join(names)} for good?", abort=True, err=True)
    run(_delete(names, address, output))


async def _delete(names: list[str], addresses: list[str] | None, output: Output) -> None:
    import segue

    async with segue.Client(addresses, device=default_device()) as client:
        for name in names:
            deleted = await client.delete_session(name)
            if output is Output.JSON:
                print_json({"session": name, "deleted": deleted})
            else:
                out().print(f"{name} is deleted." if deleted else f"There is no {name}.")


@keep_app.command()
def revoke(
    session: Annotated[
        str, typer.Argument(help="Its name; or the beginning of names and *, for all of them.")
    ],
    device: Annotated[str, typer.Argument(help="The device that shall have no access any more.")],
    address: AddressOption = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Make a device's tokens for sessions void; its streams end within two seconds."""
    run(_revoke(session, device, address, output))


async def _revoke(session: str, device: str, addresses: list[str] | None, output: Output) -> None:
    import segue

    async with segue.Client(addresses, device=default_device()) as client:
        before_s = await client.revoke(session, device)
    if output is Output.JSON:
        print_json({"session": session, "device": device, "void_before_s": before_s})
    else:
        out().print(
            f"{device}'s tokens for {session} are void. "
            "Those that are issued half a minute later count again."
        )


@keep_app.command()
def expire(
    days: Annotated[float, typer.Option("--idle", min=0.0001, help="Days without any use.")],
    address: AddressOption = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Delete all sessions that no device wrote to, opened or used for some days."""
    run(_expire(days, address, output))


async def _expire(days: float, addresses: list[str] | None, output: Output) -> None:
    import segue

    async with segue.Client(addresses, device=default_device()) as client:
        gone = await client.expire_sessions(max(days * _DAY_S, 1.0))
    if output is Output.JSON:
        print_json({"deleted": gone})
    else:
        out().print("\n".join([*gone, f"{len(gone)} sessions are deleted."]))


@keep_app.command(name="export")
def export_(
    session: Annotated[str, typer.Argument(help="Its name.")],
    file: Annotated[Path | None, typer.Argument(help="By default NAME.segue.")] = None,
    address: AddressOption = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Write a session into one file, checksummed."""
    where = file or Path(f"{session}.segue")
    found = run(_export(session, where, address))
    facts = {
        "session": session, "file": str(where), "bytes": where.stat().st_size,
        "turns": len(found.session.turns), "offset": found.head.tail,
        "generation": found.head.generation,
    }  # fmt: skip
    if output is Output.JSON:
        print_json(facts)
    else:
        out().print(f"{session} is in {where}: {facts['turns']} turns, {facts['bytes']} bytes.")


async def _export(session: str, file: Path, addresses: list[str] | None) -> Export:
    import segue

    async with segue.Client(addresses, device=default_device()) as client:
        return await client.export_session(session, file)


@keep_app.command(name="import")
def import_(
    file: Annotated[Path, typer.Argument(help="Of `segue session export`.")],
    session: Annotated[str, typer.Argument(help="By default its old name.")] = "",
    address: AddressOption = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Make a session of an exported file; its name must be new, or the session empty."""
    run(_import(file, session, address, output))


async def _import(file: Path, session: str, addresses: list[str] | None, output: Output) -> None:
    import segue

    async with segue.Client(addresses, device=default_device()) as client:
        made = await client.import_session(file, session)
    if output is Output.JSON:
        print_json(
            {
                "session": made.session, "turns": made.turns, "offset": made.cursor.offset,
                "generation": made.cursor.generation,
            }
        )  # fmt: skip
    else:
        out().print(
            f"{made.session} has {made.turns} turns. Go on: segue chat --session {made.session}"
        )


@log_app.command()
def log(
    session: Annotated[str, typer.Argument(help="Its name.")],
    address: AddressOption = None,
    device: DeviceOption = "",
    from_offset: Annotated[int, typer.Option("--from", help="Begin after this offset.")] = 0,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as it grows.")] = False,
    output: OutputOption = Output.TEXT,
) -> None:
    """Print a session's log, one entry per line; with -o json as JSON lines."""
    run(_log(session, address, device or default_device(), from_offset, follow, output))


async def _log(
    name: str,
    addresses: list[str] | None,
    device: str,
    from_offset: int,
    follow: bool,
    output: Output,
) -> None:
    import segue

    async with segue.Client(addresses, device=device) as client:
        session = await client.session(name, must_exist=True)
        after = from_offset
        log = Replica(SessionState(cursor=Cursor(session.tail.generation, after)))
        for item in await session.read(from_offset):
            _show(item, log, output)
            after = item.offset
        if not follow:
            return
        async for item in session.follow(after):
            if item.offset > after:
                _show(item, log, output)
                after = item.offset


def _show(item: Any, log: Replica, output: Output) -> None:
    rows = list(rows_of(item, log))
    if output is Output.JSON:
        for row in rows:
            typer.echo(msgspec.json.encode(row))
        return
    for row in rows:
        out().print(line_of(row), soft_wrap=True)


def rows_of(item: Any, log: Replica) -> list[dict[str, Any]]:
    """One mapping for an entry; for a snapshot, one for each thing it stands for.

    Args:
        log: the entries so far, to which this one is added: it knows what a branch is beside.
    """
    from segue.events import Snapshot

    if not isinstance(item, Snapshot):
        log.apply_op(item.generation, item.offset, item.op)
        fields = msgspec.to_builtins(item.op)
        fields.pop("tokens", None)
        pieces = fields.pop("pieces", None)
        if pieces is not None:
            fields["tokens"], fields["text"] = len(pieces), "".join(pieces)
        if fields.get("plan"):
            with contextlib.suppress(SegueError):
                fields["plan"] = msgspec.to_builtins(decode_plan(item.op.plan))
        if isinstance(item.op, TurnStarted):
            fields.update(_beside(log.state.turns, item.op.turn))
        return [{"offset": item.offset, "generation": item.generation, **fields}]
    log.load(item.state)
    where = {"offset": item.offset, "generation": item.generation}
    turns = item.state.turns
    rows = [{**where, "kind": "turn", **_turn_fields(turns, turn)} for turn in turns]
    rows += [
        {**where, "kind": "value", "name": name, "value": value}
        for name, value in item.state.values.items()
    ]
    return rows or [{**where, "kind": "snapshot"}]


def _turn_fields(turns: list[TurnState], turn: TurnState) -> dict[str, Any]:
    fields = {
        "turn": turn.turn, "device": turn.device, "prompt": turn.prompt, "text": turn.text,
        "tokens": len(turn.tokens), "reason": turn.reason or "running",
    }  # fmt: skip
    if turn.offline:
        fields.update(offline=True, follows=turn.follows, **_beside(turns, turn.turn))
    return fields


def _beside(turns: list[TurnState], turn: str) -> dict[str, list[str]]:
    """Of a turn in a branch: the turns that the branch is beside."""
    branch = branch_of(turns, turn)
    return {"branch_beside": list(branch.beside)} if branch is not None else {}


def line_of(row: dict[str, Any]) -> Text:
    """offset, kind, who, and the rest of what the entry says."""
    from segue.cli._chat_text import clean

    rest = {
        name: value
        for name, value in row.items()
        if name not in ("offset", "generation", "kind", "device", "id", "at_ms", "plan", "sampling")
    }
    line = Text.assemble(
        (f"{row['offset']:>6} ", "dim"),
        (f"{row['kind']:<13} ", "cyan"),
        (f"{row.get('device') or '-':<10} ", "magenta"),
    )
    turn = rest.pop("turn", "")
    if turn:
        line.append(f"{turn[-6:]} ", "dim")
    text = rest.pop("text", None)
    words = [f"{name}={_value(value)}" for name, value in rest.items() if value not in ("", b"")]
    line.append(" ".join(words), "dim" if text is not None else "")
    if text is not None:
        line.append((" " if words else "") + repr(clean(str(text))))
    return line


def _value(value: Any) -> str:
    from segue.cli._chat_text import clean

    if isinstance(value, dict):
        return ",".join(f"{name}:{inner}" for name, inner in value.items())
    if isinstance(value, list):
        return ",".join(map(str, value)) or "-"
    return clean(str(value))
