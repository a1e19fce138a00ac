"""`segue model build | list | verify | quality | tensorrt`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from segue.cli import model_build
from segue.cli.console import Output, OutputOption, print_json
from segue.cli.model_quality import quality_table
from segue_contract.errors import InvalidArgument, ModelError
from segue_contract.model.home import DEFAULT_MODEL, is_built, model_directory, model_home

app = typer.Typer(help="Build, list and verify models.", no_args_is_help=True, add_completion=False)
_console = Console(stderr=True)
_LOSS_HELP = "Share of next tokens that a recipe may change."


@app.command()
def build(
    source: Annotated[
        Path | None,
        typer.Argument(help="A .gguf file or a Hugging Face folder; none: the default model."),
    ] = None,
    name: Annotated[str, typer.Option(help="The model's name on this machine.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Build even if it is there.")] = False,
    max_agreement_loss: Annotated[
        float | None,
        typer.Option(min=0.0, max=0.99, help=f"{_LOSS_HELP} Default: 0.03."),
    ] = None,
) -> None:
    """Build a model for edge and cloud, once. The default model needs no arguments."""
    if source is not None and not name:
        raise InvalidArgument(
            "The model has no name.",
            hint="Say how to call it: segue model build SOURCE --name NAME.",
        )
    name, home = name or DEFAULT_MODEL, model_home()
    if is_built(home / name) and not force:
        _console.print(f"[green]✓[/] {name} is built already: {home / name}")
        return
    began = time.monotonic()
    found: list[dict[str, object]] = []
    with _bar() as bar:
        task = bar.add_task(f"Building {name}", total=1.0, what="Starting")

        def progress(done: float, what: str) -> None:
            bar.update(task, completed=done, what=what)

        directory = model_build.build(
            name,
            source,
            home,
            progress=progress,
            wait=lambda: progress(0.0, "Another process builds this model: waiting for it"),
            answer=found.append,
            max_loss=max_agreement_loss,
        )
    for report in found:
        _print_quality(report)
        _console.print(f"[dim]On a text of your own: segue model quality {name} --text FILE[/]")
    _console.print(f"[green]✓[/] {name} built in {time.monotonic() - began:.0f} s: {directory}")


@app.command("list")
def list_models(output: OutputOption = Output.TEXT) -> None:
    """List the models built on this machine."""
    found: list[dict[str, object]] = []
    model_build.run_step(["segue_contract.model", "list"], lambda _done, _what: None, found.append)
    if output is Output.JSON:
        print_json(found)
        return
    table = Table("name", "made from", "layers", "context", "edge", "size", box=None)
    for entry in found:
        if "broken" in entry:
            table.add_row(str(entry["name"]), f"[red]{entry['broken']}[/]")
            continue
        megabytes = int(str(entry["bytes"])) / 1e6
        cells = [str(entry[key]) for key in ("name", "source", "layers", "context", "edge_quant")]
        table.add_row(*cells, f"{megabytes:.0f} MB")
    if not found:
        _console.print("No model is built yet. Build one with: [bold]segue model build[/]")
        return
    Console().print(table)


@app.command()
def verify(
    name: Annotated[str, typer.Argument(help="A model's name or directory.")] = DEFAULT_MODEL,
) -> None:
    """Hash every file of a model again and compare with its manifest."""
    directory = model_directory(name)
    with _bar() as bar:
        task = bar.add_task(f"Verifying {directory.name}", total=1.0, what="")
        found: list[dict[str, object]] = []
        model_build.run_step(
            ["segue_contract.model", "verify", str(directory)],
            lambda done, what: bar.update(task, completed=done, what=what),
            found.append,
        )
        bar.update(task, completed=1.0, what="Done")
    if not found:
        raise ModelError(f"{directory} could not be verified.")
    _console.print(
        f"[green]✓[/] {directory.name}: {found[0]['files']} files, all as they were built"
    )


@app.command()
def quality(
    name: Annotated[str, typer.Argument(help="A model's name or directory.")] = DEFAULT_MODEL,
    text: Annotated[
        Path | None, typer.Option(help="Measure on this file; none: on our own text.")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of 512 + 256 tokens.")] = 20,
    max_agreement_loss: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=0.99, help=f"{_LOSS_HELP} Given: the recipes are chosen again by it."
        ),
    ] = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Measure what the edge's weights and each KV codec cost the reply, on any text."""
    directory = model_directory(name)
    command = ["segue_edge.prefill.ladder", "report", str(directory.resolve())]
    command += ["--windows", str(windows)]
    if text is not None:
        command += ["--text", str(text.resolve())]
    if max_agreement_loss is not None:
        command += ["--max-agreement-loss", str(max_agreement_loss)]
    found: list[dict[str, object]] = []
    with _bar() as bar:
        task = bar.add_task(f"Measuring {directory.name}", total=1.0, what="Starting")
        model_build.run_step(
            command,
            lambda done, what: bar.update(task, completed=done, what=what),
            found.append,
        )
        bar.update(task, completed=1.0, what="Done")
    if not found:
        raise ModelError(f"{directory} could not be measured.")
    if output is Output.JSON:
        answer = {key: value for key, value in found[0].items() if key != "event"}
        sys.stdout.write(json.dumps({"model": directory.name, **answer}, indent=2) + "\n")
        return
    _print_quality(found[0])


@app.command()
def tensorrt(
    name: Annotated[str, typer.Argument(help="A model's name or directory.")] = DEFAULT_MODEL,
) -> None:
    """Add an INT8 graph for edges whose onnxruntime has TensorRT, and measure it like the others.

    Clouds refuse its KV until they have the model's new manifest: copy it there.
    """
    directory = model_directory(name)
    found: list[dict[str, Any]] = []
    with _bar() as bar:
        task = bar.add_task(f"Extending {directory.name}", total=1.0, what="Starting")
        model_build.run_step(
            ["segue_edge.prefill.qdq", str(directory.resolve())],
            lambda done, what: bar.update(task, completed=done, what=what),
            found.append,
        )
        bar.update(task, completed=1.0, what="Done")
    if not found:
        raise ModelError(f"{directory} could not be extended.")
    made = found[0]
    agreement = {row["recipe"]: row["agreement"] for row in made["rows"]}[made["recipe"]]
    facts = f"agreement {agreement:.3f} in {made['recipe']}, {made['int8_share']:.0%} in INT8"
    if made["allowed"]:
        _console.print(f"[green]✓[/] {directory.name} has a graph for TensorRT: {facts}")
    else:
        _console.print(
            f"[yellow]No INT8 graph for TensorRT is within the model's budget: {facts}. Edges with"
            " a card go on with 8-bit weights.[/]"
        )


def _print_quality(report: dict[str, object]) -> None:
    Console(stderr=False).print(quality_table(report))
    if report["note"]:
        _console.print(f"[yellow]{report['note']}[/]")
    if report["edge"] != report["would_choose"]:
        _console.print(
            f"[yellow]The model ships {report['edge']}; on this text the budget chooses "
            f"{report['would_choose'] or 'none'}.[/] To choose again, add --max-agreement-loss."
        )


def _bar() -> Progress:
    """One line, also in 80 columns: what does not fit is cut off, not wrapped."""
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=16),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn(
            "{task.fields[what]}",
            table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
        ),
        console=_console,
        expand=True,
    )
