"""What loading the edge's two graphs takes: a process of its own, for a peak cannot be reset.

    python -m tests.bench.suites._load_peak FOLDER

Prints bytes: the peak of the resident memory while loading, over what it was before.
"""

from __future__ import annotations

import sys
from pathlib import Path

from segue_edge.prefill.providers import CPU, Device
from segue_edge.prefill.runner import open_session


def main() -> None:
    folder = Path(sys.argv[1])
    before = peak_bytes()
    sessions = [
        open_session(folder / f"{name}.onnx", Device("cpu", (CPU,)), 2)
        for name in ("decode", "prefill")
    ]
    print(peak_bytes() - before)
    assert len(sessions) == 2


def peak_bytes() -> int:
    """VmHWM of this process."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("this system does not tell a process its peak memory")


if __name__ == "__main__":
    main()
