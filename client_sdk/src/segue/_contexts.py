"""What `segue login` keeps: contexts, each an address with a token for it. Pure: text in and out.

current = "work"
[contexts.work]
url = "edge.example:7411"       # or several, with commas between them
token_command = "app-token"     # or token = "..."
ca = "/home/ann/ca.crt"
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping

import msgspec

from segue_contract.errors import UNREADABLE, InvalidArgument, NotFound
from segue_contract.ids import check_id
from segue_contract.limits import MAX_CONTEXTS


class Context(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """`token` and `token_command`: one of them, or neither."""

    url: str
    token: str = ""
    token_command: str = ""
    ca: str = ""


class Contexts(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """All of them, by name. `current` is "" or one of the names."""

    current: str = ""
    contexts: Mapping[str, Context] = {}

    def get(self, name: str) -> Context:
        """Raises NotFound."""
        if name in self.contexts:
            return self.contexts[name]
        known = ", ".join(sorted(self.contexts)) or "none"
        raise NotFound(
            f"There is no context {name!r}.", hint=f"Known: {known}. `segue login` makes one."
        )

    def use(self, name: str) -> Contexts:
        """Raises NotFound."""
        self.get(name)
        return Contexts(name, self.contexts)

    def put(self, name: str, context: Context) -> Contexts:
        """With that one, which is then the current one. Raises InvalidArgument."""
        contexts = {**self.contexts, check_id(name, "context"): context}
        return _checked(Contexts(name, contexts))

    def without(self, name: str) -> Contexts:
        """Raises NotFound."""
        self.get(name)
        left = {other: context for other, context in self.contexts.items() if other != name}
        return Contexts("" if self.current == name else self.current, left)


def parse_contexts(text: str) -> Contexts:
    """Raises InvalidArgument, which quotes no value."""
    try:
        found = msgspec.convert(tomllib.loads(text), Contexts)
    except tomllib.TOMLDecodeError as error:
        raise InvalidArgument("The file of contexts is no TOML.", hint=str(error)) from error
    except UNREADABLE as error:
        raise InvalidArgument("The file of contexts has a wrong entry.", hint=str(error)) from error
    return _checked(found)


def format_contexts(contexts: Contexts) -> str:
    """As TOML. A JSON string without control characters is a TOML string as well."""
    lines = [f"current = {_quoted(contexts.current)}"] if contexts.current else []
    for name, context in sorted(contexts.contexts.items()):
        lines += ["", f"[contexts.{_quoted(name)}]"]
        lines += [
            f"{key} = {_quoted(value)}" for key, value in msgspec.to_builtins(context).items()
        ]
    return "\n".join(lines).strip() + "\n"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _checked(found: Contexts) -> Contexts:
    if len(found.contexts) > MAX_CONTEXTS:
        raise InvalidArgument(f"{len(found.contexts)} contexts; {MAX_CONTEXTS} are allowed.")
    for name, context in found.contexts.items():
        check_id(name, "context")
        if not all(value.isprintable() for value in msgspec.to_builtins(context).values()):
            raise InvalidArgument(
                f"The context {name} has a value with a line break or control character."
            )
        if context.token and context.token_command:
            raise InvalidArgument(
                f"The context {name} has a token and a command for it.", hint="Keep one of them."
            )
    if found.current:
        found.get(found.current)
    return found
