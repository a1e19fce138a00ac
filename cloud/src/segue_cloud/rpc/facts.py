"""What the cloud tells planners about itself, from its own counts and measurements."""

from __future__ import annotations

from collections.abc import Callable

from segue_cloud.engine.port import Engine
from segue_cloud.turns.manager import TurnManager
from segue_contract.identity.principal import Kind
from segue_contract.model.manifest import Manifest
from segue_contract.transport.gate import caller
from segue_contract.v1 import decode_pb2 as dpb


class FactsSource:
    def __init__(
        self,
        engine: Engine,
        manager: TurnManager,
        manifest: Manifest,
        instance: str,
        *,
        authenticates: bool = False,
        refuses: Callable[[str], bool] = lambda edge: False,
    ) -> None:
        """`refuses`: whether an edge, by its certificate's name, is to ship no KV."""
        self._refuses = refuses
        self._authenticates = authenticates
        self._engine = engine
        self._manager = manager
        self._instance = instance
        self._weights = manifest.weights_digest
        self._recipes = sorted(manifest.allowed_recipes())

    def facts(self) -> dpb.CloudFacts:
        """For whoever calls: an edge that may ship nothing is told of no recipe."""
        stats = self._engine.stats()
        return dpb.CloudFacts(
            instance=self._instance,
            queue_s=stats.queue_s,
            prefill_tokens_per_s=stats.prefill_tokens_per_s,
            decode_step_s=stats.decode_step_s,
            running_turns=stats.running,
            free_pages=stats.pages_free,
            recipes=[] if self._refuses(edge_calling()) else self._recipes,
            weights_digest=self._weights,
            stalled=stats.stalled,
            held_turns=self._manager.places.held,
            places=self._manager.places.most,
            total_pages=stats.pages_total,
            authenticates=self._authenticates,
            leaving=self._manager.leaving.is_set(),
        )


def edge_calling() -> str:
    """The edge at the other end, by its certificate's name; "" for none."""
    who = caller()
    return who.via or (who.name if who.kind is Kind.EDGE else "")
