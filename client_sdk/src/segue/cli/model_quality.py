"""The quality report as a table."""

from __future__ import annotations

from typing import Any

from rich.table import Table


def quality_table(report: dict[str, Any]) -> Table:
    """One row per recipe; `report` as `segue_edge.prefill.ladder` says it."""
    title = (
        f"Next tokens on shipped KV, against the model's own prefill: {report['windows']} windows "
        f"of {report['context']} + {report['scored']} tokens"
    )
    table = Table(title=title, title_justify="left", title_style="dim", box=None, pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    for column in ("B/token", "agree", "KL", "entropy", "accuracy", "first"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column(f"≤ {report['max_agreement_loss']:g}", no_wrap=True)
    for row in report["rows"]:
        used = row["recipe"] == report["edge"]
        mark = "[green]✓[/]" if row["within_budget"] else "[red]✗[/]"
        table.add_row(
            f"[bold]{row['recipe']}[/]" if used else row["recipe"],
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
        "agree: the same next token; KL: mean, nats; entropy: change of the text's cross-entropy;\n"
        "accuracy: of the text's next token, relative; first: the edge's own first token agrees"
    )
    return table


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
