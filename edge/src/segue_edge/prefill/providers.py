"""Which device runs the graphs, and how many threads: found once, said in the log."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TypeAlias

import onnxruntime as ort

from segue_contract.cpus import available_cpus
from segue_contract.errors import InvalidArgument, ModelMismatch

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
DYNAMIC_INT8 = "w8a8"  # how the names of such graphs' quantisations begin
# a name, or a name with options
Provider: TypeAlias = str | tuple[str, dict[str, str]]


@dataclass(frozen=True)
class Device:
    """`name`: "cuda" or "cpu"; `providers`: ONNX Runtime's, in order of preference."""

    name: str
    providers: tuple[Provider, ...]


def choose_device(wanted: str = "auto", available: Collection[str] | None = None) -> Device:
    """`wanted`: "auto" (CUDA where this onnxruntime has it and it works), "cuda" or "cpu".

    `available`: providers to choose from; None: this onnxruntime's.

    Raises:
        InvalidArgument: another word, or CUDA is wanted and this onnxruntime lacks it.
    """
    if wanted not in ("auto", "cuda", "cpu"):
        raise InvalidArgument(f"{wanted!r} is no device.", hint="Choose auto, cuda or cpu.")
    available = ort.get_available_providers() if available is None else available
    if wanted == "cuda" and CUDA not in available:
        raise InvalidArgument(
            "CUDA was asked for, and this onnxruntime has no CUDA provider.",
            hint="Install segue[edge-gpu], or use --providers cpu.",
        )
    if wanted != "cpu" and CUDA in available:
        return Device("cuda", (CUDA, CPU))
    return Device("cpu", (CPU,))


def prefill_graph(active: Collection[str]) -> str:
    """Which graph prefills under the providers that a session really got: "prefill" or "decode".

    On CUDA it is the weight-only one: dynamic INT8 has no CUDA kernels worth having, every MatMul
    would go by the host.
    """
    return "decode" if CUDA in active else "prefill"


def forbid_dynamic_int8(active: Collection[str], weight_quant: str) -> None:
    """Refuse a graph that quantises activations as it runs on a card.

    `prefill_graph` never leads there; a graph that does all the same is a mistake, and would be
    slow without a word: each of its products goes by the host.

    Raises:
        ModelMismatch: such a graph under CUDA.
    """
    if CUDA in active and weight_quant.startswith(DYNAMIC_INT8):
        raise ModelMismatch(
            f"The graph {weight_quant!r} quantises as it runs, which a card cannot do well.",
            hint="Use --providers cpu, or build the model again.",
        )


def session_options(threads: int) -> ort.SessionOptions:
    """`threads` 0: as many as this process has cores to itself, a quota counted."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or available_cpus()
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    # Threads spin between the operators of a run, where it pays, and sleep between runs: an idle
    # node uses no CPU, and encoder and uplink get the cores as soon as a chunk is done.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options
