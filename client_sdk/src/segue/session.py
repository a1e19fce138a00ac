"""A session as one device sees it."""

from __future__ import annotations

import asyncio
import copy
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from segue._log import LogView
from segue._nodes import Nodes
from segue._reading import join_again, read_log
from segue.errors import (
    DeadlineExceeded,
    InvalidArgument,
    OutcomeUnknown,
    SequenceGap,
    StaleEpoch,
    TurnFailed,
    UnknownDevice,
    UnknownSession,
    Unreachable,
)
from segue.events import Entry, OfflineTurn, Snapshot
from segue.follow import Follower, Where
from segue.options import Timeout
from segue.turn import Turn
from segue_contract.checks import check_plan, check_run, check_text
from segue_contract.ids import SessionName, check_id, new_id
from segue_contract.limits import (
    MAX_APPEND_BYTES,
    MAX_APPEND_OPS,
    MAX_ID_CHARS,
    RPC_TIMEOUT_S,
    ClientLimits,
)
from segue_contract.sync.ops import DEVICE_KINDS, Op, Sampling, Set, encode_op
from segue_contract.sync.state import Cursor, SessionState
from segue_contract.v1 import agent_pb2 as pb

_OpT = TypeVar("_OpT", bound=Op)
_WHEN_BUSY = {"wait": pb.WHEN_BUSY_WAIT, "refuse": pb.WHEN_BUSY_REFUSE}
# A call on an open session bears a node's restart for this long before it says Unreachable.
_PATIENCE_S = RPC_TIMEOUT_S / 4


@dataclass(slots=True)
class _Writer:
    """Who appends: this object, not the device. Two of one device never share numbers."""

    producer: str
    epoch: int  # 0: the session has to be opened again first
    seq: int = 1
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Session:
    """Made by `Client.session`.

    Attributes:
        name, device: as given.
        model: what the session is served with. role, instance: who opened it for us.
        created: this call made the session.
        max_context_tokens: prompt, history and reply together may be this long.
        offline_turns: what the edge that opened it had yet to bring into the log, or could not.
    """

    def __init__(
        self,
        nodes: Nodes,
        opened: pb.OpenSessionReply,
        device: str,
        follow: Callable[[str, Where], Follower],
        producer: str,
        limits: ClientLimits = ClientLimits(),
    ) -> None:
        self.name = opened.session
        self.device = device
        self.model = opened.model
        self.role = opened.role
        self.instance = opened.instance
        self.created = opened.created
        self.max_context_tokens = opened.max_context_tokens
        self.offline_turns = tuple(_offline_turn(turn) for turn in opened.offline_turns)
        self.tail = Cursor(opened.tail.generation, opened.tail.offset)
        self._name = SessionName(opened.tenant, opened.session)
        self._nodes = nodes
        self._mqtt_url = opened.mqtt_url
        self._live_key = opened.live_key
        self._needs_login = opened.needs_login
        self._follow = follow
        self._limits = limits
        self._writer = _Writer(producer, opened.epoch)

    def with_options(
        self, *, timeout: Timeout | float | None = None, max_retries: int | None = None
    ) -> Session:
        """This session with other options, as `Client.with_options`."""
        twin = copy.copy(self)
        twin._nodes = self._nodes.with_options(self._nodes.options.changed(timeout, max_retries))
        return twin

    # -- turns ------------------------------------------------------------------------------------
    def run(
        self,
        prompt: str,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        plan: str = "",
        when_busy: str = "wait",
        turn: str = "",
        timeout: Timeout | float | None = None,
        max_retries: int | None = None,
    ) -> Turn:
        """One turn, for `async with session.run("...") as turn`.

        Args:
            max_tokens: tokens of the reply at most.
            temperature: 0 always takes the likeliest token.
            top_p, top_k, min_p: which tokens may be drawn; 1, 0 and 0 mean all.
            seed: of what is drawn at a temperature above 0; None: a fresh one. Equal seeds draw
                equal tokens from equal logits, on any machine. Edge and cloud compute slightly
                different logits: at temperature 0.8 some 3 to 5 % of tokens differ between them
                (the default model), and behind the first of these the replies are different ones.
            stop: texts that end the reply (and are left out of it).
            plan: forces who computes what ("edge", "ship", "text"); "" leaves it to the planner.
            when_busy: "wait" for the session's running turn, or "refuse" with SessionBusy.
            turn: an id of your own; a known one joins that turn instead of running again.
            timeout, max_retries: for this turn, else the session's. A turn is asked for again as
                long as it was not accepted; what is lost afterwards is always joined again.

        Raises:
            EmptyPrompt, PromptTooLong, BadSampling, InvalidArgument: before anything is sent.
        """
        if seed is None:
            seed = int.from_bytes(os.urandom(6), "little") if temperature else 0
        sampling = Sampling(
            temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed
        )
        check_run(prompt, max_tokens, sampling, stop)
        if when_busy not in _WHEN_BUSY:
            raise InvalidArgument(f"when_busy is {when_busy!r}.", hint='Use "wait" or "refuse".')
        request = pb.RunTurnRequest(
            session=self.name,
            device=self.device,
            turn=check_id(turn, "turn") if turn else new_id("t", os.urandom),
            prompt=prompt,
            max_tokens=max_tokens,
            sampling=pb.Sampling(
                temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed
            ),
            stop=stop,
            when_busy=_WHEN_BUSY[when_busy],
            plan=check_plan(plan),
        )
        nodes = self._nodes.with_options(self._nodes.options.changed(timeout, max_retries))
        return Turn(nodes, request, self.stop, limits=self._limits)

    async def stop(self, turn: str = "") -> bool:
        """Cancel the running turn (or `turn`), whoever started it.

        Returns:
            Whether one was running.
        """
        request = pb.StopTurnRequest(session=self.name, device=self.device, turn=turn)
        try:
            reply = await self._nodes.unary("StopTurn", request, patience_s=_PATIENCE_S)
        except UnknownDevice:
            await join_again(self._nodes, self.name, self.device)
            reply = await self._nodes.unary("StopTurn", request, patience_s=_PATIENCE_S)
        return bool(reply.stopping)

    # -- the log ----------------------------------------------------------------------------------
    def follow(self, from_offset: int = 0) -> Follower:
        """The session, live: `async for item in session.follow()`.

        The first item is a `Snapshot`; then comes an `Entry` for every later offset, once and in
        order, until you leave the loop.

        Args:
            from_offset: 0 folds everything so far into the snapshot. N: the snapshot is the state
                at N (or the first later one that the log still has), and entries follow one by one.
        """
        where = Where(
            self._name,
            self.device,
            self.tail.generation,
            from_offset,
            self._live_key,
            self._needs_login,
        )
        return self._follow(self._mqtt_url, where)

    async def read(self, from_offset: int = 0) -> list[Snapshot | Entry]:
        """The log after `from_offset`, up to now.

        A `Snapshot` stands for entries that were compacted, or replaces all where the log's
        generation changed.
        """
        if from_offset < 0:
            raise InvalidArgument(f"from_offset is {from_offset}.", hint="Use 0 for everything.")
        view = LogView(self.tail.generation, from_offset)
        found = read_log(self._nodes, self.name, self.device, view, patience_s=_PATIENCE_S)
        return [item async for item in found]

    async def state(self) -> SessionState:
        """The whole session, folded now: turns with prompts and replies, values, claims."""
        view = LogView(self.tail.generation)
        found = read_log(
            self._nodes, self.name, self.device, view, patience_s=_PATIENCE_S, folded=True
        )
        async for _ in found:
            pass
        return view.state

    async def dismiss(self, *turns: str) -> int:
        """The user knows that the log refused these messages for good: the edge that keeps them
        for it (`offline_turns`, `Turn.settled`) need not tell of them again.

        Args:
            turns: ids of turns of this device.

        Returns:
            How many the node that serves this session now had kept until then.

        Raises:
            Unreachable: no node answers.
        """
        request = pb.DismissTurnsRequest(session=self.name, device=self.device, turns=turns)
        reply: pb.DismissTurnsReply = await self._nodes.unary(
            "DismissTurns", request, patience_s=_PATIENCE_S
        )
        return int(reply.dismissed)

    async def append(self, *ops: Op) -> Cursor:
        """Append ops of this device, each once, all or none; `id`, `device`, `at_ms` are filled in.

        Returns:
            The place of the first one.

        Raises:
            InvalidArgument: no op, more than one message takes, or of a kind that only a turn's
                owner writes.
            OutcomeUnknown: it was sent, and no answer came in time: the log says whether it is
                there.
        """
        if not 0 < len(ops) <= MAX_APPEND_OPS:
            raise InvalidArgument(
                f"{len(ops)} ops were given; 1 to {MAX_APPEND_OPS} can be appended at once."
            )
        data = [encode_op(self._signed(op)) for op in ops]
        size = sum(map(len, data))
        if size > MAX_APPEND_BYTES:
            raise InvalidArgument(
                f"{len(ops)} ops have {size} bytes; {MAX_APPEND_BYTES} can be appended at once.",
                hint="Append them in smaller batches.",
            )
        async with self._writer.lock:
            return await self._append(data)

    async def set(self, name: str, value: bytes | str) -> Cursor:
        """Set a named value of the session; the last writer by log order wins."""
        if not name or len(name) > MAX_ID_CHARS:
            raise InvalidArgument(
                f"The value's name has {len(name)} characters.", hint=f"Use 1 to {MAX_ID_CHARS}."
            )
        check_text(name, "name")
        content = check_text(value, "value") if isinstance(value, str) else bytes(value)
        return await self.append(Set(id="", name=name, value=content))

    def _signed(self, op: _OpT) -> _OpT:
        if not isinstance(op, DEVICE_KINDS):
            raise InvalidArgument(
                f"A device may not append {type(op).__name__}.", hint="Turns are run: session.run."
            )
        return msgspec.structs.replace(
            op,
            id=op.id or new_id("o", os.urandom),
            device=self.device,
            at_ms=op.at_ms or int(time.time() * 1000),
        )

    async def _append(self, data: list[bytes]) -> Cursor:
        """One batch. Numbers whose fate is not known are never used again: opening the session
        anew gives the next epoch, and the log refuses what may still come of the last one."""
        writer = self._writer
        for again in (True, False):
            if not writer.epoch:
                await self._reopen()
            request = pb.AppendRequest(
                session=self.name,
                device=self.device,
                producer=writer.producer,
                epoch=writer.epoch,
                first_seq=writer.seq,
                ops=data,
            )
            epoch, writer.epoch = writer.epoch, 0  # until the answer is here
            tries, unanswered = self._nodes.tries, self._nodes.unanswered
            try:
                reply = await self._nodes.unary("Append", request, patience_s=_PATIENCE_S)
            except (StaleEpoch, SequenceGap, UnknownDevice, UnknownSession) as error:
                # The log does not know this writer (any more), so it took nothing of an attempt
                # that was the only one.
                if isinstance(error, StaleEpoch) and self._nodes.tries > tries + 1:
                    raise OutcomeUnknown(
                        "The log forgot this writer, and an earlier attempt may have arrived.",
                        hint="Read the log: the ops may be in it.",
                    ) from error
                if not again or isinstance(error, UnknownSession):
                    raise
                continue
            except (DeadlineExceeded, Unreachable) as error:
                arrived = isinstance(error, DeadlineExceeded) and self._nodes.tries > tries
                if not arrived and self._nodes.unanswered == unanswered:
                    raise  # it never left this device, or a node said what became of it
                raise OutcomeUnknown(
                    f"Whether it was appended is not known: {error.message}",
                    hint="Read the log: the ops are in it, or will never be.",
                    **error.fields,
                ) from error
            writer.epoch, writer.seq = epoch, writer.seq + len(data)
            return Cursor(reply.first.generation, reply.first.offset)
        raise AssertionError("unreachable")

    async def _reopen(self) -> None:
        writer = self._writer
        request = pb.OpenSessionRequest(
            session=self.name,
            device=self.device,
            must_exist=True,
            producer=writer.producer,
            known_generation=self.tail.generation,
        )
        opened = await self._nodes.unary("OpenSession", request, patience_s=_PATIENCE_S)
        writer.epoch, writer.seq = opened.epoch, 1


def _offline_turn(wire: pb.OfflineTurn) -> OfflineTurn:
    error = TurnFailed(wire.error_message, code=wire.error_code) if wire.error_code else None
    return OfflineTurn(wire.turn, wire.device, wire.title, error)
