"""The process of one step: python -m tests.card.child STEP FILE [--quick]

Writes the rows to FILE as they come, so that what a step has found outlives it.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch

from tests.bench.harness import Report, Row, machine_facts


def card_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def main(name: str, file: Path, quick: bool) -> None:
    report = Report(name, machine_facts() | {"card": card_name()})

    def keep(row: Row) -> None:
        print(f"{row.name} {row.value:g} {row.unit}", flush=True)
        report.write(file)

    report.on_row = keep
    try:
        importlib.import_module(f"tests.card.{name}").run(report, quick)
    finally:
        report.write(file)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), "--quick" in sys.argv[3:])
