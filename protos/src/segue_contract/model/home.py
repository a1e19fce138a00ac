"""Where built models live. Imports nothing heavy: the SDK's tools look there, too."""

from __future__ import annotations

import os
from pathlib import Path

MANIFEST_NAME = "manifest.json"
DEFAULT_MODEL = "smollm2-135m"


def model_home() -> Path:
    """Where built models live: `SEGUE_MODEL_HOME`, else the user's cache folder."""
    chosen = os.environ.get("SEGUE_MODEL_HOME")
    if chosen:
        return Path(chosen).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "segue" / "models"
