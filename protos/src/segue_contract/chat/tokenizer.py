"""A session's turns to prompt token ids, and reply token ids back to text."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer

from segue_contract.chat.detokenizer import Detokenizer, byte_alphabet
from segue_contract.chat.template import ChatTemplate, Message
from segue_contract.errors import InvalidArgument, ModelMismatch, ModelMissing

_CACHED_TEXTS = 1024  # literals of the template and recent messages, tokenised once
_CACHED_CHARS = 4096  # longer ones are not kept


class Turn(Protocol):
    """The part of `segue_contract.sync.state.TurnState` that matters here."""

    @property
    def prompt(self) -> str: ...
    @property
    def tokens(self) -> Sequence[int]: ...
    @property
    def text(self) -> str: ...


class Sizes(Protocol):
    """The part of `segue_contract.model.manifest.Manifest` that matters here."""

    @property
    def end_tokens(self) -> tuple[int, ...]: ...
    @property
    def bos_token(self) -> str: ...
    @property
    def eos_token(self) -> str: ...


class ChatTokenizer:
    """Thread-safe after construction; everything it keeps is bounded.

    Literals of the chat template are tokenised with special tokens, contents without: a user who
    types `<|im_end|>` sends those characters, not that token.
    """

    def __init__(self, tokenizer: str, template: ChatTemplate, end_tokens: Sequence[int]) -> None:
        """`tokenizer` is the JSON of Hugging Face's tokenizers format, byte-level BPE.

        Raises:
            ModelMismatch: it cannot be read, or is of another kind.
        """
        self._template = template
        self._ends = frozenset(end_tokens)
        try:
            parsed = json.loads(tokenizer)
            self._with_specials = Tokenizer.from_str(tokenizer)
            self._plain = Tokenizer.from_str(json.dumps(without_added_tokens(parsed)))
        except Exception as error:  # the Rust side raises bare Exceptions
            raise ModelMismatch(
                f"tokenizer.json cannot be read: {error}.", hint="Build the model again."
            ) from error
        if not is_byte_level(parsed):
            raise ModelMismatch(
                "The model's tokenizer is no byte-level BPE.", hint="Use another model."
            )
        self._added = {
            int(entry["id"]): b"" if entry.get("special") else str(entry["content"]).encode()
            for entry in parsed.get("added_tokens", [])
        }
        self._alphabet = byte_alphabet()
        self._bytes: dict[int, bytes] = dict(self._added)
        self._encode_short = functools.lru_cache(_CACHED_TEXTS)(self._encode)

    @classmethod
    def load(
        cls, directory: Path, manifest: Sizes, *, clock: Callable[[], datetime] = datetime.now
    ) -> ChatTokenizer:
        """Read `tokenizer.json` and `chat_template.jinja` of a built model.

        Raises:
            ModelMissing, ModelError: a file is missing or unusable.
        """
        try:
            tokenizer = (directory / "tokenizer.json").read_text(encoding="utf-8")
            source = (directory / "chat_template.jinja").read_text(encoding="utf-8")
        except OSError as error:
            raise ModelMissing(
                f"{error.filename} cannot be read: {error.strerror}.",
                hint="Build the model again.",
            ) from error
        template = ChatTemplate(
            source, bos_token=manifest.bos_token, eos_token=manifest.eos_token, clock=clock
        )
        return cls(tokenizer, template, manifest.end_tokens)

    @property
    def vocab(self) -> int:
        return int(self._with_specials.get_vocab_size(with_added_tokens=True))

    def encode_conversation(
        self, turns: Sequence[Turn], prompt: str, *, system: str = ""
    ) -> list[int]:
        """Prompt of the next reply: the chat so far, the user's `prompt`, the generation prompt.

        The recorded tokens of earlier replies go in as they are wherever they still spell the
        recorded text, so a conversation's prompt begins with exactly what was computed before. A
        turn without a reply (stopped or failed at once) leaves its question, joined with the next.

        Raises:
            InvalidArgument: a text with lone surrogates, which no tokenizer can take.
            ModelError: the template refuses the conversation.
        """
        contents: list[tuple[str, Sequence[int] | None]] = []
        messages: list[Message] = []

        def add(text: str, tokens: Sequence[int] | None = None) -> int:
            contents.append((text, tokens))
            return len(contents) - 1

        if system:
            messages.append(Message("system", (add(system),)))
        questions: list[int] = []
        for turn in turns:
            questions.append(add(turn.prompt))
            if turn.text:
                messages.append(Message("user", tuple(questions)))
                messages.append(Message("assistant", (add(turn.text, turn.tokens),)))
                questions = []
        messages.append(Message("user", (*questions, add(prompt))))
        ids: list[int] = []
        for piece in self._template.render(messages):
            if piece.content is None:
                ids += self._tokenise(piece.literal, True)
            else:
                text, tokens = contents[piece.content]
                ids += self._reply(text, tokens) if tokens else self._tokenise(text, False)
        return ids

    def encode(self, text: str) -> list[int]:
        """Plain text: names of special tokens in it are text."""
        return list(self._tokenise(text, False))

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of a reply; special tokens have none."""
        return b"".join(map(self.token_bytes, tokens)).decode("utf-8", "replace")

    def detokenizer(self) -> Detokenizer:
        """A fresh one for a reply."""
        return Detokenizer(self.token_bytes)

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for: none for special ones and for ids that do not exist."""
        known = self._bytes.get(token)
        if known is not None:
            return known
        text = self._with_specials.id_to_token(token) if 0 <= token < 1 << 31 else None
        if text is None:
            return b""  # not kept: ids off the wire must not fill the memory
        value = b"".join(
            bytes((self._alphabet[c],)) if c in self._alphabet else c.encode() for c in text
        )
        self._bytes[token] = value
        return value

    def _reply(self, text: str, tokens: Sequence[int]) -> Sequence[int]:
        kept = list(tokens)
        while kept and kept[-1] in self._ends:
            kept.pop()
        return kept if self.decode(kept) == text else self._tokenise(text, False)

    def _tokenise(self, text: str, specials: bool) -> Sequence[int]:
        encode = self._encode_short if len(text) <= _CACHED_CHARS else self._encode
        return encode(text, specials)

    def _encode(self, text: str, specials: bool) -> tuple[int, ...]:
        tokenizer = self._with_specials if specials else self._plain
        try:
            return tuple(tokenizer.encode(text, add_special_tokens=False).ids)
        except (UnicodeEncodeError, TypeError) as error:
            raise InvalidArgument(
                "The text holds characters that are not valid Unicode.",
                hint="Send valid UTF-8 without lone surrogates.",
            ) from error


def without_added_tokens(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer without its added tokens, so that no text can name one."""
    added = {entry["content"] for entry in tokenizer.get("added_tokens", [])}
    model = tokenizer["model"]
    vocab = {text: index for text, index in model["vocab"].items() if text not in added}
    return {**tokenizer, "added_tokens": [], "model": {**model, "vocab": vocab}}


def is_byte_level(tokenizer: dict[str, Any]) -> bool:
    """BPE over GPT-2's byte alphabet: text of any kind encodes, token by token, to bytes."""
    decoder = tokenizer.get("decoder") or {}
    kinds = [decoder.get("type"), *(d.get("type") for d in decoder.get("decoders", []))]
    return tokenizer.get("model", {}).get("type") == "BPE" and "ByteLevel" in kinds
