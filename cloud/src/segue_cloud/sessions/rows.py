"""What the log's script is given, and what it answers, as our own values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from segue_cloud.sessions.port import (
    AppendResult,
    PageStatus,
    RawPage,
    Status,
    StoredEntry,
    TurnClaim,
)
from segue_contract.errors import InvalidArgument
from segue_contract.limits import MAX_APPEND_OPS, MAX_OP_BYTES
from segue_contract.sync.state import Cursor


def check_ops(ops: Sequence[bytes], least: int) -> None:
    """Raises InvalidArgument for a batch that is too small, too long, or has too large an op."""
    if not least <= len(ops) <= MAX_APPEND_OPS:
        raise InvalidArgument(
            f"A batch of {len(ops)} log entries; {least} to {MAX_APPEND_OPS} are allowed."
        )
    for op in ops:
        if len(op) > MAX_OP_BYTES:
            raise InvalidArgument(f"A log entry of {len(op)} bytes is over the limit.")


def replicas(row: list[Any]) -> int | None:
    """Of the verbs append, begin, take and renew: how many the store has that should get what was
    written; None where nothing was."""
    return int(row[-1]) if row[0] in (b"ok", b"dup") else None


_STATUS = {status.value.encode(): status for status in Status}


def append_result(row: list[Any]) -> AppendResult:
    """Of the verbs append and renew."""
    (
        status, generation, first, tail, epoch, expected, stopping, appended, since, size, lost, _,
    ) = row  # fmt: skip
    return AppendResult(
        status=_STATUS[status],
        generation=generation,
        first_offset=first,
        tail=tail,
        current_epoch=epoch,
        expected_seq=expected,
        stop_requested=bool(stopping),
        appended=appended,
        log_entries=since,
        log_bytes=size,
        lost_from=lost,
    )


def page(row: list[Any]) -> RawPage:
    """Of the verb read."""
    status, generation, tail, found, folded, written, lost, digest, bare = row
    return RawPage(
        status=PageStatus(status.decode()),
        tail=Cursor(generation, tail),
        entries=[entry(one) for one in found],
        snapshot_offset=folded,
        written=written,
        lost_from=lost,
        digest=digest,
        bare=bool(bare),
    )


def claim(row: list[Any], nonce: str) -> TurnClaim:
    """Of the verbs begin, take (without their last value, see `replicas`) and wait."""
    status, epoch, generation, offset, known, ended, holder, appended, *left_ms = row
    return TurnClaim(
        status=Status(status.decode()),
        epoch=epoch,
        cursor=Cursor(generation, offset),
        known=bool(known),
        ended=bool(ended),
        holder=holder.decode(),
        appended=appended,
        nonce=nonce,
        lease_left_s=left_ms[0] / 1000 if left_ms else 0.0,
    )


def entry(row: list[Any]) -> StoredEntry:
    """Of XRANGE."""
    entry_id, fields = row
    generation, offset = entry_id.split(b"-")
    return StoredEntry(Cursor(int(generation), int(offset)), fields[1])
