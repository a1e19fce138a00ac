"""MQTT topics: `segue/v1/{tenant}/{session}/...`."""

from __future__ import annotations

import msgspec

from segue_contract.errors import UNREADABLE, InvalidArgument
from segue_contract.ids import SessionName
from segue_contract.sync.state import Cursor

ROOT = "segue/v1"
BROKER_KEY = "segue:broker"  # of the store: a hash with the `url` of its clouds' broker


def log_topic(name: SessionName) -> str:
    """Live log entries, QoS 1, payload `encode_log_message`."""
    return f"{ROOT}/{name.tenant}/{name.session}/log"


def head_topic(name: SessionName) -> str:
    """Retained: the log's tail as `encode_head`; an empty payload clears it."""
    return f"{ROOT}/{name.tenant}/{name.session}/head"


class LogMessage(msgspec.Struct, frozen=True, array_like=True):
    """Consecutive entries: `ops[i]` has offset `first_offset + i`."""

    generation: int
    first_offset: int
    ops: list[bytes]


_log_decoder = msgspec.msgpack.Decoder(LogMessage)
_head_decoder = msgspec.msgpack.Decoder(tuple[int, int])


def encode_log_message(generation: int, first_offset: int, ops: list[bytes]) -> bytes:
    return msgspec.msgpack.encode(LogMessage(generation, first_offset, ops))


def decode_log_message(payload: bytes) -> LogMessage:
    """Raises InvalidArgument where the payload is no log message."""
    try:
        return _log_decoder.decode(payload)
    except UNREADABLE as error:
        raise InvalidArgument(f"This payload is no log message: {error}.") from error


def encode_head(cursor: Cursor) -> bytes:
    return msgspec.msgpack.encode((cursor.generation, cursor.offset))


def decode_head(payload: bytes) -> Cursor:
    """Raises InvalidArgument where the payload is no head."""
    try:
        return Cursor(*_head_decoder.decode(payload))
    except UNREADABLE as error:
        raise InvalidArgument(f"This payload is no head: {error}.") from error
