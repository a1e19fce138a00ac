"""MQTT topics, `segue/v1/{tenant}/{session}/...`, and what is published there.

A payload is a tag and a body. The tag authenticates topic and body under a key that the clouds and
the session's devices have: a broker, and whoever else may publish there, can make no entry.
"""

from __future__ import annotations

import functools
import hmac

import msgspec

from segue_contract.errors import UNREADABLE, InvalidArgument
from segue_contract.ids import SessionName
from segue_contract.sync.state import Cursor

ROOT = "segue/v1"
BROKER_KEY = "segue:broker"  # of the store: a hash with the `url` of its clouds' broker


_KEYS = 1024  # sessions whose messages come one after another
TAG_BYTES = 16  # of HMAC-SHA256, as RFC 2104 section 5 allows: 128 bits cannot be guessed


def live_key(secret: bytes, name: SessionName, generation: int) -> bytes:
    """32 bytes: the key of what is published of a session in one generation of its log.

    Derived from the `secret` of a store's clouds by HMAC-SHA256, so that all of them agree; a
    session that is made anew under an old name has another one.
    """
    what = msgspec.msgpack.encode(("live", name.tenant, name.session, generation))
    return hmac.digest(secret, what, "sha256")


def seal(key: bytes, topic: str, body: bytes) -> bytes:
    """The payload that says `body` on `topic`."""
    return _tag(key, topic, body) + body


def unseal(key: bytes, topic: str, payload: bytes) -> bytes:
    """The body. Raises InvalidArgument where nobody sealed it with `key` for `topic`."""
    tag, body = payload[:TAG_BYTES], payload[TAG_BYTES:]
    if not key or not hmac.compare_digest(tag, _tag(key, topic, body)):
        raise InvalidArgument("This payload is not authentic.")
    return body


def _tag(key: bytes, topic: str, body: bytes) -> bytes:
    # a topic has no zero byte, so topic and body cannot be divided otherwise
    mac = _keyed(key).copy()
    mac.update(b"%b\0%b" % (topic.encode(), body))
    return mac.digest()[:TAG_BYTES]


@functools.lru_cache(maxsize=_KEYS)
def _keyed(key: bytes) -> hmac.HMAC:
    """To copy it takes less than half of the time that a new one does."""
    return hmac.new(key, digestmod="sha256")


def log_topic(name: SessionName) -> str:
    """Live log entries, QoS 1, body `encode_log_message`."""
    return f"{ROOT}/{name.tenant}/{name.session}/log"


def head_topic(name: SessionName) -> str:
    """Retained: the log's tail, body `encode_head`; an empty payload clears it."""
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


def decode_log_message(body: bytes) -> LogMessage:
    """Raises InvalidArgument where the body is no log message."""
    try:
        return _log_decoder.decode(body)
    except UNREADABLE as error:
        raise InvalidArgument(f"This payload is no log message: {error}.") from error


def encode_head(cursor: Cursor) -> bytes:
    return msgspec.msgpack.encode((cursor.generation, cursor.offset))


def decode_head(body: bytes) -> Cursor:
    """Raises InvalidArgument where the body is no head."""
    try:
        return Cursor(*_head_decoder.decode(body))
    except UNREADABLE as error:
        raise InvalidArgument(f"This payload is no head: {error}.") from error
