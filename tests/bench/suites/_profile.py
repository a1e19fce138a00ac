"""Where a card's time goes: the kernels that took most of it, for the JSON."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

TOP = 15


@contextmanager
def profiled(device: str) -> Iterator[dict[str, Any]]:
    """What runs inside, of all threads: fills the dictionary at the end.

    `kernels`: the 15 that took longest, each with `ms`, `calls` and its `share` of all kernels'
    time. `busy_share`: all kernels' time over the wall's; the rest the card waited for the host.
    On a CPU the operators stand in for kernels, and with several threads the share may pass 1.
    """
    on_card = device != "cpu"
    activities = [ProfilerActivity.CUDA] if on_card else [ProfilerActivity.CPU]
    every = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    found: dict[str, Any] = {}
    with profile(activities=activities, experimental_config=every) as recorded:
        began = time.perf_counter()
        yield found
        if on_card:
            torch.cuda.synchronize(device)
        wall_us = (time.perf_counter() - began) * 1e6
    kind = DeviceType.CUDA if on_card else DeviceType.CPU
    times = [
        (event.self_device_time_total if on_card else event.self_cpu_time_total, event)
        for event in recorded.key_averages()
        if event.device_type == kind
    ]
    total = sum(us for us, _ in times) or 1.0
    longest = sorted(times, key=lambda one: -one[0])[:TOP]
    found["wall_ms"] = round(wall_us / 1e3, 3)
    found["busy_share"] = round(total / wall_us, 4)
    found["kernels"] = [
        {
            "name": event.key[:160],
            "ms": round(us / 1e3, 4),
            "calls": event.count,
            "share": round(us / total, 4),
        }
        for us, event in longest
    ]
