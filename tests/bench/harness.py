"""What every benchmark suite shares: rows, the machine's facts, a median, the table and the JSON.

A suite is a module of `tests.bench.suites` with `run(report, quick)`. It calls `report.row` for
each figure. `quick` asks for the smallest form that still runs every line of the suite.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import pkgutil
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

ROOT = Path(__file__).resolve().parents[2]
Better = Literal["higher", "lower"]

_FLAGS = (
    "f16c", "avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_int8", "amx_bf16", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
_PACKAGES = ("numpy", "torch", "onnxruntime", "onnxruntime-gpu", "grpcio", "protobuf", "redis")


@dataclass(frozen=True)
class Row:
    """One figure. `target`, if any, is to be reached or passed in the direction `better`."""

    name: str
    value: float
    unit: str
    target: float | None = None
    better: Better = "higher"
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None where there is none."""
        if self.target is None:
            return None
        return self.value >= self.target if self.better == "higher" else self.value <= self.target

    def as_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"name": self.name, "value": self.value, "unit": self.unit}
        if self.target is not None:
            found |= {"target": self.target, "better": self.better, "met": self.met}
        if self.note:
            found["note"] = self.note
        return found


@dataclass
class Report:
    """The rows of one run. `on_row` is told each as it comes, so that a long run shows life."""

    suite: str
    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    on_row: Callable[[Row], None] = lambda row: None
    left_out: list[dict[str, str]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)  # what is no single figure, for the JSON

    def missing(self, rows: str, reason: str) -> None:
        """Say that `rows` were not measured here, and why or what to do about it."""
        self.left_out.append({"rows": rows, "reason": reason})

    def row(
        self,
        name: str,
        value: float,
        unit: str,
        target: float | None = None,
        better: Better = "higher",
        note: str = "",
    ) -> None:
        """Add a figure; `note` says in a few words what it means.

        Raises:
            ValueError: not finite, or a name used before: the suite is wrong.
        """
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}: a benchmark row must be a number")
        if any(one.name == name for one in self.rows):
            raise ValueError(f"two rows are called {name}")
        self.rows.append(Row(name, float(value), unit, target, better, note))
        self.on_row(self.rows[-1])

    def as_json(self) -> dict[str, Any]:
        rows = [row.as_json() for row in self.rows]
        found = {"suite": self.suite, "machine": self.machine, "rows": rows}
        more = {"left_out": self.left_out, "details": self.details}
        return found | {name: value for name, value in more.items() if value}

    def write(self, path: Path) -> None:
        """Write the JSON in one step: readers see the old file or the whole new one."""
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(self.as_json(), indent=2, allow_nan=False) + "\n")
        temporary.replace(path)


def median_of(fn: Callable[[], object], repeats: int, warmup: int = 1) -> float:
    """Median seconds of one call of `fn`, after `warmup` calls that do not count."""
    for _ in range(warmup):
        fn()
    seconds = []
    for _ in range(max(1, repeats)):
        began = time.perf_counter()
        fn()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def suite_names() -> list[str]:
    """The suites that exist, by looking."""
    found = pkgutil.iter_modules([str(ROOT / "tests" / "bench" / "suites")])
    return sorted(module.name for module in found if not module.name.startswith("_"))


def load_suite(name: str) -> Callable[[Report, bool], None]:
    """The `run` of the suite `name`."""
    run: Callable[[Report, bool], None] = importlib.import_module(f"tests.bench.suites.{name}").run
    return run


def machine_facts() -> dict[str, Any]:
    """What one must know of the machine to read its figures. Memory in GiB."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    model, flags = _cpu()
    facts: dict[str, Any] = {
        "cpu": model,
        "cores": cores,
        "flags": flags,
        "memory_gib": round(_memory_bytes() / 2**30, 1),
        "gpus": _gpus(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_at_start": round(load, 2),
        "commit": _commit(),
    }
    return facts | {name: version for name in _PACKAGES if (version := _version(name))}


def _cpu() -> tuple[str, list[str]]:
    """The processor's name and those of its instruction sets that decide our speeds."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), []
    pairs = (line.partition(":") for line in text.splitlines())
    entries = {name.strip(): value.strip() for name, _, value in pairs}
    have = (entries.get("flags") or entries.get("Features") or "").split()
    return entries.get("model name", platform.machine()), [one for one in _FLAGS if one in have]


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0


def _gpus() -> list[str]:
    """Names of NVIDIA cards as the driver lists them; without loading any library."""
    names = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        lines = path.read_text().splitlines()
        names += [line.split(":", 1)[1].strip() for line in lines if line.startswith("Model:")]
    return names


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    """The short commit id, with `+` where the tree differs from it; empty outside git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip()


def show(report: Report, console: Console) -> None:
    """The table, what was left out, and the machine."""
    console.print()
    console.print(row_table(report.rows))
    console.print()
    for one in report.left_out:
        console.print(Text(f"Not measured: {one['rows']}: {one['reason']}.", style="yellow"))
    console.print(Text(machine_line(report.machine), style="dim"))
    cores, load = report.machine["cores"] or 1, report.machine["load_at_start"]
    if load > 0.5 * cores:
        console.print(
            f"Load average at start was {load} on {cores} cores: others were working here, so "
            "trust ratios between rows of this run more than absolute values.",
            style="yellow",
        )


def row_table(rows: Sequence[Row]) -> Table:
    """A name, a value, its unit, the target where there is one, what it means."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    targets = any(row.target is not None for row in rows)
    table.add_column("row", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("unit", style="dim", no_wrap=True)
    if targets:
        table.add_column("target", justify="right", no_wrap=True)
    table.add_column("", style="dim", overflow="fold")
    for row in rows:
        goal = [_target(row)] if targets else []
        table.add_row(row.name, number(row.value), row.unit, *goal, row.note)
    return table


def machine_line(machine: dict[str, Any]) -> str:
    parts = [
        f"{machine['cpu']}, {machine['cores']} cores",
        *machine["gpus"],
        f"{machine['memory_gib']} GiB",
        f"Python {machine['python']}",
        *(f"{name} {machine[name]}" for name in _PACKAGES[:4] if name in machine),
    ]
    return " · ".join(parts)


def _target(row: Row) -> Text:
    if row.target is None:
        return Text("")
    sign = "≥" if row.better == "higher" else "≤"
    mark, style = ("✓", "green") if row.met else ("✗", "red")
    return Text(f"{sign} {number(row.target)} {mark}", style=style)


def number(value: float) -> str:
    """Four digits that matter, thousands separated, no exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 3 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{min(digits, 6)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def main(suite: str, json_path: Path | None, quick: bool) -> int:
    """Run one suite, show its table, write its JSON; the rows so far even if it breaks off."""
    errors = Console(stderr=True)
    report = Report(suite, machine_facts())
    run = load_suite(suite)
    began = time.monotonic()
    with errors.status(f"{suite}: measuring") as status:
        report.on_row = lambda row: status.update(f"{suite}: {row.name} {number(row.value)}")
        try:
            run(report, quick)
            code = 0
        except KeyboardInterrupt:
            errors.print(f"Stopped after {len(report.rows)} rows.")
            code = 130
        except Exception:
            errors.print_exception(show_locals=False)
            code = 1
    show(report, Console(width=None if sys.stdout.isatty() else 120))
    if json_path is not None:
        report.write(json_path)
        errors.print(f"Wrote {json_path}", style="dim")
    errors.print(f"{suite}: {time.monotonic() - began:.1f} s", style="dim")
    return code
