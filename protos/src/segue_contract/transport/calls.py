"""The calls that a server has under way: whose they are, and what ends them before their time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from segue_contract.errors import (
    Internal,
    PermissionDenied,
    Revoked,
    SegueError,
    Unauthenticated,
)
from segue_contract.identity.principal import Principal
from segue_contract.identity.revoked import Watermarks
from segue_contract.identity.rights import check
from segue_contract.limits import EXPIRY_GRACE_S, GATE_LOOK_S
from segue_contract.transport.status import abort

if TYPE_CHECKING:
    from segue_contract.transport.gate import Gate

# Begun with a right that is not asked for again: what the cloud owes a turn that was granted is
# served to its end. A revocation ends it all the same.
_GRANTED = frozenset({"/segue.v1.Decode/Run"})

_caller: ContextVar[Call] = ContextVar("segue caller")


class Tokens(Protocol):
    """As `segue_contract.identity.tokens.TokenChecker`."""

    def principal(self, token: str, now_s: float, *, late_s: float = 0.0) -> Principal: ...

    def knows(self, token: str) -> bool: ...

    def changes(self) -> int: ...

    def key_of(self, token: str) -> str: ...

    def void_before(self, key: str) -> float: ...


@dataclass(eq=False)
class Call:
    """A call under way. `principal` and `token` change where they are renewed."""

    principal: Principal
    token: str
    verb: str
    late: bool = False
    gate: Gate | None = None
    sessions: tuple[str, ...] = ()
    over: SegueError | None = None  # why it may not go on
    waiting: bool = False  # its task waits for the handler, not for the reader
    task: asyncio.Task[Any] | None = None
    context: Any = None  # gRPC's

    def end(self, why: SegueError) -> None:
        """The handler is left at once; a reader that takes nothing gets a second."""
        if self.over is not None or self.task in (None, asyncio.current_task()):
            return
        assert self.task is not None
        self.over = why
        if self.waiting:
            self.task.cancel()
        else:
            asyncio.get_running_loop().call_later(GATE_LOOK_S, self._cut)

    def _cut(self) -> None:
        task = self.task
        if task is None:
            return
        self.task = None
        task.cancel()
        assert self.over is not None
        # Its task cannot say why any more: it waits for the reader.
        saying = asyncio.ensure_future(_say(self.context, self.over))
        _saying.add(saying)
        saying.add_done_callback(_saying.discard)

    async def waited(self, work: Awaitable[Any]) -> Any:
        """What the handler gives; where the call is ended meanwhile, why."""
        self.waiting = True
        try:
            return await work
        except asyncio.CancelledError:
            if self.over is None or self.task is None:
                raise
            self.task.uncancel()
            raise self.over from None
        finally:
            self.waiting = False


_saying: set[asyncio.Future[None]] = set()


async def _say(context: Any, why: SegueError) -> None:
    with contextlib.suppress(Exception):
        await abort(context, why)


def current() -> Call:
    """Raises Internal: nobody was checked; a server without a gate serves nobody."""
    call = _caller.get(None)
    if call is None:
        raise Internal("A call was served that nobody checked.", hint="Give the server a gate.")
    return call


def enter(call: Call) -> None:
    """The task serves that call from now on."""
    _caller.set(call)


@contextlib.contextmanager
def acting_as(principal: Principal, token: str = "") -> Iterator[None]:
    """While inside, `caller()` is `principal`: for what a program does without being called."""
    reset = _caller.set(Call(principal, token, ""))
    try:
        yield
    finally:
        _caller.reset(reset)


def expired() -> Unauthenticated:
    """What is said to a caller whose time is over."""
    return Unauthenticated(
        "The session token ran out.", hint="Renew it before: `Client(token=...)` with a callable."
    )


class LiveCalls:
    """Of one gate. They end where their token is revoked, runs out, or is taken no more."""

    def __init__(self, tokens: Tokens | None, now_s: Callable[[], float]) -> None:
        self.watermarks = Watermarks()
        self._tokens = tokens
        self._now_s = now_s
        self._calls: set[Call] = set()
        self._keys = 0  # as `changes` said last
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._calls)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @contextlib.contextmanager
    def under_way(self, call: Call) -> Iterator[None]:
        call.task = asyncio.current_task()
        self._calls.add(call)
        if call.token:
            self._watch()
        try:
            yield
        finally:
            self._calls.discard(call)
            call.task = None

    def revoke(self, tenant: str, sessions: str, device: str, before_s: float) -> None:
        """As `Gate.revoke`."""
        if not self.watermarks.add(tenant, sessions, device, before_s):
            return
        for call in [one for one in self._calls if one.principal.name == device]:
            try:
                self.watermarks.check(call.principal, call.sessions)
            except Revoked as error:
                call.end(error)

    def renew(self, principal: Principal, token: str) -> int:
        """The device's calls go on under a newer token, those that it covers; returns how many."""
        renewed = 0
        for call in self._calls:
            mine = call.principal
            same = (mine.kind, mine.tenant, mine.name, mine.device_key) == (
                principal.kind,
                principal.tenant,
                principal.name,
                principal.device_key,
            )
            if not same or principal.expires_s < mine.expires_s:
                continue
            try:
                for session in call.sessions or (None,):
                    check(replace(principal, via=mine.via), call.verb, session)
            except PermissionDenied:
                continue
            call.principal, call.token = replace(principal, via=mine.via), token
            renewed += 1
        return renewed

    def _watch(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(GATE_LOOK_S, self._look)

    def _look(self) -> None:
        """One timer, at rest while no caller shows a token."""
        self._timer = None
        now_s = self._now_s()
        shown = [call for call in self._calls if call.token]
        for call in shown:
            over = now_s > call.principal.expires_s + EXPIRY_GRACE_S
            if over and not call.late and call.verb not in _GRANTED:
                call.end(expired())
        if self._tokens is not None and (keys := self._tokens.changes()) != self._keys:
            self._keys = keys
            for call in shown:
                self._check_key(call)
        if shown:
            self._watch()

    def _check_key(self, call: Call) -> None:
        """Its time is another matter: a key that was revoked takes no token, however young."""
        assert self._tokens is not None
        try:
            self._tokens.principal(call.token, self._now_s(), late_s=float("inf"))
        except Unauthenticated as error:
            call.end(error)
