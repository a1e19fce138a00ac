"""KV blocks on their way up: raw blocks in, encoded off the event loop, streamed in order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

from numpy.typing import NDArray

from segue_contract.kv.frame import encode_frames
from segue_contract.kv.layout import KvBlock
from segue_contract.kv.steps import codec_named
from segue_contract.limits import UPLINK_QUEUE_BLOCKS
from segue_contract.transport.together import end
from segue_edge.uplink.stream import TurnStream

Array = NDArray[Any]
Encode = Callable[[int, KvBlock], bytes]


def encode_with(codec: str) -> Encode:
    """Frames of the prompt's block number `index` as a recipe's `codec` asks for.

    Raises:
        BadVersion: no such codec.
    """
    chosen = codec_named(codec)

    def encode(index: int, block: KvBlock) -> bytes:
        return encode_frames(block, chosen.step.name, sink_tokens=chosen.sinks_of(index))

    return encode


class KvSender:
    """Ships the prompt's blocks `[have, total)` of one turn.

    Blocks are offered in order as they come to exist (first the cached ones, then one by one as
    the prefill finishes them). At most `UPLINK_QUEUE_BLOCKS` of them are encoded and not yet sent,
    so a slow link holds back the encoder and never the prefill.

    Attributes:
        sent_blocks, sent_bytes: what has passed flow control.
    """

    def __init__(
        self,
        recipe: str,
        ids: list[bytes],
        encoder: Executor,
        encode: Encode,
    ) -> None:
        self.sent_blocks = 0
        self.sent_bytes = 0
        self._recipe = recipe
        self._ids = ids
        self._encoder = encoder
        self._encode = encode
        # bounded by the prompt: every block is offered once
        self._raw: asyncio.Queue[tuple[int, Array, Array]] = asyncio.Queue(len(ids))

    def offer(self, index: int, k: Array, v: Array) -> None:
        """Block `index` exists: `[layers, kv_heads, 64, head_dim]` each."""
        self._raw.put_nowait((index, k, v))

    async def run(self, stream: TurnStream, have: int) -> None:
        """Return when every block from `have` on was sent.

        Raises:
            Unreachable: the stream broke.
            BadBlock: a block cannot be encoded (NaN, infinity).
        """
        encoded: asyncio.Queue[bytes | None] = asyncio.Queue(UPLINK_QUEUE_BLOCKS)
        encoding = asyncio.create_task(self._encode_all(have, encoded), name="encode KV")
        try:
            while (data := await encoded.get()) is not None:
                await stream.send_kv(data)
                self.sent_blocks += 1
                self.sent_bytes += len(data)
            await encoding
        finally:
            await end(encoding)

    async def _encode_all(self, have: int, encoded: asyncio.Queue[bytes | None]) -> None:
        loop = asyncio.get_running_loop()
        try:
            for _ in self._ids:
                index, k, v = await self._raw.get()
                if index < have:
                    continue
                block = KvBlock(self._ids[index], self._recipe, k, v)
                data = await loop.run_in_executor(self._encoder, self._encode, index, block)
                await encoded.put(data)
        except Exception:
            while encoded.full():  # room for the end: these blocks will not be sent any more
                encoded.get_nowait()
            encoded.put_nowait(None)  # `run` wakes up, and raises the exception of this task
            raise
        await encoded.put(None)
