"""What every rank computes a step with: the engine's own runner over one shard of the model."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from segue_cloud.engine.options import EngineOptions
from segue_cloud.engine.runner import Runner
from segue_cloud.engine.tensor_parallel.group import Group
from segue_cloud.engine.tensor_parallel.split import Shard
from segue_cloud.engine.weights import Linear, Weights, load_weights
from segue_contract.model.manifest import ModelGeometry


def shard_runner(
    directory: Path,
    geometry: ModelGeometry,
    pages: int,
    options: EngineOptions,
    shard: Shard,
    group: Group,
) -> Runner:
    """A runner whose products are summed over the group.

    Raises:
        ModelMissing, ModelMismatch: see `load_weights`.
    """
    options = replace(options, device=rank_device(options.device, shard.rank))
    load = partial(_load_shard, whole=geometry, shard=shard, group=group)
    return Runner(directory, shard.geometry(geometry), pages, options, load=load)


def rank_device(device: str, rank: int) -> str:
    """The CPU is everybody's; of the cards each rank has its own, by number."""
    return device if device == "cpu" else f"{device.partition(':')[0]}:{rank}"


def _load_shard(
    directory: Path,
    _geometry: ModelGeometry,
    dtype: torch.dtype,
    device: str,
    *,
    whole: ModelGeometry,
    shard: Shard,
    group: Group,
) -> Weights:
    weights = load_weights(directory, whole, dtype, device, shard)
    layers = tuple(
        replace(layer, out=_summed(layer.out, group), down=_summed(layer.down, group))
        for layer in weights.layers
    )
    return replace(weights, layers=layers)


def _summed(linear: Linear, group: Group) -> Linear:
    return lambda x: group.sum(linear(x))
