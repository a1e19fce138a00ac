"""A session as one file.

    file    = magic "SGEX", version u16, zero u16, record*
    record  = kind u8, length u32, CRC-32 u32 of kind, length and payload; payload

All numbers are little-endian. The records come in this order:

    HEAD     once    MessagePack of `ExportHead`
    STATE    0..n    pieces of the folded state (`encode_state`), up to the head's `folded`
    ENTRIES  0..n    offset of the first one u64, then each entry's length u32 and bytes
    END      once    SHA-256 of every byte before this record

The entries are those that the log still has one by one: the first of them may lie before `folded`,
and they follow on one another up to the head's `tail`. Nothing comes after END.

Pure. Bytes from elsewhere give an `Export` or BadExport, nothing else.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from hashlib import sha256
from typing import NoReturn

import msgspec

from segue_contract.errors import UNREADABLE, BadExport, InvalidArgument
from segue_contract.limits import (
    EXPORT_PART_BYTES,
    MAX_COUNT,
    MAX_EXPORT_BYTES,
    MAX_OP_BYTES,
    READ_PAGE_BYTES,
)
from segue_contract.sync.ops import Op, decode_op
from segue_contract.sync.replica import Applied, Replica
from segue_contract.sync.state import SessionState, decode_state

VERSION = 1
_FILE = struct.Struct("<4sHH")
_RECORD = struct.Struct("<BI")
_CRC = struct.Struct("<I")
_FIRST = struct.Struct("<Q")
_LENGTH = struct.Struct("<I")
_MAGIC = b"SGEX"
_HEADER_BYTES = _RECORD.size + _CRC.size
_MAX_RECORD_BYTES = READ_PAGE_BYTES + 2 * MAX_OP_BYTES  # a page, its last op, their lengths


class _Kind(IntEnum):
    HEAD = 1
    STATE = 2
    ENTRIES = 3
    END = 4


class ExportHead(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """`folded`: the offset that the state stands at, 0 where there is none. `at_ms`: when it was
    written, by the writer's clock. `generation`: the log's, so that an import gets a later one."""

    session: str
    generation: int
    folded: int
    tail: int
    title: str = ""
    turns: int = 0
    at_ms: int = 0


@dataclass(frozen=True)
class Export:
    """A file that was found right. `entries` end at the head's `tail`.

    `session` is all of it, folded up to the tail.
    """

    head: ExportHead
    state: SessionState | None
    entries: list[bytes]
    session: SessionState

    @property
    def first(self) -> int:
        """The offset of the first entry; one after the tail where there is none."""
        return self.head.tail - len(self.entries) + 1


class ExportWriter:
    """Makes the file's bytes piece by piece; call the methods in the order of the records."""

    def __init__(self) -> None:
        self._digest = sha256()

    def head(self, head: ExportHead) -> bytes:
        start = _FILE.pack(_MAGIC, VERSION, 0)
        self._digest.update(start)
        return start + self._record(_Kind.HEAD, msgspec.msgpack.encode(head))

    def state(self, data: bytes) -> Iterator[bytes]:
        """`data`: of `encode_state`."""
        for start in range(0, len(data), EXPORT_PART_BYTES):
            yield self._record(_Kind.STATE, data[start : start + EXPORT_PART_BYTES])

    def entries(self, first: int, ops: Sequence[bytes]) -> bytes:
        """A page of entries, the first one at the offset `first`."""
        parts = [_FIRST.pack(first)]
        for op in ops:
            parts += (_LENGTH.pack(len(op)), op)
        return self._record(_Kind.ENTRIES, b"".join(parts))

    def end(self) -> bytes:
        return self._record(_Kind.END, self._digest.digest())

    def _record(self, kind: _Kind, payload: bytes) -> bytes:
        start = _RECORD.pack(kind, len(payload))
        record = start + _CRC.pack(zlib.crc32(payload, zlib.crc32(start))) + payload
        self._digest.update(record)
        return record


class ExportReader:
    """Takes a file's bytes in any pieces; `finish` gives what it says."""

    def __init__(self, max_bytes: int = MAX_EXPORT_BYTES) -> None:
        self._max_bytes = max_bytes
        self._buffer = bytearray()
        self._taken = 0  # bytes of the file before the buffer
        self._digest = sha256()
        self._begun = self._ended = False
        self._last = 0  # kind of the last record
        self._head: ExportHead | None = None
        self._state = bytearray()
        self._first = 0
        self._entries: list[bytes] = []

    def feed(self, data: bytes) -> None:
        """Raises BadExport at the first byte that cannot be right."""
        if self._taken + len(self._buffer) + len(data) > self._max_bytes:
            self._bad(f"it is larger than {self._max_bytes} bytes")
        self._buffer += data
        if not self._begun:
            if len(self._buffer) < _FILE.size:
                return
            self._check_start()
        while len(self._buffer) >= _HEADER_BYTES and self._take_record():
            pass
        if self._ended and self._buffer:
            self._bad("something follows its end")

    def finish(self) -> Export:
        """The whole file was given.

        Raises:
            BadExport: it ends too early, or its parts do not fit one another.
        """
        if self._head is None or not self._ended:
            self._bad("it ends too early")
        head = self._head
        state = None
        if head.folded:
            try:
                state = decode_state(bytes(self._state))
            except InvalidArgument as error:
                raise self._error("its state cannot be read") from error
            if state.cursor.offset != head.folded:
                self._bad("its state stands elsewhere than its head says")
        elif self._state:
            self._bad("it has a state that its head does not know")
        first = self._first if self._entries else head.tail + 1
        if first + len(self._entries) - 1 != head.tail or not 0 < first <= head.folded + 1:
            self._bad("entries are missing")
        return Export(head, state, self._entries, self._fold(head, state, first))

    # -- inside -------------------------------------------------------------------------------

    def _fold(self, head: ExportHead, state: SessionState | None, first: int) -> SessionState:
        replica = Replica()
        if head.folded:
            # Its own copy: what is folded on must not change the state that is kept.
            replica.load(decode_state(bytes(self._state)))
            replica.adopt_generation(head.generation)
        for offset, data in enumerate(self._entries, first):
            try:
                op: Op = decode_op(data)
            except InvalidArgument as error:
                raise self._error(f"its entry {offset} cannot be read") from error
            if offset > head.folded:
                applied = replica.apply_op(head.generation, offset, op)
                assert applied is Applied.APPLIED, applied
        return replica.state

    def _check_start(self) -> None:
        magic, version, zero = _FILE.unpack_from(self._buffer)
        if magic != _MAGIC or zero:
            self._bad("it does not begin as one")
        if version != VERSION:
            self._bad(f"it has the format {version}; this program reads {VERSION}")
        self._begun = True
        self._consume(_FILE.size)

    def _take_record(self) -> bool:
        """False where the record is not whole yet."""
        kind, length = _RECORD.unpack_from(self._buffer)
        if length > _MAX_RECORD_BYTES:
            self._bad("a record's length is over the limit")
        if len(self._buffer) < _HEADER_BYTES + length:
            return False
        (crc,) = _CRC.unpack_from(self._buffer, _RECORD.size)
        payload = bytes(self._buffer[_HEADER_BYTES : _HEADER_BYTES + length])
        if zlib.crc32(payload, zlib.crc32(bytes(self._buffer[: _RECORD.size]))) != crc:
            self._bad("a record's checksum is another one")
        self._take(kind, payload)
        self._consume(_HEADER_BYTES + length)
        return True

    def _take(self, kind: int, payload: bytes) -> None:
        once = kind in (_Kind.HEAD, _Kind.END)
        if self._ended or kind < self._last or (once and kind == self._last):
            self._bad("its records are out of order")
        if not self._last and kind != _Kind.HEAD:
            self._bad("it has no head")
        self._last = kind
        match kind:
            case _Kind.HEAD:
                self._head = self._read_head(payload)
            case _Kind.STATE:
                self._state += payload
            case _Kind.ENTRIES:
                self._take_entries(payload)
            case _Kind.END:
                if payload != self._digest.digest():
                    self._bad("its SHA-256 is another one")
                self._ended = True
            case _:
                self._bad(f"it has a record of the unknown kind {kind}")

    def _read_head(self, payload: bytes) -> ExportHead:
        try:
            head = msgspec.msgpack.decode(payload, type=ExportHead)
        except UNREADABLE as error:
            raise self._error("its head cannot be read") from error
        numbers = (head.generation, head.folded, head.tail, head.turns, head.at_ms)
        if not all(0 <= number <= MAX_COUNT for number in numbers) or head.folded > head.tail:
            self._bad("its head's numbers are out of range")
        return head

    def _take_entries(self, payload: bytes) -> None:
        if len(payload) < _FIRST.size:
            self._bad("a page of entries is too short")
        (first,) = _FIRST.unpack_from(payload)
        if not self._entries:
            self._first = first
        elif first != self._first + len(self._entries):
            self._bad("entries are missing")
        at = _FIRST.size
        while at < len(payload):
            if at + _LENGTH.size > len(payload):
                self._bad("a page of entries is too short")
            (length,) = _LENGTH.unpack_from(payload, at)
            at += _LENGTH.size
            if length > min(MAX_OP_BYTES, len(payload) - at):
                self._bad("an entry's length is over the limit")
            self._entries.append(payload[at : at + length])
            at += length

    def _consume(self, size: int) -> None:
        if not self._ended:
            self._digest.update(self._buffer[:size])
        del self._buffer[:size]
        self._taken += size

    def _error(self, what: str) -> BadExport:
        return BadExport(
            f"This is no whole export of a session: {what} (near byte {self._taken}).",
            hint="Export the session again, or copy the file again.",
            byte=self._taken,
        )

    def _bad(self, what: str) -> NoReturn:
        raise self._error(what)


def read_export(chunks: Iterable[bytes]) -> Export:
    """The export in `chunks`. Raises BadExport."""
    reader = ExportReader()
    for chunk in chunks:
        reader.feed(chunk)
    return reader.finish()
