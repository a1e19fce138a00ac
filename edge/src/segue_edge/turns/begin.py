"""The turn's beginning: claim it in the cloud, learn what the edge lacks, make the token ids."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from segue_contract.errors import ModelMismatch, PromptTooLong, Unreachable
from segue_contract.limits import BEGIN_TIMEOUT_S
from segue_contract.sync.state import TurnState, decode_turns, heard
from segue_contract.transport.status import error_from_rpc
from segue_contract.v1 import decode_pb2 as dpb
from segue_edge.turns.asked import Asked
from segue_edge.turns.deps import EdgeDeps
from segue_edge.turns.history import SessionHistory
from segue_edge.uplink.clouds import Cloud


@dataclass
class Begun:
    """`cloud` is None where none could be reached: the turn is served offline.

    `prompt`: token ids of the whole conversation and this message. `joined`: the turn's id was
    known to the cloud, so it is followed, not run.
    """

    cloud: Cloud | None
    prompt: list[int]
    epoch: int = 0
    offset: int = 0
    joined: bool = False


OnGuess = Callable[[Cloud, list[int]], None]


async def begin(deps: EdgeDeps, asked: Asked, on_guess: OnGuess) -> Begun:
    """Begin the turn at the best cloud that answers, tokenizing meanwhile.

    Where this node knows the conversation, its prompt is known before the cloud has answered:
    `on_guess` is told it with the cloud that is asked, so that the prefill need not wait for a
    round trip. What it says is true unless `Begun.prompt` says otherwise.

    Raises:
        PromptTooLong: before the log was touched, where this node knows the conversation.
        SegueError: what the cloud said of the request, typed.
        Unreachable: no cloud answers, and this node does not know the conversation.
    """
    history = deps.histories.of(asked.session)
    guess = asyncio.create_task(_guess(deps, asked, history, on_guess))
    try:
        if _may_not_fit(deps, history, asked):
            check_fits(deps, await guess)
        begun = await _begin_at_some_cloud(deps, asked, history)
        if begun is None:
            return await _begin_offline(deps, asked, history, guess)
        cloud, reply = begun
        result = Begun(cloud, [], reply.epoch, reply.tail.offset, reply.joined)
        if reply.joined:
            return result
        changed = history.merge(reply.tail.generation, reply.first_turn, decode_turns(reply.turns))
        result.prompt = await _encode(deps, history.turns, asked) if changed else await guess
        return result
    finally:
        guess.cancel()


async def _guess(
    deps: EdgeDeps, asked: Asked, history: SessionHistory, on_guess: OnGuess
) -> list[int]:
    known = history.known
    prompt = await _encode(deps, history.turns, asked)
    ranked = deps.clouds.ranked(asked.session)
    if known and ranked and ranked[0].healthy:
        on_guess(ranked[0], prompt)
    return prompt


async def _encode(deps: EdgeDeps, turns: list[TurnState], asked: Asked) -> list[int]:
    prompt = asked.request.prompt
    return await asyncio.to_thread(deps.tokenizer.encode_conversation, heard(turns), prompt)


def _may_not_fit(deps: EdgeDeps, history: SessionHistory, asked: Asked) -> bool:
    """A token has at least a byte, so a small conversation needs no look before Begin."""
    template = 16 * (len(history.turns) + 2)  # its own tokens for every turn, at the most
    known = sum(len(turn.prompt.encode()) + len(turn.tokens) for turn in history.turns)
    return known + len(asked.request.prompt.encode()) + template > deps.manifest.geometry.context


def check_fits(deps: EdgeDeps, prompt: list[int]) -> int:
    """How many tokens the context leaves for the reply.

    Raises:
        PromptTooLong: none.
    """
    context = deps.manifest.geometry.context
    room = context - len(prompt)
    if room < 1:
        raise PromptTooLong(
            f"The conversation has {len(prompt)} tokens; the model's context is {context}.",
            hint="Shorten the message, or begin a new session.",
            tokens=len(prompt),
            limit=context,
        )
    return room


async def _begin_at_some_cloud(
    deps: EdgeDeps, asked: Asked, history: SessionHistory
) -> tuple[Cloud, dpb.BeginReply] | None:
    for cloud in deps.clouds.ranked(asked.session):
        try:
            await cloud.reach()
            return cloud, await call_begin(cloud, asked, history)
        except Unreachable as error:
            cloud.failed(error)
    return None


async def call_begin(cloud: Cloud, asked: Asked, history: SessionHistory) -> dpb.BeginReply:
    """One `Decode.Begin`. Raises the cloud's typed error, or Unreachable."""
    request = dpb.BeginRequest(
        turn=asked.request,
        known_turns=len(history.confirmed),
        known_generation=history.generation,
        weights_digest=cloud.expected_weights,
    )
    started = time.monotonic()
    try:
        reply: dpb.BeginReply = await cloud.decode.Begin(request, timeout=BEGIN_TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        failure = error_from_rpc(error)
        if isinstance(failure, ModelMismatch):  # it came back with them since the last probe
            raise cloud.refuse_weights() from error
        raise failure from error
    cloud.view.rtt_s.observe(time.monotonic() - started)
    cloud.take_facts(reply.facts)
    return reply


async def _begin_offline(
    deps: EdgeDeps, asked: Asked, history: SessionHistory, guess: asyncio.Task[list[int]]
) -> Begun:
    if not history.known:
        raise Unreachable(
            f"No cloud can be reached, and this edge does not know session {asked.session}.",
            hint="Check the cloud (`segue doctor`), or go on in a session opened here before.",
        )
    deps.outbox.check_room()
    prompt = await guess
    check_fits(deps, prompt)
    return Begun(None, prompt)
