"""One module per suite, each with `run(report: Report, quick: bool) -> None`."""
