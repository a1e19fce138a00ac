"""One `Decode.Run` stream: a single writer with two lanes, and what comes back.

Control messages (tokens, hand-over, plan) never wait behind KV: the writer empties their lane
before it takes the next piece of KV.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Any

import grpc

from segue_contract.errors import SegueError, Unreachable
from segue_contract.limits import KV_PART_BYTES, MAX_NEW_TOKENS, TURN_HEARTBEAT_S, TURN_SILENCE_S
from segue_contract.transport.bearer import bearer
from segue_contract.transport.heartbeat import Listening
from segue_contract.transport.status import error_from_rpc
from segue_contract.transport.together import end
from segue_contract.v1 import agent_pb2 as pb
from segue_contract.v1 import decode_pb2 as dpb
from segue_edge.uplink.clouds import Cloud
from segue_edge.uplink.pacer import Pacer

_CONTROL_LANE = MAX_NEW_TOKENS + 16  # every token of the longest reply on its own


class TurnStream:
    """`async with TurnStream(...)`: opened on entry, cancelled on exit unless it ended.

    Attributes:
        sent_kv_bytes: KV bytes that passed flow control.
        busy_s: seconds in which KV was on its way, without the waits for the prefill.
        slept: as of `Listening`, once `replies` has ended.
    """

    def __init__(self, cloud: Cloud, spec: dpb.TurnSpec, pacer: Pacer, token: str = "") -> None:
        """`token`: of the device that asked for the turn."""
        self.cloud = cloud
        self.sent_kv_bytes = 0
        self.busy_s = 0.0
        self.slept = False
        self._pacer = pacer
        self._token = token
        self._control: deque[dpb.RunRequest] = deque([dpb.RunRequest(open=spec)])
        self._kv: asyncio.Queue[bytes] = asyncio.Queue(1)
        self._work = asyncio.Event()
        self._work.set()
        self._failure: SegueError | None = None
        self._finishing = False
        self._call: Any = None
        self._writer: asyncio.Task[None] | None = None

    async def __aenter__(self) -> TurnStream:
        self._call = self.cloud.decode.Run(metadata=bearer(self._token))
        self._writer = asyncio.create_task(self._write_all(), name="uplink writer")
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._writer is not None
        try:
            await end(self._writer)
        finally:
            self._call.cancel()

    def control(self, message: dpb.RunRequest) -> None:
        """Queue a small message; it overtakes KV that is not being written yet.

        Raises:
            Unreachable: the stream is broken.
        """
        if self._failure is not None:
            raise self._failure
        assert len(self._control) < _CONTROL_LANE
        self._control.append(message)
        self._work.set()

    def finish(self) -> None:
        """Nothing more is sent: what was queued still goes out."""
        self._finishing = True
        self._work.set()

    async def send_kv(self, data: bytes) -> None:
        """Send KV bytes in parts; returns when the last part passed flow control.

        Raises:
            Unreachable: the stream is broken.
        """
        view = memoryview(data)
        for start in range(0, len(view), KV_PART_BYTES):
            if self._failure is not None:
                raise self._failure
            await self._kv.put(bytes(view[start : start + KV_PART_BYTES]))
            self._work.set()
            if self._failure is not None:
                self._drain()
        await self._kv.join()
        if self._failure is not None:
            raise self._failure

    async def replies(
        self, prepare: Callable[[bool], Awaitable[object]] | None = None
    ) -> AsyncIterator[dpb.RunReply]:
        """What the cloud says, until it closes the stream. `prepare`: as of `Listening`.

        Raises:
            SegueError: the stream broke, or the cloud refused the turn.
        """
        try:
            # what is sent first may wait behind KV of other turns on its way up
            heard = Listening(
                self._call,
                silence_s=TURN_SILENCE_S,
                patient=lambda: self.cloud.carries_kv,
                others=not self.cloud.alone,
                prepare=prepare,
            )
            try:
                async for reply in heard:
                    yield reply
            finally:
                self.slept = heard.slept
                heard.cancel()
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # gRPC reports a locally cancelled call this way, too
            raise Unreachable("The stream to the cloud was cancelled.") from None

    async def _write_all(self) -> None:
        try:
            while True:
                if not self._work.is_set() and not await self._wait_for_work():
                    await self._call.write(dpb.RunRequest(heartbeat=pb.Heartbeat()))
                elif self._control:
                    await self._call.write(self._control.popleft())
                elif not self._kv.empty():
                    await self._write_kv(self._kv.get_nowait())
                elif self._finishing:
                    await self._call.done_writing()
                    self._failure = Unreachable("Nothing more is sent over this stream.")
                    return
                else:
                    self._work.clear()
        except asyncio.CancelledError:
            self._failure = Unreachable("The stream to the cloud is closed.")
            raise
        except Exception as error:  # `replies` raises the reason; a write says only that it failed
            self._failure = Unreachable(f"The stream to the cloud broke ({type(error).__name__}).")
        finally:
            self._drain()

    async def _wait_for_work(self) -> bool:
        """False where there was none for `TURN_HEARTBEAT_S`."""
        try:
            async with asyncio.timeout(TURN_HEARTBEAT_S):
                await self._work.wait()
        except TimeoutError:
            return False
        return True

    async def _write_kv(self, data: bytes) -> None:
        started = time.monotonic()
        try:
            await self._pacer.pass_through(len(data))
            await self._call.write(dpb.RunRequest(kv=dpb.KvPart(data=data)))
            self.sent_kv_bytes += len(data)
        finally:
            self.busy_s += time.monotonic() - started
            self._kv.task_done()

    def _drain(self) -> None:
        """Nobody may wait for a writer that is gone."""
        while not self._kv.empty():
            self._kv.get_nowait()
            self._kv.task_done()
