"""The outbox's file: records appended and synced, read again after a restart.

    file    magic "SEGUEOUT", u32 version, then records
    record  u32 length, u32 CRC-32 of the payload, payload (MessagePack)

Integers are little-endian. A record that was cut off at the end (the power went) is cut away. A
record that cannot be read ends the reading; the file is kept beside the new one for a person.
"""

from __future__ import annotations

import fcntl
import os
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import msgspec
import structlog

from segue_contract.errors import UNREADABLE, InvalidArgument
from segue_contract.ids import DEFAULT_TENANT
from segue_contract.limits import (
    MAX_OUTBOX_RECORD_BYTES,
    OUTBOX_REFUSED_KEPT,
    OUTBOX_REWRITE_BYTES,
    OUTBOX_TURNS,
)

log = structlog.get_logger("segue.outbox")

_MAGIC = b"SEGUEOUT"
_VERSION = 1
_HEADER = struct.Struct("<8sI")
_RECORD = struct.Struct("<II")


class StoredTurn(msgspec.Struct, frozen=True, kw_only=True):
    """A whole turn as the device saw it; `request` is the RunTurnRequest's bytes, `token`
    what it was asked with. With a `refused_code` the log refused it for good."""

    request: bytes
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    pieces: tuple[str, ...]
    reason: str
    plan: bytes
    begun: bool = False
    follows: str = ""
    refused_code: str = ""
    refused_message: str = ""
    tenant: str = DEFAULT_TENANT  # earlier files have none: there was one tenant
    token: str = ""


class _Added(msgspec.Struct, frozen=True, tag="added"):
    number: int
    turn: StoredTurn


class _Gone(msgspec.Struct, frozen=True, tag="gone"):
    number: int


_MOST_TURNS = OUTBOX_TURNS + OUTBOX_REFUSED_KEPT
_decoder = msgspec.msgpack.Decoder(_Added | _Gone)


class Journal:
    """Synchronous: call it from a thread. One process at a time has the file."""

    def __init__(self, path: Path) -> None:
        """Raises InvalidArgument where the file cannot be written or another edge has it."""
        self.path = path
        self._live: dict[int, StoredTurn] = {}
        self._next = 1
        self._size = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = (path.parent / f"{path.name}.lock").open("ab")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read()
            self._file = self._rewrite()
        except BlockingIOError as error:
            raise InvalidArgument(
                f"Another edge node uses the outbox {path}.", hint="Give each its own --outbox."
            ) from error
        except OSError as error:
            raise InvalidArgument(
                f"The outbox {path} cannot be used: {error.strerror}.",
                hint="Choose another --outbox file.",
            ) from error

    @property
    def turns(self) -> list[tuple[int, StoredTurn]]:
        """What was added and is not gone, in order, each with its number."""
        return list(self._live.items())

    def add(self, turn: StoredTurn) -> int:
        """Returns the turn's number once it is on the disk. Raises OSError."""
        number = self._next
        self._append(self._file, _Added(number, turn))
        self._next += 1
        self._live[number] = turn
        return number

    def replace(self, number: int, turn: StoredTurn) -> None:
        """The turn of that number is `turn` from now on. Raises OSError."""
        self._append(self._file, _Added(number, turn))
        self._live[number] = turn

    def remove(self, number: int) -> None:
        """Raises OSError."""
        if self._live.pop(number, None) is None:
            return
        self._append(self._file, _Gone(number))
        if self._size > OUTBOX_REWRITE_BYTES or not self._live:
            old, self._file = self._file, self._rewrite()
            old.close()

    def close(self) -> None:
        self._file.close()
        self._lock.close()

    # -- inside --------------------------------------------------------------------------------

    def _append(self, file: BinaryIO, record: _Added | _Gone, *, sync: bool = True) -> None:
        payload = msgspec.msgpack.encode(record)
        if len(payload) > MAX_OUTBOX_RECORD_BYTES:
            raise OSError(0, f"a turn of {len(payload)} bytes is beyond the outbox's limit")
        file.write(_RECORD.pack(len(payload), zlib.crc32(payload)) + payload)
        file.flush()
        if sync:
            os.fsync(file.fileno())
        self._size += _RECORD.size + len(payload)

    def _read(self) -> None:
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return
        problem = self._parse(data)
        if problem:
            kept = self.path.with_name(f"{self.path.name}.damaged")
            log.error("outbox_damaged", file=str(self.path), kept=str(kept), problem=problem)
            with _private(kept) as file:
                file.write(data)

    def _parse(self, data: bytes) -> str:
        """Take the records in; says what was wrong with the first that could not be read."""
        if not data:
            return ""
        if len(data) < _HEADER.size or _HEADER.unpack_from(data) != (_MAGIC, _VERSION):
            return "this is no outbox of this version"
        at = _HEADER.size
        while at < len(data):
            if at + _RECORD.size > len(data):
                return ""  # torn: its turn was never acknowledged
            length, crc = _RECORD.unpack_from(data, at)
            if length > MAX_OUTBOX_RECORD_BYTES:
                return f"a record of {length} bytes at {at}"
            payload = data[at + _RECORD.size : at + _RECORD.size + length]
            if len(payload) < length:
                return ""
            at += _RECORD.size + length
            if zlib.crc32(payload) != crc:
                return "" if at >= len(data) else f"a wrong checksum before {at}"
            try:
                self._take(_decoder.decode(payload))
            except UNREADABLE as error:
                return f"an unreadable record before {at}: {error}"
        return ""

    def _take(self, record: _Added | _Gone) -> None:
        self._next = max(self._next, record.number + 1)
        if isinstance(record, _Gone):
            self._live.pop(record.number, None)
        elif record.number in self._live or len(self._live) < _MOST_TURNS:
            self._live[record.number] = record.turn

    def _rewrite(self) -> BinaryIO:
        """A new file with what is alive, in place of the old one at once or not at all."""
        fresh = self.path.with_name(f"{self.path.name}.new")
        file = _private(fresh)
        file.write(_HEADER.pack(_MAGIC, _VERSION))
        self._size = _HEADER.size
        for number, turn in self._live.items():
            self._append(file, _Added(number, turn), sync=False)
        file.flush()
        os.fsync(file.fileno())
        fresh.replace(self.path)
        directory = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        return file


def _private(path: Path) -> BinaryIO:
    """A new file in place of any there: what was said, and the tokens it was said with, are for
    this user alone. Raises OSError."""
    path.unlink(missing_ok=True)
    path.touch(mode=0o600, exist_ok=False)
    return path.open("wb")
