"""What loading the edge's graphs takes: a process of its own, for a peak cannot be reset.

    python -m tests.bench.suites._load_peak MODEL            as a node does
    python -m tests.bench.suites._load_peak FOLDER NAME ...  these graphs, one after the other

Prints bytes: the peak of the resident memory while loading, over what it was before.
"""

from __future__ import annotations

import sys
from pathlib import Path

from segue_edge.prefill.providers import CPU, Device
from segue_edge.prefill.runner import open_session
from segue_edge.prefill.runtime import EdgeModel


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    before = peak_bytes()
    loaded: list[object] = []
    if names:
        device = Device("cpu", (CPU,))
        loaded += [open_session(folder / f"{name}.onnx", device, 2) for name in names]
    else:
        loaded.append(EdgeModel.load(folder, threads=2, providers="cpu"))
    print(peak_bytes() - before)
    assert len(loaded) == max(1, len(names))


def peak_bytes() -> int:
    """VmHWM of this process."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("this system does not tell a process its peak memory")


if __name__ == "__main__":
    main()
