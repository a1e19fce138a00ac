"""Run as a script: becomes (or watches over) another program that must not outlive its parent.

    python -I -S _child.py PARENT_PID PROGRAM [ARGUMENT...]

On Linux the kernel is asked to end this process with its parent, then the program replaces it.
Elsewhere this process stays, starts the program and ends it when the parent is gone.
A separate program, because code between fork and exec is unsafe in a process with threads.
"""

from __future__ import annotations

import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_WATCH_S = 0.5


def main() -> None:
    parent, program = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before the kernel knew our wish
            sys.exit(1)
        os.execv(program[0], program)
    _watch(parent, program)


def _watch(parent: int, program: list[str]) -> None:
    import subprocess

    child = subprocess.Popen(program)
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    while os.getppid() == parent:
        try:
            sys.exit(child.wait(_WATCH_S))
        except subprocess.TimeoutExpired:
            continue
    child.terminate()
    sys.exit(child.wait())


if __name__ == "__main__":
    main()
