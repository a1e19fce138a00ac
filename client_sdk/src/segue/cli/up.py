"""`segue up`: everything on this machine until Ctrl-C."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from segue.cli.console import out
from segue.cli.runner import run
from segue.client import Client
from segue.errors import SegueError
from segue.events import SessionInfo
from segue.local.parts import Part, Program, Server
from segue.local.revival import keep_up
from segue.local.stack import LocalStack
from segue_contract.errors import StartFailed
from segue_contract.transport.together import end
from segue_contract.urls import without_password

app = typer.Typer(add_completion=False)

STATE_INTERVAL_S = 1.0

_WHAT = {"store": "session log", "broker": "live fan-out", "cloud": "decode", "edge": "first token"}


@app.command()
def up(
    edge_port: Annotated[int, typer.Option(help="Port of the first edge node; 0: any.")] = 7411,
    cloud_port: Annotated[int, typer.Option(help="Port of the cloud; 0: any.")] = 7412,
    edges: Annotated[int, typer.Option(min=1, max=8, help="How many edge nodes.")] = 1,
    model: Annotated[str, typer.Option(help="Name or folder of a built model.")] = "",
    dtype: Annotated[str, typer.Option(help="Of the cloud's engine: auto, bf16, fp32.")] = "auto",
    plan: Annotated[str, typer.Option(help="Force a plan: edge, ship or text.")] = "",
    redis_url: Annotated[str, typer.Option(envvar="SEGUE_REDIS_URL", help="Use this store.")] = "",
    mqtt_url: Annotated[str, typer.Option(envvar="SEGUE_MQTT_URL", help="Use this broker.")] = "",
    data: Annotated[
        Path | None, typer.Option(help="Keep sessions in this folder over restarts.")
    ] = None,
) -> None:
    """Run an edge node, the cloud, a store and a broker on this machine until Ctrl-C.

    What ends by itself is started again, three times a minute at most.
    """
    view = StartView(out())
    stack = LocalStack(
        model=model,
        edges=edges,
        dtype=dtype,
        edge_port=edge_port,
        cloud_port=cloud_port,
        redis_url=redis_url,
        mqtt_url=mqtt_url,
        data=data,
        edge_args=("--plan", plan) if plan else (),
        on_started=view.started,
        on_news=view.news,
    )
    run(_serve(stack, view, out()))


async def _serve(stack: LocalStack, view: StartView, console: Console) -> None:
    with view:
        await stack.__aenter__()
    stopped = True
    try:
        console.print(addresses(stack))
        console.print(next_steps(stack))
        live = asyncio.create_task(_show_state(stack, console), name="live state")
        try:
            await keep_up(stack, lambda part: view.ended(part, loses=_loses(stack, part)))
        except StartFailed:
            stopped = False
            raise
        finally:
            await end(live)
    finally:
        with console.status("Stopping ..." if stopped else "The rest is being stopped ..."):
            await stack.__aexit__(None, None, None)
        if stopped:
            console.print("Stopped.")


def _loses(stack: LocalStack, part: Part) -> str:
    if part.name == "store" and not stack.keeps_data:
        return "Its sessions are gone; `--data FOLDER` keeps them."
    return ""


async def _show_state(stack: LocalStack, console: Console) -> None:
    """One line that tells how long it runs and what goes on, until cancelled."""
    if not console.is_terminal:
        return
    began = time.monotonic()
    addresses = [stack.edge_address, stack.cloud_address]
    async with Client(addresses, device="segue-up", token="", tls_ca="") as client:
        with Live(console=console, transient=True, auto_refresh=False) as live:
            while True:
                try:
                    doing = activity(await client.sessions())
                except SegueError as error:
                    doing = f"[yellow]{escape(error.message)}[/]"
                minutes, seconds = divmod(int(time.monotonic() - began), 60)
                clock = f"{minutes}:{seconds:02}"
                live.update(Text.from_markup(f"[green]●[/] {clock}  {doing}"), refresh=True)
                await asyncio.sleep(STATE_INTERVAL_S)


def activity(sessions: Sequence[SessionInfo]) -> str:
    """What goes on, in a line: how many sessions there are, and which ones have a reply running."""
    if not sessions:
        return "[dim]no session yet[/]"
    count = f"{len(sessions)} session{'s' if len(sessions) > 1 else ''}"
    running = [info.session for info in sessions if info.running_turn]
    shown = escape(", ".join(running[:3])) + (", ..." if len(running) > 3 else "")
    return f"{count}, a reply runs in {shown}" if running else f"{count}, all quiet"


class StartView:
    """What starts and what is ready, as it happens; plain lines where no terminal shows it.

    with StartView(console) as view:
        ... LocalStack(on_started=view.started, on_news=view.news) ...
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began = 0.0
        self._live: Live | None = None

    def __enter__(self) -> StartView:
        self._began = time.monotonic()
        if self._console.is_terminal:
            self._live = Live(
                Spinner("dots", text="Starting store, broker, cloud and edge ..."),
                console=self._console,
                transient=True,
            )
            self._live.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.__exit__(None, None, None)
            self._live = None

    def ended(self, part: Part, *, loses: str = "") -> None:
        """It ended by itself and is started again; `loses`: what is gone with it."""
        words = f"{part.name:<8} ended: {part.ended_how}. Starting it again. {loses}".rstrip()
        self._console.print(f"  [yellow]![/] {escape(words)}", highlight=False)

    def started(self, part: Part, seconds: float) -> None:
        what = _WHAT.get(part.name.partition("-")[0], "")
        self._console.print(
            f"  [green]✓[/] {part.name:<8} [dim]{what:<13}{seconds:5.1f} s[/]", highlight=False
        )

    def news(self, part: Part, what: str) -> None:
        self._console.print(f"  [dim]… {part.name:<8} {escape(what)}[/]", highlight=False)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began


def addresses(stack: LocalStack) -> RenderableType:
    """A table of what runs where."""
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    for column in ("", "address", "what", "process"):
        table.add_column(column)
    for part in stack.processes.values():
        table.add_row(part.name, part.address, _describe(part), str(part.pid))
    if "store" not in stack.processes:
        table.add_row("store", without_password(stack.redis_url), "yours", "")
    if "broker" not in stack.processes:
        table.add_row("broker", without_password(stack.mqtt_url), "yours", "")
    return Group(Text(), table, Text(f"Logs: {stack.folder}", style="dim"), Text())


def _describe(part: Part) -> str:
    if isinstance(part, Server):
        return part.kind
    if isinstance(part, Program) and part.ready is not None:
        shown = ("model", "provider", "device", "dtype")
        facts = [str(part.ready.facts[name]) for name in shown if part.ready.facts.get(name)]
        return ", ".join(facts)
    return ""


def next_steps(stack: LocalStack) -> RenderableType:
    """What to type in other terminals."""
    node = "" if stack.edge_address == "127.0.0.1:7411" else f" --address {stack.edge_address}"
    lines = [
        "Now, in two other terminals (they are two devices of one session):",
        f"  [bold]segue chat --session trip --device phone{node}[/]",
        f"  [bold]segue chat --session trip --device laptop{node}[/]",
        "[dim]Ctrl-C here stops everything.[/]",
    ]
    return Text.from_markup("\n".join(lines))
