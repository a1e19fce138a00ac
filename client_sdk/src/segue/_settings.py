"""Where a client connects and as whom: what is given, else the environment, else a context."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from segue._contexts import Context, Contexts
from segue_contract.errors import InvalidArgument

DEFAULT_URL = "127.0.0.1:7411"  # of the edge that `segue up` starts
URL, TOKEN, CA, CERT, KEY = "SEGUE_URL", "SEGUE_TOKEN", "SEGUE_CA", "SEGUE_CERT", "SEGUE_KEY"
CONTEXT = "SEGUE_CONTEXT"


@dataclass(frozen=True, slots=True)
class Setting:
    """`source`: a variable, "context NAME", or "default". `value` "": there is none."""

    value: str
    source: str


@dataclass(frozen=True, slots=True)
class Settings:
    context: Setting
    url: Setting
    token: Setting
    token_command: Setting
    ca: Setting
    cert: Setting
    key: Setting

    @property
    def addresses(self) -> list[str]:
        return addresses_of(self.url.value)


def addresses_of(text: str) -> list[str]:
    """Of "host:port,host:port". Raises InvalidArgument where there is none."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise InvalidArgument("No address was given.", hint="Write host:port of a node.")
    return found


def find_settings(
    env: Mapping[str, str],
    contexts: Callable[[], Contexts],
    *,
    address: str | Sequence[str] | None = None,
) -> Settings:
    """What applies beside the arguments that a client was given.

    A context's token goes to the context's own address, and to no other: where the address is
    given, or SEGUE_URL is set, no context applies.

    Args:
        contexts: reads the file; asked only where it may matter.
        address: the one that was given.

    Raises:
        NotFound: SEGUE_CONTEXT names none.
    """
    if address is not None or env.get(URL):
        name, chosen, by = "", Context(""), "default"
    else:
        known = contexts()
        name = env.get(CONTEXT) or known.current
        by = CONTEXT if env.get(CONTEXT) else "current" if name else "default"
        chosen = known.get(name) if name else Context("")

    def setting(variable: str, kept: str, default: str = "") -> Setting:
        if value := env.get(variable, ""):
            return Setting(value, variable)
        return Setting(kept, f"context {name}") if kept else Setting(default, "default")

    if address is not None:
        given = address if isinstance(address, str) else ",".join(address)
        url = Setting(given, "given")
    else:
        url = setting(URL, chosen.url, DEFAULT_URL)
    return Settings(
        context=Setting(name, by),
        url=url,
        token=setting(TOKEN, chosen.token),
        token_command=setting("", "" if env.get(TOKEN) else chosen.token_command),
        ca=setting(CA, chosen.ca),
        cert=setting(CERT, ""),
        key=setting(KEY, ""),
    )
