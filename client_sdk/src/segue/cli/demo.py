"""`segue demo`: one reply, two devices, an edge node, a cloud; played live and measured."""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from segue.cli.console import out
from segue.cli.runner import run
from segue.cli.screens import DemoView
from segue.cli.up import StartView
from segue.local.measure import DemoNumbers, TurnNumbers, percentile
from segue.local.play import Script, play
from segue.local.stack import LocalStack
from segue_contract.errors import InvalidArgument, TurnFailed

app = typer.Typer(add_completion=False)


@app.command()
def demo(
    json: Annotated[
        Path | None, typer.Option("--json", help="Also write the numbers to this file.")
    ] = None,
    model: Annotated[str, typer.Option(help="Name or folder of a built model.")] = "",
    plan: Annotated[
        str, typer.Option(help="Force the plan of both turns: edge, ship or text.")
    ] = "",
    max_tokens: Annotated[int, typer.Option(min=80, max=2000, help="Length of a reply.")] = 160,
) -> None:
    """Play a reply that starts on an edge node, goes on in the cloud and outlives its device."""
    if json is not None and not json.absolute().parent.is_dir():
        raise InvalidArgument(f"The folder of {json} does not exist.", hint="Make it first.")
    script = Script(max_tokens=max_tokens, first_plan=plan, second_plan=plan)
    numbers = run(_demo(script, model, out()))
    if json is not None:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(as_json(numbers)), indent=2))
        out().print(f"[dim]The same numbers are in {json}.[/]")
    if not numbers.same_text:
        raise TurnFailed("A device did not have the same text as the log.", hint="See above.")


async def _demo(script: Script, model: str, console: Console) -> DemoNumbers:
    console.print(
        "[bold]Segue[/]  one reply that moves from edge to cloud and from phone to laptop"
    )
    view, starting = DemoView(console), StartView(console)
    view.scene("A store, a broker, the cloud and an edge node start on this machine")
    began = time.monotonic()
    stack = LocalStack(model=model, on_started=starting.started)
    with starting:
        await stack.__aenter__()
    start_s = time.monotonic() - began
    try:
        numbers = await stack.guard(play(stack.edge_address, view, script, start_s))
        view.scene("What was measured")
        console.print(report(numbers))
        console.print(go_on())
    finally:
        with console.status("Stopping ..."):
            await stack.__aexit__(None, None, None)
    return numbers


def report(numbers: DemoNumbers) -> RenderableType:
    """The table of both turns, and what its words mean."""
    table = Table(box=None, padding=(0, 4, 0, 0), header_style="bold")
    table.add_column("", style="dim")
    for number, turn in enumerate(numbers.turns, start=1):
        table.add_column(f"turn {number}: the {turn.asked_by} asks")
    columns = [_column(turn) for turn in numbers.turns]
    for label in columns[0]:
        table.add_row(label, *(column[label] for column in columns))
    meaning = Table.grid(padding=(0, 4, 0, 0))
    meaning.add_column(style="dim", no_wrap=True)
    meaning.add_column(style="dim")
    for name, words in _MEANING.items():
        meaning.add_row(name, words)
    delays = numbers.delays
    meaning.add_row(
        "",
        f"Both directions together: {_ms(percentile(delays, 0.5))} p50, "
        f"{_ms(percentile(delays, 0.99))} p99 over {len(delays)} tokens.",
    )
    return Group(table, Text(), meaning)


_MEANING = {
    "time to first token": "From asking until the asking device has the first token, all included.",
    "KV shipped": "Attention state that went from edge to cloud; the same blocks in fp16.",
    "blocks reused": "64-token blocks of the prompt whose KV was there already, of all.",
    "device to device": "Per token: when the other device had it, minus when the asking one had "
    "it, by one clock.",
}


def _column(turn: TurnNumbers) -> dict[str, str]:
    plan = turn.plan
    shape = plan.shape + (" (forced)" if plan.forced else "")
    shipped = "none"
    if plan.shipped_fp16_bytes:
        share = plan.shipped_bytes / plan.shipped_fp16_bytes
        shipped = (
            f"{_size(plan.shipped_bytes)} instead of {_size(plan.shipped_fp16_bytes)} ({share:.0%})"
        )
    foreseen = plan.predicted.get(plan.shape)
    return {
        "time to first token": f"{_ms(turn.ttft_s)}, made by the {turn.first_token_by}",
        "tokens": f"{turn.tokens}: {turn.edge_tokens} by the edge, "
        f"{turn.tokens - turn.edge_tokens} by the cloud",
        "rate": f"{turn.tokens_per_s:.0f} tokens/s",
        "device to device": f"{_ms(percentile(turn.delays, 0.5))} p50, "
        f"{_ms(percentile(turn.delays, 0.99))} p99",
        "KV shipped": shipped,
        "blocks reused": f"edge {plan.edge_cached_blocks}, cloud {plan.cloud_cached_blocks} "
        f"of {plan.prompt_blocks}",
        "plan": f"{shape}: {plan.reason}" if plan.reason else shape,
        "first token foreseen": _ms(foreseen.ttft_s) if foreseen else "no",
    }


def go_on() -> RenderableType:
    """What to type to try it by hand."""
    return Text.from_markup(
        "\nGo on by hand, in three terminals:\n"
        "  [bold]segue up[/]                                       edge, cloud, store and broker\n"
        "  [bold]segue chat --session trip --device phone[/]\n"
        "  [bold]segue chat --session trip --device laptop[/]      shows the phone's turns live\n"
        "[dim](segue is .venv/bin/segue; `source .venv/bin/activate` puts it on the PATH.)[/]"
    )


def as_json(numbers: DemoNumbers) -> dict[str, Any]:
    """What `--json` writes: the rows, and each turn's plan as the session log has it."""
    return {
        "suite": "demo",
        "machine": {
            "system": platform.platform(),
            "processor": platform.machine(),
            "python": platform.python_version(),
        },
        "rows": numbers.rows(),
        "turns": [
            {
                "asked_by": turn.asked_by,
                "first_token_by": turn.first_token_by,
                "plan": turn.plan,
            }
            for turn in numbers.turns
        ],
    }


def _ms(seconds: float) -> str:
    value = seconds * 1000
    return f"{value:.1f} ms" if abs(value) < 10 else f"{value:.0f} ms"


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} KB"
