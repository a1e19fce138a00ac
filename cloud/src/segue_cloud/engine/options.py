"""What an operator may choose about the torch engine, and what follows from it."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from segue_cloud.engine.sequence import pages_for
from segue_contract.cpus import available_cpus
from segue_contract.errors import InvalidArgument, ModelError
from segue_contract.kv.layout import KvGeometry
from segue_contract.limits import (
    KV_PAGE_TOKENS,
    MAX_RANKS,
    MAX_TURNS_PER_CLOUD,
    MIB,
    POOL_MIN_TOKENS,
    EngineLimits,
)
from segue_contract.model.manifest import ModelGeometry

DTYPES = ("auto", "bf16", "fp32")
# The pool takes a quarter of the machine's memory and no more than this: 45,000 tokens of the
# default model, five full contexts. More is for operators who ask for it.
_POOL_SHARE = 0.25
_POOL_MAX_BYTES = 2048 * MIB
# What the pool gives up takes as many bytes again as twice the pool at most: some four times its
# tokens, and memory that is only taken as blocks come.
_HOST_SHARE = 0.25
_HOST_TO_POOL = 2


@dataclass(frozen=True)
class EngineOptions:
    """Choices of the engine. None: decide from the machine.

    `dtype`: "auto" (bfloat16 where the CPU multiplies it natively, else float32), "bf16", "fp32".
    `threads`: of the computing pool. `pool_bytes`: for KV pages. `device`: "cpu" or "cuda[:N]".
    `step_tokens` bounds one step, `mixed_tokens` the prompt tokens of a step that also decodes.
    `ahead`: plan the next step while one runs, in a second thread; see docs/decisions.md.
    `host_bytes`: for blocks that the pool had to give up, coded in 8 bits; 0: none are kept; None:
    a share of the machine's memory, see `choose_host_bytes`.
    `window`: a token sees that many tokens, itself among them, and the first `sinks`; 0: what the
    model says, usually all.
    `tensor_parallel`: processes that share the model, the threads and the pool's bytes; at most
    one per KV head.
    `graphs`: on a card, capture decode steps at start-up and replay them.
    `compiled`: use the fused CPU kernels; without them plain torch does the same, slower.
    `matrix_units`: on a CPU with AMX, large steps through oneDNN; faster, but a token's last bits
    may then depend on what else is in its step.
    `limits`: how long it waits, and what it spends on the host tier.
    """

    dtype: str = "auto"
    threads: int | None = None
    pool_bytes: int | None = None
    max_turns: int = MAX_TURNS_PER_CLOUD
    max_batch: int = 128
    step_tokens: int = 512
    mixed_tokens: int = 256
    device: str = "cpu"
    graphs: bool = True
    compiled: bool = True
    matrix_units: bool = True
    ahead: bool = False
    host_bytes: int | None = None
    window: int = 0
    sinks: int = 4
    tensor_parallel: int = 1
    limits: EngineLimits = EngineLimits()

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InvalidArgument(
                f"{self.dtype!r} is no dtype of the engine.",
                hint=f"Use one of {', '.join(DTYPES)}.",
            )
        for name in ("host_bytes", "window", "sinks"):
            if (getattr(self, name) or 0) < 0:
                raise InvalidArgument(f"{name} must not be negative.")
        if self.ahead and self.host_bytes:
            raise InvalidArgument(
                "host_bytes and ahead exclude each other.",
                hint="A block is brought back between two steps; one ahead there is no between.",
            )
        if self.tensor_parallel > MAX_RANKS:
            raise InvalidArgument(f"tensor_parallel must be at most {MAX_RANKS}.")
        for name in (
            "tensor_parallel",
            "threads",
            "pool_bytes",
            "max_turns",
            "max_batch",
            "step_tokens",
            "mixed_tokens",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidArgument(f"{name} must be at least 1, not {value}.")


def choose_window(options: EngineOptions, geometry: ModelGeometry) -> EngineOptions:
    """Options with the model's own window, which has no sinks, where the user asks for none."""
    if options.window or not geometry.sliding_window:
        return options
    return replace(options, window=geometry.sliding_window, sinks=0)


def choose_dtype(name: str, device: str) -> torch.dtype:
    """The dtype of weights and KV. bfloat16 without native instructions is slower than float32."""
    if name == "bf16":
        return torch.bfloat16
    if name == "fp32":
        return torch.float32
    if device != "cpu":
        return torch.bfloat16
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    return "bf16" if dtype == torch.bfloat16 else "fp32"


def choose_threads(threads: int | None) -> int:
    """The cores this process may use; more threads than that only wait for each other."""
    return threads or available_cpus()


def rank_threads(options: EngineOptions, rank: int) -> int:
    """Threads of one rank: its part of all, at least one; the last ranks get what is left over."""
    each, rest = divmod(choose_threads(options.threads), options.tensor_parallel)
    return max(1, each + (rank >= options.tensor_parallel - rest))


def choose_pages(options: EngineOptions, kv: KvGeometry, itemsize: int, context: int) -> int:
    """Pages of the KV pool.

    Raises:
        ModelError: the pool would not hold `POOL_MIN_TOKENS` tokens; says what is needed.
    """
    token_bytes = 2 * kv.layers * kv.kv_heads * kv.head_dim * itemsize
    available = available_memory_bytes()
    pool = options.pool_bytes or min(int(available * _POOL_SHARE), _POOL_MAX_BYTES)
    pages = pool // (token_bytes * KV_PAGE_TOKENS)
    needed = pages_for(min(context, POOL_MIN_TOKENS))
    if pages < needed:
        need_mib = needed * token_bytes * KV_PAGE_TOKENS // MIB + 1
        raise ModelError(
            f"A KV pool of {pool // MIB} MiB is too small; this model needs {need_mib} MiB.",
            hint=f"Give it more with --pool-mb {need_mib} (or SEGUE_CLOUD_POOL_MB).",
            needed_mib=need_mib,
        )
    if pool > available:
        raise ModelError(
            f"A KV pool of {pool // MIB} MiB does not fit the {available // MIB} MiB of free"
            " memory.",
            hint="Choose a smaller one with --pool-mb (or SEGUE_CLOUD_POOL_MB).",
            needed_mib=pool // MIB,
        )
    return pages


def choose_host_bytes(options: EngineOptions, pool_bytes: int) -> int:
    """Bytes for blocks that the pool had to give up.

    Raises:
        ModelError: that many were asked for and are not there.
    """
    available = available_memory_bytes() - (pool_bytes if options.device == "cpu" else 0)
    if options.host_bytes is None:
        if options.ahead:
            return 0
        return max(0, min(int(available * _HOST_SHARE), _HOST_TO_POOL * pool_bytes))
    if options.host_bytes > available:
        raise ModelError(
            f"{options.host_bytes // MIB} MiB for KV that the pool gives up do not fit the"
            f" {max(0, available) // MIB} MiB of memory that are free beside the pool.",
            hint="Choose less with --host-mb (or SEGUE_CLOUD_HOST_MB); 0 turns it off.",
            needed_mib=options.host_bytes // MIB,
        )
    return options.host_bytes


def available_memory_bytes() -> int:
    """Memory this process may still take: the machine's, or its cgroup's if that is less."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for line in _read(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    limit = _read(Path("/sys/fs/cgroup/memory.max")).strip()
    used = _read(Path("/sys/fs/cgroup/memory.current")).strip()
    if limit.isdigit() and used.isdigit():
        available = min(available, max(0, int(limit) - int(used)))
    return available


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
