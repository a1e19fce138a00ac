"""Whatever a peer sends becomes the blocks it meant, or a KvError: nothing partial or wrong."""

from __future__ import annotations

import contextlib
import itertools
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segue_contract.errors import (
    BadBlock,
    BadChecksum,
    BadLength,
    BadMagic,
    BadRecipe,
    BadVersion,
    KvError,
    Truncated,
)
from segue_contract.kv.assembler import Assembler, decode_encoded
from segue_contract.kv.frame import HEADER_BYTES, FrameWriter, encode_frames, read_header
from segue_contract.kv.layout import BLOCK_TOKENS, KvBlock, KvGeometry
from segue_contract.kv.quantize import decode_block, encode_block
from segue_contract.kv.steps import STEPS, codec_named
from segue_contract.limits import MAX_OPEN_BLOCKS

TINY = KvGeometry(layers=3, kv_heads=1, head_dim=2)
RECIPE = "5e" * 16
ONE_LAYER_EACH = 1  # a frame size that forces one layer to a frame


def block(number: int, geometry: KvGeometry = TINY, recipe: str = RECIPE) -> KvBlock:
    random = np.random.default_rng(number)
    shape = (geometry.layers, geometry.kv_heads, BLOCK_TOKENS, geometry.head_dim)
    k, v = (random.standard_normal(shape).astype(np.float32) for _ in range(2))
    return KvBlock(bytes([number]) * 16, recipe, k, v)


def assembler(*numbers: int, geometry: KvGeometry = TINY) -> Assembler:
    return Assembler(geometry, frozenset([RECIPE]), [bytes([n]) * 16 for n in numbers])


def expected(sent: KvBlock, step: str = "k8v8") -> tuple[bytes, bytes, bytes]:
    back = decode_block(encode_block(sent, step), TINY, step)
    return sent.id, back.k.tobytes(), back.v.tobytes()


def facts(got: list[KvBlock]) -> list[tuple[bytes, bytes, bytes]]:
    return [(one.id, one.k.tobytes(), one.v.tobytes()) for one in got]


def frames_of(sent: KvBlock, **options: int) -> list[bytes]:
    """The frames of a block one by one, the commit record last."""
    data = encode_frames(sent, **options)
    frames = []
    while data:
        header = read_header(data)
        size = HEADER_BYTES + (header.payload_bytes if header.kind == 1 else 0)
        frames.append(data[:size])
        data = data[size:]
    return frames


def take_all(machine: Assembler, stream: bytes | bytearray, into: list[KvBlock]) -> None:
    into += machine.feed(stream)
    machine.close()


def resealed(frame: bytes, offset: int, value: bytes) -> bytes:
    """The frame with some header bytes replaced and the header's CRC made right again."""
    head = bytearray(frame[:HEADER_BYTES])
    head[offset : offset + len(value)] = value
    head[-4:] = struct.pack("<I", zlib.crc32(head[:-4]))
    return bytes(head) + frame[HEADER_BYTES:]


@settings(max_examples=80, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 6000), max_size=30),
    frame_bytes=st.sampled_from([ONE_LAYER_EACH, 1100, 1 << 20]),
    step=st.sampled_from(["k8v8", "k8v4", "k4v4"]),
)
def test_any_split_gives_the_same_blocks(cuts: list[int], frame_bytes: int, step: str) -> None:
    sent = [block(n) for n in (1, 2, 3)]
    stream = b"".join(encode_frames(one, step, frame_bytes=frame_bytes) for one in sent)
    edges = sorted({0, len(stream), *(cut % len(stream) for cut in cuts)})
    machine = assembler(1, 2, 3)
    got: list[KvBlock] = []
    for start, stop in itertools.pairwise(edges):
        got += machine.feed(stream[start:stop])
        machine.check_integrity()
    machine.close()
    assert facts(got) == [expected(one, step) for one in sent]
    assert machine.received_bytes == len(stream)


def test_byte_by_byte() -> None:
    stream = encode_frames(block(1), frame_bytes=ONE_LAYER_EACH)
    machine = assembler(1)
    got = [one for byte in stream for one in machine.feed(bytes([byte]))]
    machine.close()
    assert facts(got) == [expected(block(1))]


@settings(max_examples=40, deadline=None)
@given(order=st.permutations(range(6)))
def test_layers_of_open_blocks_come_in_any_order(order: list[int]) -> None:
    one, two = (frames_of(block(n), frame_bytes=ONE_LAYER_EACH) for n in (1, 2))
    data = [*one[:-1], *two[:-1]]
    machine = assembler(1, 2)
    got = machine.feed(b"".join(data[n] for n in order) + two[-1] + one[-1])
    machine.close()
    assert facts(got) == [expected(block(2)), expected(block(1))]


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("step", list(STEPS))
def test_every_byte_flipped_raises_and_never_gives_a_wrong_block(step: str, sinks: int) -> None:
    stream = encode_frames(block(1), step, frame_bytes=700, sink_tokens=sinks)
    assert len(assembler(1).feed(stream)) == 1
    for place in range(len(stream)):
        for flip in (0x01, 0x80, 0xFF):
            bad = bytearray(stream)
            bad[place] ^= flip
            machine = assembler(1)
            got: list[KvBlock] = []
            with pytest.raises(KvError):
                take_all(machine, bad, got)
            assert got == [], f"a block in spite of byte {place}"
            machine.check_integrity()


def test_truncated_anywhere_is_truncated() -> None:
    stream = encode_frames(block(1), frame_bytes=ONE_LAYER_EACH)
    for size in range(1, len(stream)):
        machine = assembler(1)
        assert machine.feed(stream[:size]) == []
        with pytest.raises(Truncated):
            machine.close()
    empty = assembler(1)
    empty.close()
    with pytest.raises(BadBlock, match="closed"):
        empty.feed(stream)


@settings(max_examples=200, deadline=None)
@given(noise=st.binary(max_size=400), at=st.integers(0, 2000), whole=st.booleans())
def test_noise_in_a_stream_gives_blocks_or_errors(noise: bytes, at: int, whole: bool) -> None:
    stream = encode_frames(block(1)) if whole else b""
    at = min(at, len(stream))
    machine = assembler(1)
    got: list[KvBlock] = []
    with contextlib.suppress(KvError):
        take_all(machine, stream[:at] + noise + stream[at:], got)
    machine.check_integrity()
    assert facts(got) in ([], [expected(block(1))])


def test_whole_blocks_before_a_fault_are_given_and_then_all_is_refused() -> None:
    machine = assembler(1, 2)
    got = machine.feed(encode_frames(block(1)) + b"X" * HEADER_BYTES)
    assert facts(got) == [expected(block(1))]
    assert isinstance(machine.failure, BadMagic)
    for _ in range(2):
        with pytest.raises(BadMagic):
            machine.feed(encode_frames(block(2)))
        with pytest.raises(BadMagic):
            machine.close()


DATA, COMMIT = frames_of(block(1))[0], frames_of(block(1))[-1]
FIRST, SECOND, THIRD, END = frames_of(block(1), frame_bytes=ONE_LAYER_EACH)
OTHER_RECIPE = encode_frames(block(1, recipe="00" * 16))


@pytest.mark.parametrize(
    ("stream", "error"),
    [
        pytest.param(b"HTTP" + DATA[4:], BadMagic, id="magic"),
        pytest.param(resealed(DATA, 4, b"\x02"), BadVersion, id="version"),
        pytest.param(resealed(DATA, 5, b"\x03"), BadBlock, id="kind"),
        pytest.param(resealed(DATA, 6, b"\x63"), BadVersion, id="step"),
        pytest.param(resealed(DATA, 7, b"\xff"), BadBlock, id="sink"),
        pytest.param(resealed(DATA, 7, b"\x01"), BadLength, id="sink and length"),
        pytest.param(resealed(DATA, 8, b"\x00\x00"), BadBlock, id="no layers"),
        pytest.param(resealed(DATA, 8, b"\xff\xff"), BadBlock, id="layers"),
        pytest.param(resealed(DATA, 12, b"\x04\x00"), BadLength, id="head_dim and length"),
        pytest.param(resealed(DATA, 14, b"\x03\x00"), BadBlock, id="empty range"),
        pytest.param(resealed(DATA, 16, b"\x02\x00"), BadLength, id="range and length"),
        pytest.param(resealed(DATA, 18, b"\x01\x00"), BadBlock, id="reserved"),
        pytest.param(resealed(DATA, 20, b"\x09"), BadBlock, id="block id"),
        pytest.param(resealed(DATA, 36, b"\x00"), BadRecipe, id="recipe"),
        pytest.param(resealed(DATA, 52, b"\xff\xff\xff\xff"), BadLength, id="length"),
        pytest.param(resealed(DATA, 52, b"\x00\x00\x00\x00"), BadLength, id="zero length"),
        pytest.param(resealed(DATA, 56, b"\x00\x00\x00\x00"), BadChecksum, id="payload crc"),
        pytest.param(DATA[:60] + bytes(4) + DATA[64:], BadChecksum, id="header crc"),
        pytest.param(OTHER_RECIPE, BadRecipe, id="other recipe"),
        pytest.param(COMMIT, BadBlock, id="commit of nothing"),
        pytest.param(FIRST + THIRD + END, BadBlock, id="commit without a layer"),
        pytest.param(FIRST + SECOND + SECOND, BadBlock, id="a layer twice"),
        pytest.param(FIRST + DATA, BadBlock, id="overlapping layers"),
        pytest.param(DATA + END, BadChecksum, id="commit of other frames"),
        pytest.param(DATA + resealed(COMMIT, 16, b"\x02\x00"), BadBlock, id="partial commit"),
        pytest.param(DATA + COMMIT + DATA, BadBlock, id="block twice"),
        pytest.param(
            FIRST + frames_of(block(1), frame_bytes=ONE_LAYER_EACH, sink_tokens=1)[1],
            BadBlock,
            id="frames that disagree",
        ),
    ],
)
def test_a_peer_that_lies_gets_the_error_that_says_so(stream: bytes, error: type[KvError]) -> None:
    machine = assembler(1)
    with pytest.raises(error) as caught:
        take_all(machine, stream, [])
    assert caught.type is error
    assert caught.value.message
    machine.check_integrity()


def test_another_geometry_is_refused() -> None:
    other = KvGeometry(layers=3, kv_heads=1, head_dim=4)
    with pytest.raises(BadBlock, match="this model has"):
        assembler(1).feed(encode_frames(block(1, other)))


def test_open_blocks_are_bounded() -> None:
    machine = assembler(*range(10))
    for n in range(MAX_OPEN_BLOCKS):
        machine.feed(frames_of(block(n))[0])
    machine.check_integrity()
    with pytest.raises(BadBlock, match="without a commit"):
        machine.feed(frames_of(block(9))[0])
    machine.check_integrity()


def test_a_recipe_stands_for_its_step() -> None:
    by_step = {RECIPE: "k8v8"}
    assert len(Assembler(TINY, by_step).feed(encode_frames(block(1)))) == 1
    with pytest.raises(BadRecipe):
        Assembler(TINY, by_step).feed(encode_frames(block(1), "k4v4"))


def test_sinks_come_only_where_the_recipe_has_them() -> None:
    by_codec = {RECIPE: "k4v4-sink4"}
    for sinks in (0, 4):  # the first block of a prompt has them, the others not
        stream = encode_frames(block(1), "k4v4", sink_tokens=sinks)
        assert len(Assembler(TINY, by_codec).feed(stream)) == 1
    for step, sinks in (("k4v4", 2), ("k8v8", 4)):
        with pytest.raises(BadRecipe):
            Assembler(TINY, by_codec).feed(encode_frames(block(1), step, sink_tokens=sinks))
    assert codec_named("k4v4-sink4").sinks_of(0) == 4
    assert codec_named("k4v4-sink4").sinks_of(1) == 0
    for name in ("k4v4-sink0", "k4v4-sink9", "k4v4-sink", "k4v4-sink4x", "k2v2-sink4", "k4v4-"):
        with pytest.raises(BadVersion):
            codec_named(name)


def test_a_scale_out_of_range_behind_right_checksums_breaks_the_stream() -> None:
    payload = bytearray(DATA[HEADER_BYTES:])
    payload[0:2] = b"\xff\x7f"  # NaN
    crc = struct.pack("<I", zlib.crc32(payload))
    data = resealed(DATA[:HEADER_BYTES] + payload, 56, crc)
    commit = resealed(COMMIT, 56, struct.pack("<I", zlib.crc32(crc)))
    machine = assembler(1)
    with pytest.raises(BadBlock, match="scale"):
        machine.feed(data + commit)
    with pytest.raises(BadBlock, match="scale"):
        machine.close()


def test_decoding_can_wait() -> None:
    sent = block(1)
    stream = encode_frames(sent, frame_bytes=ONE_LAYER_EACH, sink_tokens=2)
    (encoded,) = assembler(1).feed_encoded(stream)
    assert encoded.wire_bytes == len(stream)
    back = decode_encoded(encoded, np.float16)
    assert back.k.dtype == np.float16
    assert np.allclose(back.k, sent.k, atol=0.05)
    assert (back.k[:, :, :2] == sent.k[:, :, :2].astype(np.float16)).all()


def test_a_writer_checks_what_it_is_given() -> None:
    with pytest.raises(BadBlock):
        FrameWriter(b"short", RECIPE, TINY)
    with pytest.raises(BadRecipe):
        FrameWriter(bytes(16), "no digest", TINY)
    with pytest.raises(BadVersion):
        FrameWriter(bytes(16), RECIPE, TINY, "k1v1")
    with pytest.raises(BadBlock):
        FrameWriter(bytes(16), RECIPE, KvGeometry(layers=256, kv_heads=256, head_dim=512))
