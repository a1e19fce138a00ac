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
    table = Table(title=title, title_justify="left", title_style="dim", box=None)
    table.add_column("recipe", no_wrap=True)
    for column in ("bytes/token", "agreement", "mean KL", "cross-entropy", "accuracy", "1st token"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column(f"loss ≤ {report['max_agreement_loss']:g}", no_wrap=True)
    for row in report["rows"]:
        used = row["recipe"] == report["edge"]
        mark = "[green]✓[/]" if row["within_budget"] else "[red]✗[/]"
        table.add_row(
            f"[bold]{row['recipe']}[/]" if used else row["recipe"],
            f"{row['bytes_per_token']:,.0f}",
            f"{row['agreement']:.4f}",
            f"{row['mean_kl']:.5f}",
            f"{row['cross_entropy_change']:+.4f}",
            _share(row["relative_accuracy"]),
            _share(row["first_token_agreement"]),
            f"{mark} used" if used else mark,
        )
    return table


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
