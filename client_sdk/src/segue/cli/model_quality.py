"""The quality report as a table that fits 80 columns."""

from __future__ import annotations

from typing import Any

from rich.table import Table


def quality_table(report: dict[str, Any]) -> Table:
    """A part per graph, a row per codec; `report` as `segue_edge.prefill.ladder` says it."""
    title = (
        "Next tokens on shipped KV, against the model's own prefill:\n"
        f"{report['windows']} windows of {report['context']} + {report['scored']} tokens"
    )
    table = Table(title=title, title_justify="left", title_style="dim", box=None, pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    for column in ("B/token", "agree", "KL", "entropy", "accuracy", "first"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column(f"≤ {report['max_agreement_loss']:g}", no_wrap=True)
    graph = None
    for row in report["rows"]:
        if row["graph"] != graph:
            graph = row["graph"]
            table.add_row(graph)
        used = row["recipe"] == report["edge"]
        mark = "[green]✓[/]" if row["within_budget"] else "[red]✗[/]"
        table.add_row(
            f"  [bold]{row['codec']}[/]" if used else f"  {row['codec']}",
            f"{row['bytes_per_token']:,.0f}",
            f"{row['agreement']:.4f}",
            f"{row['mean_kl']:.4f}",
            f"{row['cross_entropy_change']:+.4f}",
            _share(row["relative_accuracy"]),
            _share(row["first_token_agreement"]),
            f"{mark} used" if used else mark,
        )
    table.caption_justify = "left"
    table.caption = (
        "agree: the same next token; KL: mean, nats; entropy: change of the text's\n"
        "cross-entropy; accuracy: of the text's next token, relative; first: the\n"
        "edge's own first token agrees; sink4: a prompt's first 4 tokens in float16"
    )
    return table


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
