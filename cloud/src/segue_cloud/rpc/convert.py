"""Between protobuf messages and our own values; what a peer sent is checked here."""

from __future__ import annotations

from collections.abc import AsyncIterator

from segue_cloud.sessions.port import StoredEntry
from segue_cloud.sessions.slices import encoded
from segue_cloud.turns.opening import TurnRequest
from segue_cloud.turns.spec import OwnedTurn
from segue_cloud.turns.writer import TurnKey
from segue_contract.checks import check_run, check_sampling_values, check_stop
from segue_contract.errors import BadBlock, InvalidArgument
from segue_contract.ids import SessionName, check_id
from segue_contract.limits import (
    KV_BLOCK_TOKENS,
    MAX_NEW_TOKENS,
    MAX_PROMPT_BYTES,
    SNAPSHOT_PART_BYTES,
)
from segue_contract.plan import Shape
from segue_contract.sync.ops import Sampling
from segue_contract.sync.state import Cursor, SessionState
from segue_contract.v1 import agent_pb2 as pb
from segue_contract.v1 import decode_pb2 as dpb


def sampling_of(message: pb.Sampling) -> Sampling:
    return Sampling(
        temperature=message.temperature,
        top_p=message.top_p or 1.0,
        top_k=message.top_k,
        min_p=message.min_p,
        seed=message.seed,
    )


def turn_request(message: pb.RunTurnRequest, tenant: str) -> TurnRequest:
    """Raises InvalidArgument, EmptyPrompt or BadSampling."""
    sampling = sampling_of(message.sampling)
    check_run(message.prompt, message.max_tokens, sampling, tuple(message.stop))
    return TurnRequest(
        session=SessionName(tenant, check_id(message.session, "session")),
        device=check_id(message.device, "device"),
        turn=check_id(message.turn, "turn"),
        prompt=message.prompt,
        max_tokens=message.max_tokens,
        sampling=sampling,
        stop=tuple(message.stop),
        wait=message.when_busy != pb.WHEN_BUSY_REFUSE,
    )


def owned_turn(message: dpb.TurnSpec, tenant: str, *, vocabulary: int, context: int) -> OwnedTurn:
    """Lengths are looked at before anything is copied: a stream's opening must not hold up others.

    Raises:
        InvalidArgument, BadSampling, BadBlock: what no edge of ours sends.
    """
    if not message.prompt:
        raise InvalidArgument("A turn was opened without a prompt.")
    # One that is too long for the context is ended in the log with that error, if it is one that
    # somebody may have typed: a token has at least a byte.
    most = context + MAX_PROMPT_BYTES
    if len(message.prompt) > most or len(message.known_tokens) > MAX_NEW_TOKENS:
        raise InvalidArgument(
            f"A turn was opened with {len(message.prompt)} prompt tokens and "
            f"{len(message.known_tokens)} of its reply; {most} and {MAX_NEW_TOKENS} are allowed."
        )
    if len(message.blocks) * KV_BLOCK_TOKENS > len(message.prompt):
        raise BadBlock("A turn was opened with more blocks than its prompt has.")
    if max(message.prompt) >= vocabulary or any(
        token >= vocabulary for token in message.known_tokens
    ):
        raise InvalidArgument("A turn was opened with token ids that the model does not have.")
    sampling = sampling_of(message.sampling)
    check_sampling_values(sampling, message.max_tokens)
    stop = check_stop(message.stop)
    if any(len(block) != 16 for block in message.blocks):
        raise BadBlock("A block id has not 16 bytes.")
    if message.ship_blocks > len(message.blocks):
        raise BadBlock("More blocks are to be shipped than the prompt has.")
    try:
        shape = Shape(message.shape)
    except ValueError as error:
        raise InvalidArgument(f"There is no plan shape {message.shape!r}.") from error
    return OwnedTurn(
        key=TurnKey(
            SessionName(tenant, check_id(message.session, "session")),
            check_id(message.turn, "turn"),
            message.epoch,
            check_id(message.device, "device"),
        ),
        prompt=tuple(message.prompt),
        max_tokens=message.max_tokens,
        sampling=sampling,
        stop=stop,
        shape=shape,
        blocks=tuple(message.blocks),
        ship_blocks=message.ship_blocks,
        edge_cached_tokens=message.edge_cached_tokens,
        has_edge=True,
    )


def cursor_message(cursor: Cursor) -> pb.Cursor:
    return pb.Cursor(generation=cursor.generation, offset=cursor.offset)


def entry_message(entry: StoredEntry) -> pb.LogEntry:
    return pb.LogEntry(generation=entry.cursor.generation, offset=entry.cursor.offset, op=entry.op)


async def snapshot_parts(state: SessionState, lost_from: int) -> AsyncIterator[pb.Snapshot]:
    """The state in messages of at most SNAPSHOT_PART_BYTES; all but the last say `more`."""
    data, at = await encoded(state), cursor_message(state.cursor)
    for start in range(0, len(data), SNAPSHOT_PART_BYTES):
        part = data[start : start + SNAPSHOT_PART_BYTES]
        more = start + len(part) < len(data)
        yield pb.Snapshot(at=at, state=part, more=more, lost_from=lost_from)
