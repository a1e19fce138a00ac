"""The file of an exported session: it comes back whole, or as a typed error."""

from __future__ import annotations

import zlib
from hashlib import sha256

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segue_contract.errors import BadExport
from segue_contract.sync.export import ExportHead, ExportReader, ExportWriter, read_export
from segue_contract.sync.ops import Frame, Set, TurnEnded, TurnStarted, UserMessage, encode_op
from segue_contract.sync.replica import Replica
from segue_contract.sync.state import Cursor, SessionState, encode_state

GENERATION = 1_700_000_000_000


def _ops() -> list[bytes]:
    return [
        encode_op(UserMessage(id="t1.user", device="phone", turn="t1", text="Hi, ü!")),
        encode_op(TurnStarted(id="t1.started", turn="t1", epoch=1, max_tokens=4)),
        encode_op(
            Frame(id="f", turn="t1", epoch=1, index=0, tokens=(7, 8), pieces=("Good", " day"))
        ),
        encode_op(TurnEnded(id="e", turn="t1", epoch=1, reason="stop")),
        encode_op(Set(id="s1", device="phone", name="theme", value=b"dark")),
        encode_op(Set(id="s2", device="phone", name="theme", value=b"light")),
    ]


def _fold(ops: list[bytes]) -> SessionState:
    replica = Replica()
    for offset, op in enumerate(ops, 1):
        replica.apply_op(GENERATION, offset, op)
    return replica.state


def _file(folded: int, first: int, *, page: int = 2, head: ExportHead | None = None) -> bytes:
    ops = _ops()
    writer = ExportWriter()
    head = head or ExportHead(
        session="trip", generation=GENERATION, folded=folded, tail=len(ops), title="Hi", turns=1
    )
    parts = [writer.head(head)]
    if folded:
        parts += writer.state(encode_state(_fold(ops[:folded])))
    for start in range(first, len(ops) + 1, page):
        parts.append(writer.entries(start, ops[start - 1 : start - 1 + page]))
    return b"".join([*parts, writer.end()])


@given(
    folded=st.integers(0, 6), kept=st.integers(0, 6), page=st.integers(1, 6), cut=st.integers(1, 64)
)
def test_what_was_written_is_read(folded: int, kept: int, page: int, cut: int) -> None:
    first = max(folded - kept, 0) + 1
    data = _file(folded, first, page=page)
    found = read_export(data[at : at + cut] for at in range(0, len(data), cut))
    assert found.first == first
    assert found.entries == _ops()[first - 1 :]
    assert (found.state.cursor.offset if found.state is not None else 0) == folded
    found.session.cursor = Cursor(GENERATION, found.session.cursor.offset)
    assert found.session == _fold(_ops())


@pytest.mark.parametrize(("folded", "first"), [(0, 1), (4, 3), (6, 7)])
def test_any_flipped_bit_and_any_cut_is_a_typed_error(folded: int, first: int) -> None:
    data = _file(folded, first)
    for place in range(len(data)):
        with pytest.raises(BadExport):
            read_export([data[:place]])
        for bit in range(8):
            bad = bytearray(data)
            bad[place] ^= 1 << bit
            with pytest.raises(BadExport):
                read_export([bytes(bad)])
    with pytest.raises(BadExport):
        read_export([data, b"\0"])


@given(data=st.binary(max_size=200))
def test_any_bytes_are_a_typed_error(data: bytes) -> None:
    with pytest.raises(BadExport):
        read_export([data])
    with pytest.raises(BadExport):
        read_export([b"SGEX\1\0\0\0", data])


def _sealed(*records: tuple[int, bytes]) -> bytes:
    """Right checksums over whatever content."""
    data = b"SGEX\1\0\0\0"
    for kind, payload in records:
        start = bytes([kind]) + len(payload).to_bytes(4, "little")
        data += start + zlib.crc32(start + payload).to_bytes(4, "little") + payload
    start = b"\4" + (32).to_bytes(4, "little")
    digest = sha256(data).digest()
    return data + start + zlib.crc32(start + digest).to_bytes(4, "little") + digest


@given(
    records=st.lists(
        st.tuples(
            st.integers(0, 5),
            st.one_of(
                st.binary(max_size=40),
                st.sampled_from([encode_state(SessionState()), encode_state(_fold(_ops()))]),
                st.builds(
                    lambda folded, tail: msgspec.msgpack.encode(
                        ExportHead(session="s", generation=1, folded=folded, tail=tail)
                    ),
                    st.integers(-1, 7),
                    st.integers(-1, 7),
                ),
                st.builds(
                    lambda first, ops: (
                        first.to_bytes(8, "little")
                        + b"".join(len(op).to_bytes(4, "little") + op for op in ops)
                    ),
                    st.integers(0, 8),
                    st.lists(st.sampled_from([*_ops(), b"", b"\xc1"]), max_size=7),
                ),
            ),
        ),
        max_size=4,
    )
)
def test_right_checksums_over_wrong_content_are_an_export_or_a_typed_error(
    records: list[tuple[int, bytes]],
) -> None:
    try:
        found = read_export([_sealed(*records)])
    except BadExport:
        return
    assert found.session.cursor.offset == found.head.tail
    assert found.first + len(found.entries) - 1 == found.head.tail


def test_a_longer_file_than_any_session_is_refused() -> None:
    data = _file(0, 1)
    with pytest.raises(BadExport, match="larger"):
        ExportReader(max_bytes=len(data) - 1).feed(data)
    ExportReader(max_bytes=len(data)).feed(data)
