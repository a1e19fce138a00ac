"""The one place of a program where calls are checked: who calls, and whether they may.

    find the principal ─► the verb ─► the sessions and the device that the request names ─► handler

What has no rule is denied (`segue_contract.identity.rights`). A handler asks `caller()` for the
tenant, never the request. Streams of a caller whose time is over, or who was revoked, end.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import grpc

from segue_contract.errors import (
    Internal,
    InvalidArgument,
    PermissionDenied,
    Revoked,
    SegueError,
    Unauthenticated,
    UnknownNode,
)
from segue_contract.identity.principal import Kind, Principal, local, of_certificate
from segue_contract.identity.rights import RULES, Scope, access_revoked, check
from segue_contract.ids import SessionName, check_id
from segue_contract.limits import EXPIRY_GRACE_S, GATE_LOOK_S, MAX_TAILS, OUTBOX_TOKEN_AGE_S
from segue_contract.transport.bearer import token_in
from segue_contract.transport.handlers import around
from segue_contract.transport.tls import peer_name

_OF_EDGES = "/segue.v1.Decode/"

# Begun with a right that is not asked for again: what the cloud owes a turn that was granted is
# served to its end. A revocation ends it all the same.
_GRANTED = frozenset({"/segue.v1.Decode/Run"})

# For turns that were said offline, and those that were granted, an edge with a certificate vouches:
# their device's token was valid then. `caller_is_late` says so to their handlers.
_VOUCHED = frozenset(
    {"/segue.v1.Decode/Begin", "/segue.v1.Decode/Run", "/segue.v1.Agent/OpenSession"}
)

_caller: ContextVar[_Call] = ContextVar("segue caller")


class Tokens(Protocol):
    """As `segue_contract.identity.tokens.TokenChecker`."""

    def principal(self, token: str, now_s: float, *, late_s: float = 0.0) -> Principal: ...


def caller() -> Principal:
    """Who makes the call that is served here.

    Raises:
        Internal: nobody was checked; a server without a gate serves nobody.
    """
    return _current().principal


def caller_token() -> str:
    """The session token that the caller showed, for calls that are made for it; "" for none."""
    return _current().token


def caller_is_late() -> bool:
    """Its token ran out, and the edge vouches that it was valid when the turn was asked for."""
    return _current().late


def named(session: str) -> SessionName:
    """The caller's session of that name. Raises InvalidArgument where it cannot be one."""
    return SessionName(caller().tenant, check_id(session, "session"))


def renew_calls() -> int:
    """The caller's other calls here go on under the token of this one; returns how many."""
    call = _current()
    return gate_here().renew(call.principal, call.token)


def gate_here() -> Gate:
    """The gate that the call came through."""
    gate = _current().gate
    if gate is None:
        raise Internal("This was not called through a gate.")
    return gate


@contextlib.contextmanager
def acting_as(principal: Principal, token: str = "") -> Iterator[None]:
    """While inside, `caller()` is `principal`: for what a program does without being called."""
    reset = _caller.set(_Call(principal, token, ""))
    try:
        yield
    finally:
        _caller.reset(reset)


@dataclass(eq=False)
class _Call:
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
        if self.task is not None:
            self.task.cancel()


def _current() -> _Call:
    call = _caller.get(None)
    if call is None:
        raise Internal("A call was served that nobody checked.", hint="Give the server a gate.")
    return call


_Read = Callable[[_Call, Any], Any]


class Gate(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Checks every call of a server; `close` once it is stopped.

    Args:
        tenant: of callers on an open loopback.
        tokens: with it a caller shows a session token, or a node's certificate; without, the
            listener is open and everybody is `Kind.LOCAL`.
        peer_name: the name of a verified client certificate, "" for none.
        now_s: Unix seconds.
    """

    def __init__(
        self,
        tenant: str,
        tokens: Tokens | None = None,
        *,
        peer_name: Callable[[Any], str] = peer_name,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self._local = local(tenant)
        self._tokens = tokens
        self._peer_name = peer_name
        self._now_s = now_s
        self._live: set[_Call] = set()
        self._void_before: dict[tuple[str, str, str], float] = {}
        self._timer: asyncio.TimerHandle | None = None

    @property
    def authenticates(self) -> bool:
        """Callers are known, so that the listener may leave this machine."""
        return self._tokens is not None

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # -- revocation and renewal ----------------------------------------------------------------

    def revoke(self, tenant: str, session: str, device: str, before_s: float) -> None:
        """Tokens of the device for that session which were valid before are void, from now on."""
        key = tenant, session, device
        self._void_before[key] = max(before_s, self._void_before.get(key, 0.0))
        for call in list(self._live):
            try:
                self._check_void(call.principal, call.sessions)
            except Revoked as error:
                call.end(error)

    def forget_revoked(self, before_s: float) -> None:
        """Drop what was revoked earlier: tokens of that time have run out."""
        old = [key for key, at_s in self._void_before.items() if at_s < before_s]
        for key in old:
            del self._void_before[key]

    def renew(self, principal: Principal, token: str) -> int:
        """The device's calls go on under a newer token, those that it covers; returns how many."""
        renewed = 0
        for call in self._live:
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

    def _check_void(self, principal: Principal, sessions: Iterable[str]) -> None:
        if principal.kind is not Kind.DEVICE or not self._void_before:
            return
        for session in sessions:
            before_s = self._void_before.get((principal.tenant, session, principal.name), 0.0)
            if principal.issued_s < before_s:
                raise access_revoked(session)

    def _look(self) -> None:
        """End what has run out. One timer, at rest while no caller's time is limited."""
        self._timer = None
        now_s = self._now_s()
        limited = [call for call in self._live if call.principal.expires_s < float("inf")]
        for call in limited:
            if (
                not call.late
                and now_s > call.principal.expires_s + EXPIRY_GRACE_S
                and call.verb not in _GRANTED
            ):
                call.end(expired())
        if limited:
            self._watch()

    def _watch(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(GATE_LOOK_S, self._look)

    # -- the check -----------------------------------------------------------------------------

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return cast("grpc.RpcMethodHandler[Any, Any]", handler)
        verb = str(handler_call_details.method)
        read = self._first_checked if handler.request_streaming else self._check_request
        return around(
            handler,
            lambda inner: self._unary(inner, verb, read),
            lambda inner: self._stream(inner, verb, read),
        )

    def _unary(self, inner: Callable[[Any, Any], Awaitable[Any]], verb: str, read: _Read) -> Any:
        async def serve(request: Any, context: Any) -> Any:
            call = self._admit(verb, context)
            checked = read(call, request)
            with self._under_way(call):
                return await _waiting(call, inner(checked, context))

        return serve

    def _stream(self, inner: Callable[[Any, Any], Any], verb: str, read: _Read) -> Any:
        async def serve(request: Any, context: Any) -> AsyncIterator[Any]:
            call = self._admit(verb, context)
            checked = read(call, request)
            with self._under_way(call):
                replies = inner(checked, context)
                if not hasattr(replies, "__aiter__"):  # it writes to the context by itself
                    await _waiting(call, replies)
                    return
                iterator = aiter(replies)
                try:
                    while (reply := await _waiting(call, anext(iterator, _END))) is not _END:
                        yield reply
                        if call.over is not None:
                            raise call.over
                finally:
                    if hasattr(iterator, "aclose"):
                        await iterator.aclose()

        return serve

    @contextlib.contextmanager
    def _under_way(self, call: _Call) -> Iterator[None]:
        call.task = asyncio.current_task()
        self._live.add(call)
        if call.principal.expires_s < float("inf"):
            self._watch()
        try:
            yield
        finally:
            self._live.discard(call)
            call.task = None

    def _admit(self, verb: str, context: Any) -> _Call:
        principal, token = self._find(context, verb)
        check(principal, verb)
        if not principal.tenant and RULES[verb].scope is not Scope.NONE:
            raise PermissionDenied(
                "The call names no tenant: a node acts for devices, with their tokens.",
                hint="Send the device's token along.",
            )
        late = self._now_s() >= principal.expires_s
        call = _Call(principal, token, verb, late, self)
        _caller.set(call)
        return call

    def _find(self, context: Any, verb: str) -> tuple[Principal, str]:
        """Raises Unauthenticated."""
        if self._tokens is None:
            return self._local, ""  # a token that nobody checks names no tenant
        token = token_in(context.invocation_metadata() or ())
        name = self._peer_name(context)
        node = of_certificate(name) if name else None
        if not token:
            if node is None and verb.startswith(_OF_EDGES):
                raise UnknownNode(
                    "The edge shows no certificate.",
                    hint="Give it --tls-cert, --tls-key and --tls-ca, and this node --node-port.",
                )
            if node is None:
                raise Unauthenticated(
                    "The call shows no session token.",
                    hint="Give the client one: SEGUE_TOKEN, or Client(token=...).",
                )
            return node, ""
        vouched = node is not None and node.kind is Kind.EDGE and verb in _VOUCHED
        late_s = OUTBOX_TOKEN_AGE_S if vouched else 0.0
        principal = self._tokens.principal(token, self._now_s(), late_s=late_s)
        if node is None:
            return principal, token
        if node.kind is not Kind.EDGE:
            raise UnknownNode(
                "A token came over a connection of another node than an edge.",
                hint="Only edges speak for devices.",
            )
        return principal.through(node), token

    async def _first_checked(self, call: _Call, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """A stream says in its first message what it is about."""
        first = True
        async for request in requests:
            if first:
                self._check_request(call, request)
                first = False
            yield request

    def _check_request(self, call: _Call, request: Any) -> Any:
        """Returns the request. Raises PermissionDenied, Unauthenticated, InvalidArgument."""
        rule = RULES[call.verb]
        sessions, device = _named_in(request)
        if len(sessions) > MAX_TAILS:  # before each is looked at: everybody waits meanwhile
            raise InvalidArgument(
                f"The request names {len(sessions)} sessions.",
                hint=f"Name {MAX_TAILS} or fewer at once.",
            )
        if rule.per_session:
            for session in sessions:
                check(call.principal, call.verb, check_id(session, "session"))
        self._check_void(call.principal, sessions)
        if call.principal.kind is Kind.DEVICE and device not in ("", call.principal.name):
            raise PermissionDenied(
                "The request names another device than its token.",
                hint="Use the device that the token was issued for.",
            )
        call.sessions = tuple(sessions)
        return request


_END = object()


async def _waiting(call: _Call, work: Awaitable[Any]) -> Any:
    """What the handler gives; where the call is ended meanwhile, why."""
    call.waiting = True
    try:
        return await work
    except asyncio.CancelledError:
        if call.over is None or call.task is None:
            raise
        call.task.uncancel()
        raise call.over from None
    finally:
        call.waiting = False


def expired() -> Unauthenticated:
    """What is said to a caller whose time is over."""
    return Unauthenticated(
        "The session token ran out.", hint="Renew it before: `Client(token=...)` with a callable."
    )


def _named_in(request: Any) -> tuple[Sequence[str], str]:
    """The sessions and the device that a request names, wherever it does."""
    fields = request.DESCRIPTOR.fields_by_name
    for holder in ("open", "turn"):  # of Decode: the turn that it is about
        if holder in fields and fields[holder].message_type is not None:
            if holder == "open" and request.WhichOneof("kind") != "open":
                continue
            return _named_in(getattr(request, holder))
    device = request.device if "device" in fields else ""
    if "sessions" in fields and fields["sessions"].message_type is None:
        return list(request.sessions), device
    return ([request.session] if "session" in fields else []), device
