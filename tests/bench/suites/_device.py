"""Which device a suite's engine computes on: SEGUE_BENCH_DEVICE, or the CPU."""

from __future__ import annotations

import os

from segue_cloud.engine.devices import choose_device


def bench_device() -> str:
    """ "cpu", "cuda" or "cuda:N"; raises InvalidArgument where there is no such card."""
    return choose_device(os.environ.get("SEGUE_BENCH_DEVICE", "cpu"))
