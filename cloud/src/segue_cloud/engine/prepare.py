"""Compile the CPU kernels of a geometry ahead of the first start."""

from __future__ import annotations

from importlib.util import find_spec

from segue_cloud.engine.attention import CompiledOps
from segue_cloud.engine.kv_pages import KvPages
from segue_cloud.engine.options import choose_dtype
from segue_contract.model.manifest import ModelGeometry


def prepare_kernels(geometry: ModelGeometry, dtype: str = "auto") -> bool:
    """Fill the kernel cache for what an engine with this dtype will ask for on this machine.

    Takes some seconds the first time. False where numba is not installed: nothing to prepare.
    """
    if find_spec("numba") is None:
        return False
    pages = KvPages(geometry.kv, 1, choose_dtype(dtype, "cpu"), "cpu")
    CompiledOps(geometry, pages).load_kernels()
    return True
