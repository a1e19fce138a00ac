"""Packages for a machine without a network: carried as wheels, used where they are missing.

`wheels.txt` names what the steps and the programs need and such a machine lacks; `present.txt` what
it has. Wheels are unpacked, not installed: that takes milliseconds and leaves the machine as it is.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from tests.bench.harness import ROOT

HERE = Path(__file__).parent
WHEELS = ROOT / ".card" / "wheels"
MAX_BYTES = 40_000_000
PYTHON = "3.12"
PLATFORMS = tuple(f"manylinux{glibc}_x86_64" for glibc in ("_2_28", "_2_27", "_2_17", "2014"))
# FlashInfer 0.6.1 is the newest whose wheel is small, and these two are what it imports of its
# requirements. Only the step that looks at it sees them.
FLASHINFER = ("flashinfer-python==0.6.1", "apache-tvm-ffi==0.1.15.post2")
FLASHINFER += ("nvidia-cudnn-frontend==1.32.0",)


@dataclass(frozen=True)
class Wheel:
    """`name` in its normal form: lower case, dashes."""

    path: Path
    name: str
    version: str

    @staticmethod
    def at(path: Path) -> Wheel:
        name, version = path.name.split("-")[:2]
        return Wheel(path, normal(name), version)


def normal(name: str) -> str:
    """A package's name as all spellings of it share it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def names_in(file: Path) -> list[str]:
    """One a line; `#` begins a comment."""
    lines = (line.partition("#")[0].strip() for line in file.read_text().splitlines())
    return [normal(line) for line in lines if line]


def pinned(names: Iterable[str]) -> list[str]:
    """`name==version` with the versions of constraints.txt.

    Raises:
        KeyError: a name has none there.
    """
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    versions = {normal(name): version for name, version in pairs}
    return [f"{name}=={versions[name]}" for name in names]


def wanted() -> list[str]:
    return [*pinned(names_in(HERE / "wheels.txt")), *FLASHINFER]


def wheels_in(folder: Path) -> list[Wheel]:
    return [Wheel.at(path) for path in sorted(folder.glob("*.whl"))]


def pack(folder: Path = WHEELS) -> int:
    """Fill `folder` with what is missing there; returns pip's exit code, or 1 above `MAX_BYTES`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder.parent / ".gitignore").write_text("*\n")
    want = dict(one.split("==") for one in wanted())
    for wheel in wheels_in(folder):
        if want.get(wheel.name, wheel.version) != wheel.version:
            wheel.path.unlink()  # two versions of one package would both be unpacked
    there = {wheel.name for wheel in wheels_in(folder)}
    missing = [f"{name}=={version}" for name, version in want.items() if name not in there]
    if missing:
        print(f"Packing {len(missing)} wheels for Python {PYTHON} on x86-64 Linux ...", flush=True)
        code = subprocess.run(_download(folder, missing), check=False).returncode
        if code:
            print("error: pip could not get them all; what it got stays, and a second run goes on")
            return code
    sizes = {wheel: wheel.path.stat().st_size for wheel in wheels_in(folder)}
    for wheel, size in sizes.items():
        print(f"  {wheel.name:<24} {wheel.version:<14} {size / 1e6:6.2f} MB")
    total = sum(sizes.values())
    print(f"  {len(sizes)} wheels {'':<29} {total / 1e6:6.2f} MB in {folder.relative_to(ROOT)}/")
    if total > MAX_BYTES:
        print(f"error: more than {MAX_BYTES / 1e6:.0f} MB. Take out what is not needed.")
        return 1
    print("Carry the repository with that folder; there: scripts/card --json FILE")
    return 0


def _download(folder: Path, requirements: list[str]) -> list[str]:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--only-binary=:all:", "--dest", str(folder)]
    command += ["--python-version", PYTHON, "--implementation", "cp"]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    return [*command, *requirements]


def floors() -> dict[str, str]:
    """The least version that pyproject.toml asks of each package, where it says one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        lines += extra
    found = (re.match(r"([A-Za-z0-9_.-]+)(?:\[[^]]*\])?[><=]=([0-9.]+)", line) for line in lines)
    return {normal(match[1]): match[2] for match in found if match}


def lacks(wheel: Wheel, floor: str | None) -> bool:
    """Whether this interpreter has no such package, or one older than `floor`."""
    try:
        version = metadata.version(wheel.name)
    except metadata.PackageNotFoundError:
        return True
    return floor is not None and _numbers(version) < _numbers(floor)


def _numbers(version: str) -> list[int]:
    found = re.match(r"[0-9]+(\.[0-9]+)*", version)
    return [int(part) for part in found[0].split(".")] if found else []


def unpack(wheels: Iterable[Wheel], into: Path) -> list[str]:
    """Put what this interpreter lacks into `into`; returns the names.

    What the machine has itself stays in use: its PyTorch was built beside it.
    """
    least = floors()
    added = []
    for wheel in wheels:
        if lacks(wheel, least.get(wheel.name)):
            with zipfile.ZipFile(wheel.path) as archive:
                archive.extractall(into)
            added.append(wheel.name)
    return added
