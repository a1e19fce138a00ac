"""KV blocks that come over a turn's stream: checked, decoded off the event loop, offered whole."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence

from segue_cloud.engine.domains import OPEN
from segue_cloud.engine.port import Engine
from segue_contract.kv.assembler import Assembler, EncodedBlock, decode_encoded
from segue_contract.kv.layout import KvBlock, KvGeometry


class KvIntake:
    """One per `Decode.Run` stream.

    Args:
        recipes: digests of the recipes that the model allows, each with its codec step.
        announced: ids of the blocks that may come; any other is refused.
        missing: those of them that the engine lacks; with the last one the intake is complete.
        domain: where the blocks go in the engine's cache; None: nowhere, the edge is not believed.
        shipped: told each of them, for spot checks.
        monotonic: for the receive time that the edge's bandwidth estimate uses.
    """

    def __init__(
        self,
        engine: Engine,
        geometry: KvGeometry,
        recipes: Mapping[str, str],
        announced: Sequence[bytes],
        missing: Sequence[bytes],
        *,
        domain: bytes | None = OPEN,
        shipped: Callable[[KvBlock], None] = lambda block: None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._domain = domain
        self._shipped = shipped
        self._assembler = Assembler(geometry, recipes, frozenset(announced))
        self._monotonic = monotonic
        self._missing = set(missing)
        self._first_s: float | None = None
        self.received_bytes = 0
        self.received_blocks = 0
        self.receive_s = 0.0
        self.complete = asyncio.Event()
        if not self._missing:
            self.complete.set()

    async def feed(self, data: bytes) -> None:
        """Take the next bytes of the stream; committed blocks go to the engine's prefix cache.

        Raises:
            KvError: the bytes are no KV that this model takes.
        """
        now = self._monotonic()
        if self._first_s is None:
            self._first_s = now
        self.receive_s = now - self._first_s
        self.received_bytes += len(data)
        encoded = self._assembler.feed_encoded(data)
        if encoded:
            await self._offer(encoded)
        if self._assembler.failure is not None:
            raise self._assembler.failure

    async def _offer(self, encoded: Sequence[EncodedBlock]) -> None:
        if self._domain is None:
            return
        blocks = await asyncio.to_thread(_decode_all, encoded)
        await self._engine.offer_blocks(blocks, self._domain)
        for block in blocks:
            self._shipped(block)
        self.received_blocks += len(blocks)
        self._missing.difference_update(block.id for block in blocks)
        if not self._missing:
            self.complete.set()

    def close(self) -> None:
        """The stream ended. Raises Truncated in mid-block."""
        self._assembler.close()


def _decode_all(encoded: Sequence[EncodedBlock]) -> list[KvBlock]:
    return [decode_encoded(block) for block in encoded]
