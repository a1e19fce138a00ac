"""Built models from the command line, one JSON line per answer.

    python -m segue_contract.model seal --artifact DIR --work DIR --name NAME
    python -m segue_contract.model verify DIR
    python -m segue_contract.model list

`segue model` starts this as a process of its own: the SDK does without numpy.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from segue_contract.errors import ModelError
from segue_contract.model.home import MANIFEST_NAME, model_home
from segue_contract.model.manifest import Manifest, read_manifest, verify
from segue_contract.model.progress import run_step, tell
from segue_contract.model.seal import seal


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m segue_contract.model", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    sealing = commands.add_parser("seal")
    sealing.add_argument("--artifact", type=Path, required=True)
    sealing.add_argument("--work", type=Path, required=True)
    sealing.add_argument("--name", required=True)
    commands.add_parser("verify").add_argument("directory", type=Path)
    commands.add_parser("list")
    args = parser.parse_args()
    if args.command == "seal":
        return run_step(lambda: _seal(args.artifact, args.work, args.name))
    if args.command == "verify":
        return run_step(lambda: _verify(args.directory))
    return run_step(_list)


def _seal(artifact: Path, work: Path, name: str) -> None:
    total = sum(path.stat().st_size for path in artifact.rglob("*") if path.is_file())
    seal(artifact, work, name, _meter(total))


def _verify(directory: Path) -> None:
    total = sum(entry.bytes for entry in read_manifest(directory).files.values())
    manifest = verify(directory, _meter(total))
    _say(_facts(directory, manifest))


def _list() -> None:
    home = model_home()
    for directory in sorted(home.iterdir()) if home.is_dir() else []:
        if not (directory / MANIFEST_NAME).is_file() or directory.name.startswith("."):
            continue
        try:
            _say(_facts(directory, read_manifest(directory)))
        except ModelError as error:
            _say({"event": "model", "name": directory.name, "broken": str(error)})


def _meter(total: int) -> Callable[[int], None]:
    """Progress by bytes hashed, told in steps of a hundredth."""
    state = {"done": 0, "told": -1}

    def progress(size: int) -> None:
        state["done"] += size
        hundredth = 100 * state["done"] // max(total, 1)
        if hundredth != state["told"]:
            state["told"] = hundredth
            tell(hundredth / 100, "Hashing every file")

    return progress


def _facts(directory: Path, manifest: Manifest) -> dict[str, object]:
    quality = manifest.recipes["edge"].quality
    return {
        "event": "model",
        "name": manifest.name,
        "directory": str(directory),
        "source": manifest.source,
        "licence": manifest.licence,
        "layers": manifest.geometry.layers,
        "context": manifest.geometry.context,
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
        "files": len(manifest.files),
        "edge_quant": manifest.edge_quant,
        "edge_agreement": quality.agreement if quality else None,
    }


def _say(value: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
