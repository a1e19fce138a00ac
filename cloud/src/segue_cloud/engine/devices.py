"""What of the engine differs with the device: which one, which runner, pages and tier."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch

from segue_cloud.engine.host_tier import HostTier
from segue_cloud.engine.kv_pages import BlockPages
from segue_cloud.engine.options import EngineOptions, choose_dtype, choose_pages
from segue_cloud.engine.runner import Runner, StepRunner
from segue_contract.errors import InvalidArgument
from segue_contract.limits import EngineLimits
from segue_contract.model.manifest import ModelGeometry


def choose_device(wanted: str) -> str:
    """`wanted`: "auto" (a CUDA card where torch can use one), "cpu", "cuda" or "cuda:N".

    Raises:
        InvalidArgument: a card is wanted and torch sees none by that number.
    """
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cpu":
        return "cpu"
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    number = wanted.removeprefix("cuda").removeprefix(":")
    if int(number or 0) >= cards:
        raise InvalidArgument(
            f"There is no device {wanted!r} here; PyTorch sees {cards} CUDA cards.",
            hint="Use --device cpu, or install a CUDA build of PyTorch and a driver.",
        )
    return wanted


def count_pages(options: EngineOptions, geometry: ModelGeometry) -> int:
    """Pages of the KV pool on the device of `options`; raises ModelError where it cannot be."""
    itemsize = choose_dtype(options.dtype, options.device).itemsize
    if options.device == "cpu":
        return choose_pages(options, geometry.kv, itemsize, geometry.context)
    from segue_cloud.engine.cuda.memory import card_pages

    free, _ = torch.cuda.mem_get_info(torch.device(options.device))
    return card_pages(options, geometry, itemsize, free)


def build_runner(
    directory: Path, geometry: ModelGeometry, pages: int, options: EngineOptions
) -> StepRunner:
    """The runner that serves this model best on that device; raises as `Runner` does."""
    if options.device != "cpu":
        from segue_cloud.engine.cuda.runner import DeviceRunner

        return DeviceRunner(directory, geometry, pages, options)
    narrow = choose_dtype(options.dtype, options.device) == torch.bfloat16
    if narrow and options.compiled and find_spec("numba") is not None:
        from segue_cloud.engine.native.runner import NativeRunner, serves

        if serves(geometry):
            return NativeRunner(directory, geometry, pages, options)
    return Runner(directory, geometry, pages, options)


def build_tier(
    pages: BlockPages,
    budget_bytes: int,
    recompute_s: Callable[[], float],
    limits: EngineLimits = EngineLimits(),
) -> HostTier:
    """The second tier for where the pages lie."""
    from segue_cloud.engine.cuda.host_tier import PinnedTier
    from segue_cloud.engine.cuda.pages import DevicePages

    if isinstance(pages, DevicePages):
        return PinnedTier(pages, budget_bytes, recompute_s, limits)
    return HostTier(pages, budget_bytes, recompute_s, limits)
