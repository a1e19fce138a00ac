"""Pure: which tokens were made void. A revocation is a watermark: of a device and of sessions, a
time; tokens that are valid since before it are void there. Nobody keeps lists of tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from segue_contract.identity.principal import Kind, Principal, covers
from segue_contract.identity.rights import access_revoked
from segue_contract.limits import MAX_WATERMARKS


@dataclass(frozen=True, slots=True)
class Watermark:
    """Tokens of a tenant's device that are valid since before `before_s` (Unix) are void.

    Attributes:
        sessions: for which: a session's name, the beginning of names and "*", or "*" for all.
        place: counts up; what was heard of later has a higher one.
    """

    tenant: str
    sessions: str
    device: str
    before_s: float
    place: int = 0


class Watermarks:
    """What a node has heard of. Beyond `most` the oldest is forgotten: the log refuses
    its tokens all the same."""

    def __init__(self, most: int = MAX_WATERMARKS) -> None:
        self._most = most
        self._of_device: dict[tuple[str, str], dict[str, Watermark]] = {}
        self._by_place: dict[int, Watermark] = {}
        self.last = 0  # the highest place

    def __len__(self) -> int:
        return len(self._by_place)

    def add(self, tenant: str, sessions: str, device: str, before_s: float) -> bool:
        """False where that was known, or a later one."""
        marks = self._of_device.setdefault((tenant, device), {})
        known = marks.get(sessions)
        if known is not None:
            if known.before_s >= before_s:
                return False
            del self._by_place[known.place]
        self.last += 1
        mark = Watermark(tenant, sessions, device, before_s, self.last)
        marks[sessions] = self._by_place[self.last] = mark
        while len(self._by_place) > self._most:
            self._drop(self._by_place[next(iter(self._by_place))])
        return True

    def forget(self, before_s: float) -> None:
        """Drop those of before: tokens of that time have run out."""
        for mark in [one for one in self._by_place.values() if one.before_s < before_s]:
            self._drop(mark)

    def _drop(self, mark: Watermark) -> None:
        del self._by_place[mark.place]
        marks = self._of_device[mark.tenant, mark.device]
        del marks[mark.sessions]
        if not marks:
            del self._of_device[mark.tenant, mark.device]

    def after(self, place: int, most: int) -> list[Watermark]:
        """The next `most` that were heard of behind that place, in order."""
        found = []
        for mark in reversed(self._by_place.values()):
            if mark.place <= place:
                break
            found.append(mark)
        return found[::-1][:most]

    def is_void(self, principal: Principal, session: str) -> bool:
        """Whether the caller's token is void for that session."""
        return any(covers(mark.sessions, session) for mark in self._above(principal))

    def check(self, principal: Principal, sessions: Iterable[str]) -> None:
        """Raises Revoked where the caller's token is void for one of these sessions; where there is
        none of them, if it is void for all that it covers."""
        marks = self._above(principal)
        if not marks:
            return
        named = False
        for session in sessions:
            named = True
            if any(covers(mark.sessions, session) for mark in marks):
                raise access_revoked(session)
        if not named and all(
            any(covers(mark.sessions, pattern) for mark in marks) for pattern in principal.sessions
        ):
            raise access_revoked()

    def _above(self, principal: Principal) -> list[Watermark]:
        if principal.kind is not Kind.DEVICE or not self._of_device:
            return []
        marks = self._of_device.get((principal.tenant, principal.name), {})
        return [mark for mark in marks.values() if principal.issued_s < mark.before_s]
