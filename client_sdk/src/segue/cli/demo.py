"""`segue demo`: one reply, two devices, an edge node, a cloud; played live and measured."""

from __future__ import annotations

import dataclasses
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
        str, typer.Option(help="Of both turns: auto, edge, ship or text. Default: ship, then auto.")
    ] = "",
    max_tokens: Annotated[int, typer.Option(min=80, max=2000, help="Of the first reply.")] = 160,
) -> None:
    """Play a reply that starts on an edge node, goes on in the cloud and outlives its device."""
    if json is not None and not json.absolute().parent.is_dir():
        raise InvalidArgument(f"The folder of {json} does not exist.", hint="Make it first.")
    script = Script(max_tokens=max_tokens, second_max_tokens=max_tokens * 5 // 8)
    if plan:
        chosen = "" if plan == "auto" else plan
        script = dataclasses.replace(script, first_plan=chosen, second_plan=chosen)
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
    console.print("[dim]The default model is a small one: it writes fluently, not wisely.[/]")
    view, starting = DemoView(console), StartView(console)
    view.scene("A store, a broker, the cloud and an edge node start on this machine")
    began = time.monotonic()
    stack = LocalStack(model=model, on_started=starting.started, on_news=starting.news)
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
    table.add_column("", style="dim", no_wrap=True)
    for number, turn in enumerate(numbers.turns, start=1):
        table.add_column(f"turn {number}: {turn.asked_by} asks")
    columns = [_column(turn) for turn in numbers.turns]
    for label in columns[0]:
        table.add_row(label, *(column[label] for column in columns))
    meaning = Table.grid(padding=(0, 4, 0, 0))
    meaning.add_column(style="dim", no_wrap=True)
    meaning.add_column(style="dim")
    for name, words in _MEANING.items():
        meaning.add_row(name, words)
    return Group(table, Text(), meaning)


_MEANING = {
    "plan": "ship: the edge prefills, its KV goes up, the cloud decodes; text: the cloud does "
    "both; edge: the edge does both. Turn 1 ships because the demo asked for it.",
    "first token": "From asking until the asking device has it, all included; who made it.",
    "foreseen": "When the planner expected each plan's first token; it also weighs the gap after "
    "it and the whole reply.",
    "devices apart": "Per token, how far apart in time both devices had it, by one clock.",
    "KV shipped": "Attention state sent from edge to cloud, of what it would be in fp16.",
    "blocks reused": "64-token blocks of the prompt whose KV was there from before.",
}


def _column(turn: TurnNumbers) -> dict[str, str]:
    plan = turn.plan
    foreseen = [
        f"{shape} {plan.predicted[shape].ttft_s * 1000:.0f}"
        for shape in ("ship", "text", "edge")
        if shape in plan.predicted
    ]
    shipped = "none"
    if plan.shipped_fp16_bytes:
        share = plan.shipped_bytes / plan.shipped_fp16_bytes
        sizes = f"{plan.shipped_bytes / 1e6:.1f} of {plan.shipped_fp16_bytes / 1e6:.1f} MB"
        shipped = f"{sizes} ({share:.0%})"
    p50, p99 = percentile(turn.delays, 0.5), percentile(turn.delays, 0.99)
    return {
        "plan": f"{plan.shape}, {'asked for' if plan.forced else 'chosen by the planner'}",
        "first token": f"{turn.ttft_s * 1000:.0f} ms, {turn.first_token_by}",
        "foreseen": f"{', '.join(foreseen)} ms" if foreseen else "nothing",
        "tokens": f"{turn.tokens}: edge {turn.edge_tokens}, cloud {turn.tokens - turn.edge_tokens}",
        "rate": f"{turn.tokens_per_s:.0f} tokens/s",
        "devices apart": f"{p50 * 1000:.1f} ms p50, {p99 * 1000:.1f} ms p99",
        "KV shipped": shipped,
        "blocks reused": f"edge {turn.edge_reused_blocks}, cloud {turn.cloud_reused_blocks} "
        f"of {turn.prompt_blocks}",
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
                "usage": turn.usage,
            }
            for turn in numbers.turns
        ],
    }
