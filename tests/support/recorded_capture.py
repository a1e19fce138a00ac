"""A CUDA graph's stand-in on the CPU: a computation's tensor operations, recorded and repeated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from segue_cloud.engine.cuda.decode_graph import Results

# Operations that give the host a value: a capture on a card fails at them.
_WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique")


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[torch.Tensor]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        assert not any(word in func.name() for word in _WAITING), f"{func} waits for the device"
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, _tensors(result)))
        return result


class RecordedCapture:
    """Implements `Capture`. Repeats the recorded operations on the tensors they were recorded
    with; what they made then is replaced by what they make now."""

    bytes_held = 0

    def capture(self, compute: Callable[[], Results]) -> Callable[[], Results]:
        recorder = _Recorder()
        with recorder:
            results = compute()

        def replay() -> Results:
            now: dict[int, torch.Tensor] = {}

            def current(tensor: torch.Tensor) -> torch.Tensor:
                return now.get(id(tensor), tensor)

            for func, args, kwargs, made in recorder.calls:
                args, kwargs = tree_map_only(torch.Tensor, current, (args, kwargs))
                fresh = _tensors(func(*args, **kwargs))
                now |= {id(old): new for old, new in zip(made, fresh, strict=True)}
            return current(results[0]), current(results[1])

        return replay


def _tensors(result: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, torch.Tensor)]
