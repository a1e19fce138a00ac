"""What computing a turn on this node takes; the same for all turns."""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import Executor
from dataclasses import dataclass

from segue_contract.chat import ChatTokenizer
from segue_contract.model.manifest import Manifest
from segue_contract.transport.stalls import StallMonitor
from segue_edge.compute import ComputeThread
from segue_edge.planner.estimators import EdgeSpeeds
from segue_edge.turns.compute.model_port import EdgeModelPort, PrefixCaches
from segue_edge.uplink.sender import Encode, KvSender


@dataclass(frozen=True)
class EdgeTools:
    """`recipe`: the digest of the recipe of this node's KV; `encode`: a block to frames in the
    codec of that recipe, run in `encoder`; `stalls`: the watch over `compute`."""

    model: EdgeModelPort
    manifest: Manifest
    recipe: str
    tokenizer: ChatTokenizer
    cache: PrefixCaches
    compute: ComputeThread
    encoder: Executor
    encode: Encode
    speeds: EdgeSpeeds
    stalls: StallMonitor

    def may_ship(self, accepted: Collection[str]) -> bool:
        """Whether KV goes to a cloud that accepts these recipes: our manifest must allow it."""
        return self.recipe in accepted and self.recipe in self.manifest.allowed_recipes()

    @property
    def end_tokens(self) -> frozenset[int]:
        return frozenset(self.manifest.end_tokens)

    def sender(self, ids: list[bytes]) -> KvSender:
        return KvSender(self.recipe, ids, self.encoder, self.encode)
