"""Token ids to text, one at a time: byte-level BPE, UTF-8 characters only when they are whole."""

from __future__ import annotations

import codecs
from collections.abc import Callable


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte (`bytes_to_unicode` in its encoder.py), inverted."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(others)}


class Detokenizer:
    """Text of one reply. Constant time and at most three held bytes, whatever the reply's length.

    Joined, the results of `push` and the final `flush` are the text of all tokens; bytes that are
    no UTF-8 become U+FFFD.
    """

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that `token` completed; empty while a character is unfinished."""
        return self._decoder.decode(self._bytes_of(token))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character."""
        text = self._decoder.decode(b"", True)
        self._decoder.reset()
        return text
