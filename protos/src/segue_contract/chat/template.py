"""Chat templates in a sandbox, rendered around sentinels instead of around what people wrote.

A template never sees a message's content: it sees a marker of private-use characters in its place.
So the rendered text splits into literals, which the model's author wrote and which may hold special
tokens, and contents, which anybody wrote and which must not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from segue_contract.errors import ModelError

# Unicode private use: no template writes them. Contents may, for contents are never rendered.
_OPEN, _CLOSE = "\ue000", "\ue001"
_SENTINEL = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")


@dataclass(frozen=True)
class Message:
    """A message. `parts`: indices of its contents; several are joined by an empty line."""

    role: str
    parts: tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """A stretch of the rendered chat: the template's own text, or the content of that index."""

    literal: str = ""
    content: int | None = None


class ChatTemplate:
    """A compiled Jinja template, as Hugging Face's tokenizers carry it.

    Raises:
        ModelError: the template cannot be compiled or fails while rendering.
    """

    def __init__(
        self,
        source: str,
        *,
        bos_token: str = "",
        eos_token: str = "",
        clock: Callable[[], datetime] = datetime.now,
    ) -> None:
        self._specials = {"bos_token": bos_token, "eos_token": eos_token}
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: clock().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ModelError(
                f"The chat template cannot be compiled: {error}.", hint="Build the model again."
            ) from error

    def render(self, messages: Sequence[Message]) -> list[Piece]:
        """The chat with a generation prompt at its end, as pieces in order."""
        values = [
            {"role": m.role, "content": "\n\n".join(f"{_OPEN}{i}{_CLOSE}" for i in m.parts)}
            for m in messages
        ]
        try:
            text = self._template.render(
                messages=values, add_generation_prompt=True, tools=None, **self._specials
            )
        except Exception as error:  # a template may fail in any way that Python code may
            raise ModelError(
                f"The model's chat template refuses this conversation: {error}.",
                hint="Start a new session, or build the model with another chat template.",
            ) from error
        return _split(text)


def _split(text: str) -> list[Piece]:
    pieces = []
    for position, part in enumerate(_SENTINEL.split(text)):
        if position % 2:
            pieces.append(Piece(content=int(part)))
        elif part:
            pieces.append(Piece(literal=part))
    return pieces


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without Jinja's HTML escapes, which would reach the model as text."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class _Generation(Extension):
    """`{% generation %}`: marks what a training set learns from; rendering just keeps the body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
