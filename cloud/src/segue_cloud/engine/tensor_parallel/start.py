"""From options to running ranks, and to the runner that the engine thread drives them with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from segue_cloud.engine.options import EngineOptions
from segue_cloud.engine.tensor_parallel.lead import LeadRunner
from segue_cloud.engine.tensor_parallel.ranks import Ranks
from segue_cloud.engine.tensor_parallel.split import split
from segue_contract.model.manifest import ModelGeometry


async def start_ranks(
    directory: Path, geometry: ModelGeometry, pages: int, options: EngineOptions
) -> tuple[Ranks, Callable[[], LeadRunner]]:
    """The processes of the other ranks, connected; and what builds the first one, in its thread.

    Whether there are devices enough is the caller's to check (`group.check_devices`).

    Raises:
        InvalidArgument: the model has too few KV heads.
        Internal, DeadlineExceeded: a process did not start.
    """
    shards = split(geometry, options.tensor_parallel)
    ranks = await Ranks.start(len(shards), options.device)
    build = partial(LeadRunner, directory, geometry, pages, options, shards=shards, ranks=ranks)
    return ranks, build
