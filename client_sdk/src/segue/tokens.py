"""Session tokens for an app's users: issued by its back end, borne by their devices.

    token = segue.tokens.issue(device="ann-phone", sessions=["ann.*"], rights=["read", "send"])

Needs the tenant's API key (`segue tenant add`), and neither node nor network. An app's own rules
decide who gets which: ask who the user is before calling this, and keep the API key on the server.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence

from segue_contract.errors import InvalidArgument
from segue_contract.identity import tokens
from segue_contract.identity.keys import API_KEY_VARIABLE, IssuerKey
from segue_contract.identity.principal import Right
from segue_contract.ids import new_id
from segue_contract.limits import TOKEN_LIFETIME_S

__all__ = ["Right", "issue"]


def issue(
    *,
    device: str,
    sessions: Sequence[str],
    rights: Iterable[Right | str],
    lifetime_s: float = TOKEN_LIFETIME_S,
    api_key: str | None = None,
    device_key: str = "",
) -> str:
    """A token with which that device may use those sessions.

    Args:
        device: the device's name, and no other's: it is who the log says wrote.
        sessions: names, or the beginning of names and "*" at its end; ["*"]: all of the tenant.
        rights: of "read", "send", "stop", "control", "tool" and "admin".
        lifetime_s: seconds, up to an hour. Devices ask for a new one before it ends.
        api_key: the tenant's; by default what the variable SEGUE_API_KEY holds.
        device_key: RFC 7638 thumbprint of the key that the device has to prove; "": none. Nodes
            that ask for no proof refuse such a token.

    Raises:
        InvalidArgument: no API key, a damaged one, or a value that no node would take.
    """
    secret = os.environ.get(API_KEY_VARIABLE, "") if api_key is None else api_key
    if not secret:
        raise InvalidArgument(
            "There is no API key to sign the token with.",
            hint=f"Set {API_KEY_VARIABLE} to the line that `segue tenant add` printed.",
        )
    return tokens.issue(
        IssuerKey.parse(secret),
        device=device,
        sessions=sessions,
        rights=tokens.rights_of(rights),
        lifetime_s=lifetime_s,
        now_s=time.time(),
        token_id=new_id("t", os.urandom),
        device_key=device_key,
    )
