"""The environment of a process that runs simulations."""

from __future__ import annotations

import os
import sys


def environment() -> dict[str, str]:
    """This one's, with this process's import path and a fixed hash of strings."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0"}
