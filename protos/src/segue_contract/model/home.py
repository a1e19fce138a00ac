"""Where built models live. Imports nothing heavy: the SDK's tools look there, too."""

from __future__ import annotations

import json
import os
from pathlib import Path

MANIFEST_NAME = "manifest.json"
FORMAT = 2  # 2: the edge's embedding in 8 bits
DEFAULT_MODEL = "smollm2-135m"


def model_home() -> Path:
    """Where built models live: `SEGUE_MODEL_HOME`, else the user's cache folder."""
    chosen = os.environ.get("SEGUE_MODEL_HOME")
    if chosen:
        return Path(chosen).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "segue" / "models"


def model_directory(name: str) -> Path:
    """Directory of a model given by name or by path; empty: the default model.

    Anything with a path separator is a path, everything else a name in `model_home`. It need not
    exist: `read_manifest` says so where it does not.
    """
    chosen = name or DEFAULT_MODEL
    if os.sep in chosen or chosen.startswith((".", "~")):
        return Path(chosen).expanduser()
    return model_home() / chosen


def is_built(directory: Path) -> bool:
    """Whether a finished model of this version's format lies there; a build writes the manifest
    last. One of another format counts as not built, so that it is built again."""
    try:
        manifest = json.loads((directory / MANIFEST_NAME).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT
