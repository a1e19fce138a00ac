"""Callers for tests: who they are is what their token says, in plain words."""

from __future__ import annotations

from segue_contract.errors import Unauthenticated
from segue_contract.identity.principal import ALL_SESSIONS, Kind, Principal, Right

EDGE = "edge/here/one"


class KnownTokens:
    """As `TokenChecker`, of the principals that were put in."""

    def __init__(self) -> None:
        self._known: dict[str, Principal] = {}
        self.changed = 0

    def device(
        self,
        tenant: str,
        name: str = "phone",
        *,
        sessions: tuple[str, ...] = ALL_SESSIONS,
        rights: frozenset[Right] = frozenset(Right),
        issued_s: float = 0.0,
        expires_s: float = float("inf"),
    ) -> str:
        """A token of that device."""
        token = f"token-{len(self._known)}"
        self._known[token] = Principal(
            Kind.DEVICE, tenant, name, sessions, rights, expires_s, issued_s, token
        )
        return token

    def knows(self, token: str) -> bool:
        return token in self._known

    def changes(self) -> int:
        return self.changed

    def key_of(self, token: str) -> str:
        return token

    def void_before(self, key: str) -> float:
        return 0.0 if key in self._known else float("inf")

    def forget(self, *tokens: str) -> None:
        """As if the key of these were revoked."""
        for token in tokens:
            del self._known[token]
        self.changed += 1

    def principal(self, token: str, now_s: float, *, late_s: float = 0.0) -> Principal:
        found = self._known.get(token)
        if found is None or now_s >= found.expires_s + late_s:
            raise Unauthenticated("The token is not known, or ran out.")
        return found
