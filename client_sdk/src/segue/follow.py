"""Following a session: a snapshot, then every later log entry, once and in order.

Live entries come over MQTT; while the broker is away, or does not bring what the log has, the gRPC
`Attach` stream brings them, for as long as the session is in use (`segue._ways`). The two overlap
at every switch (the new one is asked first, the old one dropped after a Read), and the log view
drops what came twice. The log is the truth: a gap, a head that is further on, a tail that MQTT did
not reach in time, an overflow or a reconnect is healed by `Read`, and so is what contradicts the
log: its digest shows it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc

from segue._failures import being_cancelled, is_link_loss, pauses, ran_out, typed
from segue._inbox import (
    Batch,
    Closed,
    Head,
    Inbox,
    Item,
    Link,
    Overflow,
    RawEntry,
    StreamLost,
    Tail,
)
from segue._log import LogView
from segue._nodes import Nodes
from segue._reading import FollowItem, join_again, raw_entries, read_log
from segue._seal import Seal
from segue._tails import Tails
from segue._ways import Ways
from segue.events import Snapshot
from segue_contract.errors import (
    InvalidArgument,
    SegueError,
    UnknownDevice,
    Unreachable,
)
from segue_contract.ids import SessionName
from segue_contract.limits import (
    FOLLOW_HEAL_S,
    FOLLOW_TIMEOUT_S,
    SUBSCRIBE_TIMEOUT_S,
    ClientLimits,
)
from segue_contract.sync.state import Cursor, SessionState
from segue_contract.topics import decode_head, decode_log_message, head_topic, log_topic
from segue_contract.transport.heartbeat import EOF, Listening
from segue_contract.transport.together import end
from segue_contract.v1 import agent_pb2 as pb

if TYPE_CHECKING:
    from segue._mqtt import Broker


@dataclass(frozen=True)
class Where:
    """Which log a follower follows, from which place on, and as whom.

    `live_key`: of what is published in that generation. `needs_login`: the broker takes this device
    with a login of its own for this session.
    """

    name: SessionName
    device: str
    generation: int
    from_offset: int = 0
    live_key: bytes = field(default=b"", repr=False)
    needs_login: bool = False


class Follower:
    """Iterate over it: `async for item in session.follow()`. Leaving the loop ends it.

    Attributes:
        live: what brings new entries now: "mqtt" or "grpc"; "" before the first item.
    """

    def __init__(
        self,
        nodes: Nodes,
        broker: Broker | None,
        where: Where,
        tails: Tails,
        limits: ClientLimits = ClientLimits(),
    ) -> None:
        if where.from_offset < 0:
            raise InvalidArgument(
                f"from_offset is {where.from_offset}.", hint="Use 0 for everything, or an offset."
            )
        self._nodes = nodes
        self._broker = broker
        self._tails = tails
        self._session = where.name.session
        self._device = where.device
        self._from_offset = where.from_offset
        self._log_topic = log_topic(where.name)
        self._head_topic = head_topic(where.name)
        self._seal = Seal(where.live_key, where.generation)
        self._view = LogView(where.generation)
        self._limits = limits
        self._inbox = Inbox(limits.follower_entries, limits.follower_bytes)
        self._closed = False
        self._begun = False
        self._ways = Ways(limits.use_s, news_at=0.0, heard_at=0.0)
        self._publishing = True  # as far as the log's nodes have said
        self._late = False  # the log was ahead, and MQTT has not brought it yet
        self._stream_since = 0.0
        self._stream: asyncio.Task[None] | None = None
        self._stream_number = 0
        self._heal_at: float | None = None
        self._failing_since: float | None = None
        self._shown_again = False  # another token
        self._next_pause = pauses()

    @property
    def live(self) -> str:
        if self._stream is None and self._ways.mqtt:
            return "mqtt"
        return "grpc" if self._begun else ""

    @property
    def unauthentic(self) -> int:
        """Messages that came over MQTT and that no cloud had sealed; none of them was taken."""
        return self._seal.unauthentic

    @property
    def mqtt_refusal(self) -> SegueError | None:
        """Why the broker does not take this device, which then follows over gRPC; None: it does, or
        was not reached."""
        return self._broker.refusal if self._broker is not None else None

    @property
    def cursor(self) -> Cursor:
        """Everything up to here was yielded or folded into a snapshot."""
        return self._view.cursor

    @property
    def state(self) -> SessionState:
        """The session folded so far. It changes as items come; do not change it yourself."""
        return self._view.state

    async def aclose(self) -> None:
        """End the iteration, whoever runs it; nothing further comes."""
        self._closed = True
        self._inbox.put(Closed())
        await self._close_stream()

    # -- the sink's side: called by the broker ----------------------------------------------------
    def on_link(self, up: bool) -> None:
        self._inbox.put(Link(up))

    def on_message(self, topic: str, payload: bytes) -> None:
        if not payload:
            return  # a head that was cleared
        body = self._seal.open(topic, payload)
        if body is None:
            if self._seal.doubt(_now()):
                self._inbox.put(Overflow())
            return
        try:
            if topic == self._log_topic:
                message = decode_log_message(body)
                self._inbox.put(
                    Batch(
                        tuple(
                            RawEntry(message.generation, message.first_offset + place, op)
                            for place, op in enumerate(message.ops)
                        ),
                        mqtt=True,
                    )
                )
            else:
                self._inbox.put(Head(decode_head(body)))
        except InvalidArgument:
            self._inbox.put(Overflow())  # of another version: the log has what it says

    def on_tail(self, tail: Tail) -> None:
        self._ways.heard_at = _now()
        news = tail.cursor != self.cursor or tail.publishing != self._publishing or self._late
        if news or not self._view.matches(tail.cursor, tail.digest):
            self._inbox.put(tail)

    def on_lost(self) -> None:
        self._inbox.put(Overflow())  # Read says it, with its error

    # -- the reader's side ------------------------------------------------------------------------
    async def __aiter__(self) -> AsyncIterator[FollowItem]:
        topics = (self._log_topic, self._head_topic)
        try:
            await self._go_live(topics)
            async for item in self._catch_up():
                yield item
            self._ways.news_at = self._ways.heard_at = _now()
            if not self._ways.mqtt:
                self._open_stream()  # it goes on from what was just read
            if self._broker is not None:
                self._ways.tails = True
                self._tails.add(self._session, self)
            while True:
                item_or_none = await self._inbox.get(self._wait_s())
                if self._closed:
                    return
                async for item in self._handle(item_or_none):
                    self._ways.news_at = _now()
                    yield item
        finally:
            await self._leave(topics)

    async def _go_live(self, topics: tuple[str, ...]) -> None:
        """Subscribe; where the broker does not answer soon, the stream brings what is new."""
        if self._broker is not None:
            await self._broker.add(topics, self)
            item = await self._inbox.get(SUBSCRIBE_TIMEOUT_S)
            self._ways.mqtt = isinstance(item, Link) and item.up
            if isinstance(item, Closed | Batch | Head):
                self._inbox.put(item)
        self._begun = True

    async def _leave(self, topics: tuple[str, ...]) -> None:
        self._tails.remove(self._session, self)
        await self._close_stream()
        if self._broker is not None:
            await self._broker.remove(topics, self)

    async def _catch_up(self) -> AsyncGenerator[FollowItem, None]:
        """The first snapshot: at `from_offset` (0: at the tail) or the first later known state."""
        wanted = self._from_offset
        first = True
        async for item in self._read(folded=not wanted):
            if not first:
                yield item
            elif wanted and item.offset >= wanted:
                first = False
                yield item if isinstance(item, Snapshot) else self._view.snapshot()
        if first:
            yield self._view.snapshot()

    async def _read(self, *, folded: bool = False) -> AsyncGenerator[FollowItem, None]:
        async for item in read_log(
            self._nodes,
            self._session,
            self._device,
            self._view,
            restart=True,
            folded=folded,
        ):
            yield item
        if self._broker is not None and self._seal.outdated(self._view.cursor.generation):
            opened = await join_again(self._nodes, self._session, self._device)
            self._seal.renew(opened.live_key, opened.tail.generation)

    def _wait_s(self) -> float | None:
        """How long the next item may take before the log is asked, or the ways are looked at; None:
        as long as it likes."""
        now = _now()
        if not self._view.behind:
            self._heal_at = None
            self._late = False
            return self._ways.look_s(now, streams=self._stream is not None)
        if self._heal_at is None:
            self._heal_at = now + FOLLOW_HEAL_S
        return max(0.0, self._heal_at - now)

    async def _handle(self, item: Item | None) -> AsyncGenerator[FollowItem, None]:
        """Yields the entries that `item` brought or made necessary; None: the wait is over."""
        match item:
            case Batch():
                for entry in self._view.offer(item.entries):
                    yield entry
                if item.mqtt:
                    await self._mqtt_brought()
                if not self._view.contradicted:
                    return
            case Tail():
                self._take_tail(item)
                if self._agrees(item):
                    return
            case Head():
                self._view.saw_head(item.cursor)
                if not (item.urgent and self._view.behind):
                    return
            case Link(up=False):
                self._ways.mqtt = False
                await self._look_at_ways()
                return
            case Link(up=True) if self._ways.spares_stream(_now()):
                self._ways.mqtt = True  # what was missed meanwhile shows in the next tail
                await self._close_stream()
                return
            case StreamLost():
                if item.number == self._stream_number and not self._ways.mqtt:
                    await self._reopen_stream(item.error)
                elif item.number == self._stream_number:
                    self._stream = None  # the next look at the log's tail may open another one
                return
            case None if not self._view.behind:
                await self._look_at_ways()
                return
            case None if self._late and self._stream is None:
                self._open_stream()  # MQTT had its time
            case _:
                pass
        async for found in self._heal():
            yield found
        if isinstance(item, Link):
            # from here on MQTT brings everything past what was just read
            self._ways.mqtt = True
            await self._close_stream()

    def _take_tail(self, item: Tail) -> None:
        """The log is ahead: MQTT has a moment to bring it, as for any gap. Without a broker, or
        where the cloud says that it cannot publish now, nothing is waited for."""
        self._view.saw_head(item.cursor)
        self._publishing = item.publishing
        self._late = self._view.behind
        brings = self._ways.mqtt and item.publishing
        if not brings and self._stream is None and (self._late or self._ways.in_use(_now())):
            self._open_stream()

    def _agrees(self, item: Tail) -> bool:
        """Whether the log may have all that is known here; if not, Read says what it has."""
        same = item.cursor.generation == item.known.generation
        ahead = same and item.known.offset > item.cursor.offset
        return not ahead and self._view.matches(item.cursor, item.digest)

    async def _look_at_ways(self) -> None:
        """Open a stream where one is needed now, close one that is not."""
        if self._stream is None and self._ways.needs_stream(_now()):
            self._open_stream()
        elif self._stream is not None and self._ways.spares_stream(_now()):
            await self._close_stream()

    async def _mqtt_brought(self) -> None:
        """Where MQTT brings everything again, the stream that was opened beside it may go."""
        now = _now()
        if (
            self._stream is not None
            and self._ways.mqtt
            and self._publishing
            and not self._view.behind
            and now - self._stream_since >= self._limits.beside_min_s
        ):
            await self._close_stream()

    async def _heal(self) -> AsyncGenerator[FollowItem, None]:
        """Read what is missing. An unreachable log is asked again, until `FOLLOW_TIMEOUT_S`."""
        self._heal_at = None
        try:
            async for found in self._read():
                yield found
        except SegueError as error:
            if not error.retryable:
                raise
            await self._bear(error)
            self._inbox.put(Overflow())
        else:
            self._recovered()

    # -- the gRPC stream --------------------------------------------------------------------------
    def _open_stream(self) -> None:
        if self._closed:
            return
        self._stream_number += 1
        self._stream_since = _now()
        self._stream = asyncio.create_task(
            self._pump_stream(self._stream_number), name=f"attach {self._session}"
        )

    async def _reopen_stream(self, error: Exception) -> None:
        self._stream = None
        passes = isinstance(error, SegueError) and error.retryable
        if passes and not self._ways.needs_stream(_now()):
            return
        if isinstance(error, UnknownDevice):  # the log forgets those that were quiet for longest
            try:
                await join_again(self._nodes, self._session, self._device)
            except SegueError as failure:
                error = failure
            else:
                await asyncio.sleep(self._next_pause())
                self._open_stream()
                return
        await self._bear(error)
        self._open_stream()

    async def _close_stream(self) -> None:
        task, self._stream = self._stream, None
        self._stream_number += 1
        if task is not None:
            await end(task)

    async def _pump_stream(self, number: int) -> None:
        """Put what `Attach` brings into the inbox, until it ends one way or another."""
        error: Exception = Unreachable("The live stream ended.")
        node = call = None
        try:
            node = await self._nodes.connect()
            stub = await self._nodes.stub(node)
            after = self._view.cursor
            request = pb.AttachRequest(
                session=self._session,
                device=self._device,
                after=pb.Cursor(generation=after.generation, offset=after.offset),
                resume=True,
            )
            call = Listening(node.keep(stub.Attach(request)))
            try:
                while (event := await call.read()) is not EOF:
                    self._take(event)
            finally:
                call.cancel()
        except (SegueError, grpc.aio.AioRpcError, asyncio.CancelledError) as caught:
            if being_cancelled():
                raise
            error = typed(caught)
        except Exception as caught:  # of the app's token function: its reader is told
            error = caught
        if node is not None and is_link_loss(error):
            silent = call is not None and call.silent
            await (self._nodes.silent if silent else self._nodes.failed)(node)
        self._inbox.put(StreamLost(number, error))

    def _take(self, event: pb.AttachEvent) -> None:
        self._recovered()
        match event.WhichOneof("kind"):
            case "snapshot":
                # The log does not go on from `after`, or the node does not know `resume`: Read
                # brings what there is, and says what was lost.
                at = event.snapshot.at
                self._inbox.put(Head(Cursor(at.generation, at.offset), urgent=True))
            case "entries":
                self._inbox.put(Batch(raw_entries(event.entries.entries)))

    # -- patience ---------------------------------------------------------------------------------
    def _recovered(self) -> None:
        self._failing_since = None
        self._shown_again = False
        self._next_pause = pauses()

    async def _bear(self, error: Exception) -> None:
        """Pause after a failure; raise it where it lasted too long or cannot pass."""
        now = _now()
        if self._failing_since is None:
            self._failing_since = now
        passing = isinstance(error, SegueError) and error.retryable
        if ran_out(error) and not self._shown_again and self._nodes.shows_another():
            passing = self._shown_again = True
        if not passing or now - self._failing_since > FOLLOW_TIMEOUT_S:
            raise error
        await asyncio.sleep(self._next_pause())


def _now() -> float:
    return asyncio.get_running_loop().time()
