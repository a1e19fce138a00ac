"""The first rank: the engine's step runner, which takes the other ranks along."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from segue_cloud.engine.kv_pages import BlockPages
from segue_cloud.engine.options import EngineOptions
from segue_cloud.engine.runner import Prepared
from segue_cloud.engine.sampler import sample_rows
from segue_cloud.engine.scheduler import Step
from segue_cloud.engine.step_input import StepInput
from segue_cloud.engine.tensor_parallel.messages import (
    Array,
    BlockRead,
    Control,
    Loaded,
    Message,
    ReadBlock,
    SetUp,
    WarmUp,
    WriteBlock,
    encode,
)
from segue_cloud.engine.tensor_parallel.ranks import Ranks
from segue_cloud.engine.tensor_parallel.shard_runner import shard_runner
from segue_cloud.engine.tensor_parallel.split import Shard
from segue_cloud.engine.tensor_parallel.steps import pack_step
from segue_contract.errors import RankLost
from segue_contract.kv.layout import KvBlock, KvGeometry
from segue_contract.limits import RANK_LOAD_TIMEOUT_S, RANK_STEP_TIMEOUT_S
from segue_contract.model.manifest import ModelGeometry


class LeadRunner:
    """Implements `runner.StepRunner` over all ranks.

    Whatever goes wrong between the first word of a step and its logits is RankLost: the ranks may
    stand at different places then, and no later step could be trusted.

    Args:
        ranks: the other ranks, connected and waiting; whoever made them stops them.

    Raises (from the constructor):
        ModelMissing, ModelMismatch: see `load_weights`.
        RankLost: a rank ended or did not load in time.
    """

    def __init__(
        self,
        directory: Path,
        geometry: ModelGeometry,
        pages: int,
        options: EngineOptions,
        *,
        shards: Sequence[Shard],
        ranks: Ranks,
    ) -> None:
        self._controls = ranks.controls
        self._group = ranks.group
        self._folder = ranks.folder
        self._widths = [shard.vocab.size for shard in shards]
        self._tell(SetUp(str(directory), geometry, pages, options))
        self._own = shard_runner(directory, geometry, pages, options, shards[0], self._group)
        self.pages: BlockPages = _AllPages(geometry.kv, self._own.pages, shards, ranks.controls)

    def warm_up(self, threads: int) -> None:
        self._own.load_kernels(threads)
        for control in self._controls:
            message = control.receive(RANK_LOAD_TIMEOUT_S)
            if not isinstance(message, Loaded):
                raise RankLost(f"Rank {control.rank} said {message!r} instead of being loaded.")
        self._group.connect(self._folder)
        self._tell(WarmUp())
        self._own.touch()

    def prepare(self, step: Step) -> Prepared:
        return self._own.prepare(step)

    def run(self, prepared: Prepared) -> list[int]:
        logits = self._compute(prepared)
        if not prepared.samplings:
            return []
        return sample_rows(logits.cpu().numpy(), prepared.samplings, prepared.indexes)

    def _compute(self, prepared: Prepared) -> torch.Tensor:
        assert isinstance(prepared.input, StepInput)
        try:
            self._tell(pack_step(prepared.input))
            logits = self._own.compute(prepared.input)
            if len(logits):
                with torch.inference_mode():
                    logits = self._group.collect_logits(logits, self._widths)
            return logits
        except RankLost:
            raise
        except Exception as error:
            raise RankLost(f"Rank 0 failed in a step: {error}.") from error

    def write_block(self, pages: Sequence[int], block: KvBlock) -> None:
        self.pages.write_block(pages, block)

    def close(self) -> None:
        """Nothing here: whoever started the ranks stops them."""

    def _tell(self, message: Message) -> None:
        data = encode(message)
        for control in self._controls:
            control.send(data)


class _AllPages:
    """Implements `kv_pages.BlockPages` over the pages of all ranks."""

    def __init__(
        self,
        geometry: KvGeometry,
        own: BlockPages,
        shards: Sequence[Shard],
        controls: Sequence[Control],
    ) -> None:
        self.geometry = geometry
        self._own = own
        self._cuts = [shard.kv_heads.cut for shard in shards]
        self._controls = controls

    def write_block(self, pages: Sequence[int], block: KvBlock) -> None:
        for control, cut in zip(self._controls, self._cuts[1:], strict=True):
            k, v = Array.of(block.k[:, cut]), Array.of(block.v[:, cut])
            control.send(WriteBlock(tuple(pages), k, v))
        own = self._cuts[0]
        part = KvBlock(block.id, block.recipe, block.k[:, own].copy(), block.v[:, own].copy())
        self._own.write_block(pages, part)

    def read_block(self, pages: Sequence[int]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        for control in self._controls:
            control.send(ReadBlock(tuple(pages)))
        parts = [self._own.read_block(pages)]
        for control in self._controls:
            message = control.receive(RANK_STEP_TIMEOUT_S)
            if not isinstance(message, BlockRead):
                raise RankLost(f"Rank {control.rank} said {message!r} instead of a block.")
            parts.append((message.k.numpy(), message.v.numpy()))
        k, v = (np.concatenate([part[side] for part in parts], axis=1) for side in (0, 1))
        return k, v
