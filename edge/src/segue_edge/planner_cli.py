"""`segue plan explain`: the decision with all costs, without running anything."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from segue_contract.errors import SegueError
from segue_contract.plan import Shape
from segue_edge.planner.costs import PlanInputs, split_cost
from segue_edge.planner.plan import DEFAULT_WEIGHTS, Plan, choose, parse_force

app = typer.Typer(help="Look at how turns are planned.", add_completion=False)


@app.callback()
def plan() -> None:
    """Look at how turns are planned."""


@app.command()
def explain(
    prompt: Annotated[int, typer.Option(help="Prompt tokens.")] = 512,
    reply: Annotated[float, typer.Option(help="Expected reply tokens.")] = 128,
    edge_cached: Annotated[int, typer.Option(help="Prompt tokens the edge holds.")] = 0,
    cloud_cached: Annotated[int, typer.Option(help="Prompt tokens the cloud holds.")] = 0,
    edge_prefill: Annotated[float, typer.Option(help="Edge prefill, tokens/s.")] = 1500,
    edge_step_ms: Annotated[float, typer.Option(help="One token decoded on the edge, ms.")] = 15,
    edge_decoding: Annotated[int, typer.Option(help="Replies decoded on the edge now.")] = 0,
    edge_queue_ms: Annotated[float, typer.Option(help="Prompts ahead on the edge, ms.")] = 0,
    cloud_prefill: Annotated[float, typer.Option(help="Cloud prefill, tokens/s.")] = 800,
    cloud_step_ms: Annotated[float, typer.Option(help="One token decoded in the cloud, ms.")] = 30,
    cloud_queue_ms: Annotated[float, typer.Option(help="Wait before the cloud begins, ms.")] = 0,
    rtt_ms: Annotated[float, typer.Option(help="Round trip edge to cloud, ms.")] = 10,
    link_mbps: Annotated[float, typer.Option(help="Uplink, megabits a second.")] = 1000,
    kv_bytes: Annotated[float, typer.Option(help="KV bytes per token on the wire.")] = 12200,
    offline: Annotated[bool, typer.Option(help="The cloud is out of reach.")] = False,
    force: Annotated[str, typer.Option(help="auto, edge, ship or text.")] = "auto",
    output: Annotated[
        Literal["text", "json"],
        typer.Option("--output", "-o", help="Print for people or for programs."),
    ] = "text",
) -> None:
    """Print the decision and what every shape would cost. The defaults are SmolLM2 on two cores."""
    try:
        inputs = PlanInputs(
            prompt_tokens=prompt,
            reply_tokens=reply,
            edge_cached_tokens=edge_cached,
            cloud_cached_tokens=cloud_cached,
            edge_prefill_tokens_per_s=edge_prefill,
            edge_decode_step_s=edge_step_ms / 1e3,
            edge_decoding=edge_decoding,
            edge_queue_s=edge_queue_ms / 1e3,
            cloud_prefill_tokens_per_s=cloud_prefill,
            cloud_decode_step_s=cloud_step_ms / 1e3,
            cloud_queue_s=cloud_queue_ms / 1e3,
            rtt_s=rtt_ms / 1e3,
            goodput_bytes_per_s=link_mbps * 1e6 / 8,
            kv_bytes_per_token=kv_bytes,
            cloud_reachable=not offline,
        )
        chosen = choose(inputs, parse_force(force))
    except SegueError as error:
        typer.echo(f"segue plan explain: {error}", err=True)
        raise typer.Exit(1) from error
    if output == "json":
        typer.echo(msgspec.json.encode({"inputs": inputs, "plan": chosen}))
        return
    _print(inputs, chosen)


def _print(inputs: PlanInputs, chosen: Plan) -> None:
    console = Console()
    table = Table(title=f"{inputs.prompt_tokens} prompt tokens, {inputs.reply_tokens:.0f} expected")
    for column in ("shape", "first token", "then a gap of", "last token", "objective", ""):
        table.add_column(column, justify="left" if column in ("shape", "") else "right")
    for shape, cost in chosen.predicted.items():
        marked = shape == chosen.shape
        table.add_row(
            shape.value,
            f"{cost.ttft_s * 1e3:.0f} ms",
            f"{cost.gap_s * 1e3:.0f} ms",
            f"{cost.total_s * 1e3:.0f} ms",
            f"{chosen.objective[shape]:.3f}",
            "chosen" if marked else chosen.missing.get(shape, ""),
            style="bold green" if marked else None,
        )
    console.print(table)
    weights = DEFAULT_WEIGHTS
    console.print(f"[bold]{chosen.shape.value}[/]: {chosen.reason}")
    console.print(
        f"objective = {weights.ttft:g} x first token + {weights.gap:g} x gap + "
        f"{weights.total:g} x last token + {weights.edge_token:g} s for each edge-decoded token "
        f"beyond {weights.free_edge_tokens:.0f}; lower is better",
        highlight=False,
    )
    if chosen.shape is Shape.SHIP:
        console.print(
            f"ships {chosen.ship_blocks} blocks ({inputs.ship_bytes / 1e6:.1f} MB, "
            f"{inputs.ship_bytes / inputs.goodput_bytes_per_s * 1e3:.0f} ms of the link); "
            f"the cloud computes tokens {chosen.cloud_prefill[0]} to {chosen.cloud_prefill[1]}"
        )
    console.print(f"a split would be cut at token {split_cost(inputs).split_at}")
