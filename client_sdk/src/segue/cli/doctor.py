"""`segue doctor`: what is installed, found, reachable, and too slow, and what to do about it."""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from segue._access import Access, read_access
from segue._config_file import config_path, read_contexts
from segue._settings import DEFAULT_URL, find_settings
from segue.cli.console import Output, OutputOption, out, print_json
from segue.cli.runner import run
from segue.local.inspect import Check, State, fast, found, installed
from segue.local.probes import (
    RoundTrips,
    broker_of,
    certificate_of,
    probe_broker,
    probe_node,
    probe_store,
)
from segue_contract.errors import SegueError
from segue_contract.store_url import with_tls_files
from segue_contract.transport.mqtt import canonical_mqtt_url
from segue_contract.transport.tls import TlsFiles
from segue_contract.urls import without_password

app = typer.Typer(add_completion=False)

DEFAULT_EDGE, DEFAULT_CLOUD = DEFAULT_URL, "127.0.0.1:7412"
SOON = timedelta(days=14)  # a certificate's end
# Above these a person begins to notice, or a budget of 50 ms between devices is at risk.
SLOW_NODE_S, SLOW_STORE_S, SLOW_BROKER_S = 0.050, 0.010, 0.020

_MARKS = {State.OK: "[green]✓[/]", State.NOTE: "[yellow]![/]", State.BAD: "[red]✗[/]"}
_TITLES = {
    "installed": "Installed",
    "found": "Found on this machine",
    "reachable": "Reachable",
    "speed": "Speed",
}


@app.command()
def doctor(
    edge: Annotated[
        str, typer.Option(envvar="SEGUE_URL", help="Edge nodes, host:port,host:port.")
    ] = "",
    cloud: Annotated[
        str, typer.Option(envvar="SEGUE_EDGE_CLOUD", help="Clouds, host:port,host:port.")
    ] = "",
    redis_url: Annotated[str, typer.Option(envvar="SEGUE_REDIS_URL", help="A store.")] = "",
    mqtt_url: Annotated[str, typer.Option(envvar="SEGUE_MQTT_URL", help="A broker.")] = "",
    tls_ca: Annotated[
        str | None, typer.Option(help="Authorities to believe, PEM: TLS on. Or SEGUE_CA.")
    ] = None,
    tls_cert: Annotated[str | None, typer.Option(help="Our certificate. Or SEGUE_CERT.")] = None,
    tls_key: Annotated[str | None, typer.Option(help="Its key. Or SEGUE_KEY.")] = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Say what is installed, found, reachable, and too slow, and what to do about it."""
    settings = find_settings(
        os.environ, lambda: read_contexts(config_path(os.environ)), address=edge or None
    )
    if settings.context.value:
        edge = settings.url.value
    access = read_access(settings, tls_ca=tls_ca, tls_cert=tls_cert, tls_key=tls_key)
    files = access.tls or TlsFiles()
    ca, certificate, key = (str(file or "") for file in (files.ca, files.certificate, files.key))
    redis_url = with_tls_files(redis_url, ca=ca, certificate=certificate, key=key)
    reached = run(_reachable(edge, cloud, redis_url, mqtt_url, access))
    checks = [*installed(), *found(), *reached, *fast()]
    bad = [check for check in checks if check.state is State.BAD]
    if output is Output.JSON:
        print_json({"usable": not bad, "checks": checks})
    else:
        _print(out(), checks)
    if bad:
        raise typer.Exit(1)


async def _reachable(
    edge: str, cloud: str, redis_url: str, mqtt_url: str, access: Access
) -> list[Check]:
    """Probe what was named; the usual addresses of nodes also without being asked."""
    node = functools.partial(probe_node, access=access)
    probes: list[Coroutine[Any, Any, Check | None]] = [
        *(
            _probe("edge", where, bool(edge), node, SLOW_NODE_S)
            for where in _addresses(edge) or [DEFAULT_EDGE]
        ),
        *(
            _probe("cloud", where, bool(cloud), node, SLOW_NODE_S)
            for where in _addresses(cloud) or [DEFAULT_CLOUD]
        ),
    ]
    if redis_url:
        probes.append(_probe("store", redis_url, True, probe_store, SLOW_STORE_S))
    broker = functools.partial(probe_broker, access=access)
    if mqtt_url:
        probes.append(_probe("broker", mqtt_url, True, broker, SLOW_BROKER_S))
    if redis_url and mqtt_url:
        probes.append(same_broker(redis_url, mqtt_url))
    if access.tls is not None:
        named = [*_addresses(edge), *_addresses(cloud)]
        probes += [_certificate(where, access) for where in named]
    return [check for check in await asyncio.gather(*probes) if check is not None]


async def _certificate(where: str, access: Access) -> Check | None:
    """How long the certificate that a node shows is good; None where it shows none."""
    shown = await certificate_of(where, access)
    if shown is None:
        return None
    left = shown.ends - datetime.now(UTC)
    value = f"{where} shows one until {shown.ends:%Y-%m-%d}, {left.days} days"
    if left > SOON:
        return Check("reachable", "certificate", State.OK, value)
    advice = "Issue a new one there: `segue ca rotate`. The node reads it by itself."
    return Check("reachable", "certificate", State.NOTE, value, advice)


async def same_broker(redis_url: str, mqtt_url: str) -> Check:
    """Whether the clouds of that store publish through that broker."""
    try:
        known = await broker_of(redis_url)
        same = not known or canonical_mqtt_url(mqtt_url) == known
    except SegueError:  # the store's and the broker's own checks say it
        return Check("reachable", "one broker", State.NOTE, "not known")
    if same:
        return Check("reachable", "one broker", State.OK, known or "no cloud keeps one yet")
    return Check(
        "reachable",
        "one broker",
        State.BAD,
        f"The clouds on this store publish through {known}, not {without_password(mqtt_url)}.",
        f"Devices would not see what they append. Use --mqtt-url {known}, or none.",
    )


def _addresses(setting: str) -> list[str]:
    """As `SEGUE_EDGE_CLOUD` names several: with commas between them."""
    return [part.strip() for part in setting.split(",") if part.strip()]


async def _probe(
    name: str,
    where: str,
    asked: bool,
    probe: Callable[[str], Awaitable[RoundTrips]],
    slow_s: float,
) -> Check:
    shown = without_password(where)
    try:
        trips = await probe(where)
    except SegueError as error:
        if not asked:
            advice = f"segue up starts one; --{name} HOST:PORT names another."
            return Check("reachable", name, State.NOTE, f"none at {shown}", advice)
        advice = error.hint or "Is it running, and is the address right?"
        return Check("reachable", name, State.BAD, f"{shown}: {error.message}", advice)
    value = f"{shown}, round trip {_ms(trips.p50)} (slowest {_ms(trips.worst)})"
    if trips.p50 <= slow_s:
        return Check("reachable", name, State.OK, value)
    return Check("reachable", name, State.NOTE, value, _SLOW[name])


_SLOW = {
    "edge": "Slower than people notice: use a node nearer to you.",
    "cloud": "Far away: the planner keeps more on the edge, and hand-over takes longer.",
    "store": "Every frame waits for it: run the store near the cloud.",
    "broker": "Other devices see each token late: near the cloud, with set_tcp_nodelay true.",
}


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"


def _print(console: Console, checks: Sequence[Check]) -> None:
    for group, title in _TITLES.items():
        console.print(f"[bold]{title}[/]")
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(width=3, justify="right")
        table.add_column(min_width=17)
        table.add_column(overflow="fold")
        for check in (check for check in checks if check.group == group):
            advice = f"\n[dim]{escape(check.advice)}[/]" if check.advice else ""
            table.add_row(_MARKS[check.state], escape(check.name), escape(check.value) + advice)
        console.print(table)
    console.print(_verdict(checks))


def _verdict(checks: Sequence[Check]) -> str:
    bad = [check.name for check in checks if check.state is State.BAD]
    if bad:
        return f"[red]Not usable yet:[/] {', '.join(bad)}."
    notes = sum(check.state is State.NOTE for check in checks)
    remarks = {0: "", 1: ", with a remark"}.get(notes, f", with {notes} remarks")
    return f"Usable{remarks}."
