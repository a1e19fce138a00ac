"""The turn's beginning: claim it in the cloud, learn what the edge lacks, make the token ids."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from segue_contract.chat import ChatTokenizer
from segue_contract.errors import (
    DeadlineExceeded,
    ModelMismatch,
    PromptTooLong,
    SessionBusy,
    Unreachable,
)
from segue_contract.limits import BEGIN_TIMEOUT_S
from segue_contract.sync.context import choose_context, seen, tokens_at_most
from segue_contract.sync.state import TurnState, decode_turns
from segue_contract.transport.bearer import bearer
from segue_contract.transport.status import error_from_rpc
from segue_contract.v1 import decode_pb2 as dpb
from segue_edge.turns.asked import Asked
from segue_edge.turns.history import HistoryCache, SessionHistory
from segue_edge.turns.offline.outbox import Outbox, Room
from segue_edge.uplink.attempts import at_some_cloud
from segue_edge.uplink.clouds import Cloud, CloudSet

# Any cloud of the same log would answer so: the session's running turn did not end in time, or the
# caller did not want to wait for it.
_FINAL = (SessionBusy, DeadlineExceeded)


@dataclass
class Begun:
    """`cloud` is None where none could be reached: the turn is served offline, with `room` for it
    in the outbox.

    `prompt`: token ids of the whole conversation and this message. `joined`: the turn's id was
    known to the cloud, so it is followed, not run. `context_from`: id of the first turn in it.
    `ended`: no cloud is there, and the log was known to have the whole turn before.
    """

    cloud: Cloud | None
    prompt: list[int]
    epoch: int = 0
    offset: int = 0
    joined: bool = False
    room: Room | None = None
    context_from: str = ""
    ended: TurnState | None = None


OnGuess = Callable[[Cloud, list[int]], None]
Guess = tuple[list[int], str]  # the prompt, and the id of the first turn in it


class TurnOpening:
    """Begins turns. `context`: tokens that the model takes, prompt and reply together."""

    def __init__(
        self,
        clouds: CloudSet,
        histories: HistoryCache,
        tokenizer: ChatTokenizer,
        outbox: Outbox,
        *,
        context: int,
    ) -> None:
        self._clouds = clouds
        self._histories = histories
        self._tokenizer = tokenizer
        self._outbox = outbox
        self._context = context

    async def begin(self, asked: Asked, on_guess: OnGuess) -> Begun:
        """Begin the turn at the best cloud that takes it, tokenizing meanwhile.

        What the session said offline is in the log before: its order and the prompt are right
        then. Where that is not possible for lack of a cloud, this turn is offline as well.

        Where this node knows the conversation, its prompt is known before the cloud has answered:
        `on_guess` is told it with the cloud that is asked, so that the prefill need not wait for a
        round trip. What it says is true unless `Begun.prompt` says otherwise.

        Raises:
            PromptTooLong: before the log was touched, where this node knows the conversation.
            SegueError: what the cloud said of the request, typed.
            Unreachable: no cloud answers, and this node does not know the conversation.
            TurnConflict: nor then may an id name two questions.
        """
        history = self._histories.of(asked.session)
        guess = asyncio.create_task(self._guess(asked, history, on_guess))
        try:
            if tokens_at_most(history.turns, asked.request.prompt) > self._context:
                self.check_fits((await guess)[0])
            try:
                if self._outbox.holds(asked.session):
                    await self._outbox.settle(asked.session)
                cloud, reply = await self._begin_online(asked, history)
            except Unreachable:
                return await self._begin_offline(asked, history, guess)
            cut = reply.context_from
            result = Begun(
                cloud, [], reply.epoch, reply.tail.offset, reply.joined, context_from=cut
            )
            if reply.joined:
                return result
            turns = decode_turns(reply.turns)
            changed = history.merge(
                reply.tail.generation, reply.first_turn, turns, reply.known_digest
            )
            result.prompt, guessed = await guess
            history.forget(asked.request.turn, cut)
            if changed or cut != guessed:
                result.prompt = await self._encode(history.turns, asked, cut)
            return result
        finally:
            guess.cancel()

    async def _guess(self, asked: Asked, history: SessionHistory, on_guess: OnGuess) -> Guess:
        """The prompt by what this node knows."""
        known, turns = history.known, history.turns
        request = asked.request
        context_from = await asyncio.to_thread(
            choose_context,
            turns,
            request.turn,
            self._tokenizer,
            request.prompt,
            max_tokens=request.max_tokens,
            context=self._context,
        )
        prompt = await self._encode(turns, asked, context_from)
        ranked = self._clouds.ranked(asked.session)
        if known and ranked and ranked[0].healthy and not self._outbox.holds(asked.session):
            on_guess(ranked[0], prompt)
        return prompt, context_from

    async def _encode(self, turns: list[TurnState], asked: Asked, context_from: str) -> list[int]:
        kept = seen(turns, asked.request.turn, context_from)
        encode = self._tokenizer.encode_conversation
        return await asyncio.to_thread(encode, kept, asked.request.prompt)

    def check_fits(self, prompt: list[int]) -> int:
        """How many tokens the context leaves for the reply.

        Raises:
            PromptTooLong: none.
        """
        room = self._context - len(prompt)
        if room < 1:
            raise PromptTooLong(
                f"The conversation has {len(prompt)} tokens; the model's context is "
                f"{self._context}.",
                hint="Shorten the message, or begin a new session.",
                tokens=len(prompt),
                limit=self._context,
            )
        return room

    async def _begin_online(
        self, asked: Asked, history: SessionHistory
    ) -> tuple[Cloud, dpb.BeginReply]:
        async def call(cloud: Cloud) -> tuple[Cloud, dpb.BeginReply]:
            return cloud, await call_begin(cloud, asked, history)

        return await at_some_cloud(self._clouds, asked.session, call, final=_FINAL)

    async def _begin_offline(
        self, asked: Asked, history: SessionHistory, guess: asyncio.Task[Guess]
    ) -> Begun:
        if not history.known:
            raise Unreachable(
                "No cloud can be reached, and this edge does not know session "
                f"{asked.session.session}.",
                hint="Check the cloud (`segue doctor`), or go on in a session opened here before.",
            )
        known = next((turn for turn in history.turns if turn.turn == asked.turn), None)
        if known is not None:
            if known.prompt:  # else it failed, and its message is not kept here
                asked.check_same(known.prompt, known.max_tokens, known.sampling, known.stop)
            return Begun(None, [], joined=True, ended=known)
        prompt, context_from = await guess
        self.check_fits(prompt)
        return Begun(None, prompt, room=self._outbox.reserve(), context_from=context_from)


async def call_begin(
    cloud: Cloud, asked: Asked, history: SessionHistory, *, follows: str | None = None
) -> dpb.BeginReply:
    """One `Decode.Begin`. `follows`: for a turn that was served offline, the one known before it.

    Raises:
        SegueError: the cloud's typed error, or Unreachable.
    """
    request = dpb.BeginRequest(
        turn=asked.request,
        known_turns=history.known_turns,
        known_generation=history.generation,
        known_digest=history.known_digest,
        weights_digest=cloud.expected_weights,
        offline=follows is not None,
        follows=follows or "",
    )
    started = time.monotonic()
    try:
        with cloud.asking(asked.session):
            reply: dpb.BeginReply = await cloud.decode.Begin(
                request, timeout=BEGIN_TIMEOUT_S, metadata=bearer(asked.token)
            )
    except grpc.aio.AioRpcError as error:
        failure = error_from_rpc(error)
        if isinstance(failure, ModelMismatch):  # it came back with them since the last probe
            raise cloud.refuse_weights() from error
        raise failure from error
    cloud.view.rtt_s.observe(time.monotonic() - started)
    cloud.take_facts(reply.facts)
    return reply
