"""The one place of a program where calls are checked: who calls, and whether they may.

    find the principal ─► the verb ─► the sessions and the device that the request names ─► handler

What has no rule is denied (`segue_contract.identity.rights`). A handler asks `caller()` for the
tenant, never the request. Streams of a caller whose time is over, or who was revoked, end.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, cast

import grpc

from segue_contract.errors import (
    Internal,
    InvalidArgument,
    PermissionDenied,
    Unauthenticated,
    UnknownNode,
)
from segue_contract.identity.bad_tokens import BadTokens, address_of
from segue_contract.identity.principal import (
    Kind,
    Principal,
    check_session_pattern,
    local,
    of_certificate,
)
from segue_contract.identity.revoked import Watermarks
from segue_contract.identity.rights import RULES, Scope, check
from segue_contract.ids import SessionName, check_id, new_id
from segue_contract.limits import MAX_TAILS, OUTBOX_TOKEN_AGE_S
from segue_contract.transport.bearer import token_in
from segue_contract.transport.calls import Call, LiveCalls, current, enter
from segue_contract.transport.calls import Tokens as Tokens
from segue_contract.transport.calls import acting_as as acting_as
from segue_contract.transport.calls import expired as expired
from segue_contract.transport.handlers import around
from segue_contract.transport.tls import peer_name

_OF_EDGES = "/segue.v1.Decode/"

# For turns that were said offline, and those that were granted, an edge with a certificate vouches:
# their device's token was valid then. `caller_is_late` says so to their handlers.
_VOUCHED = frozenset(
    {"/segue.v1.Decode/Begin", "/segue.v1.Decode/Run", "/segue.v1.Agent/OpenSession"}
)


def caller() -> Principal:
    """Who makes the call that is served here.

    Raises:
        Internal: nobody was checked; a server without a gate serves nobody.
    """
    return current().principal


def caller_token() -> str:
    """The session token that the caller showed, for calls that are made for it; "" for none."""
    return current().token


def caller_is_late() -> bool:
    """Its token ran out, and the edge vouches that it was valid when the turn was asked for."""
    return current().late


def named(session: str) -> SessionName:
    """The caller's session of that name. Raises InvalidArgument where it cannot be one."""
    return SessionName(caller().tenant, check_id(session, "session"))


def renew_calls() -> int:
    """The caller's other calls here go on under the token of this one; returns how many."""
    call = current()
    return gate_here().renew(call.principal, call.token)


def gate_here() -> Gate:
    """The gate that the call came through."""
    gate = current().gate
    if gate is None:
        raise Internal("This was not called through a gate.")
    return gate


_Read = Callable[[Call, Any], Any]


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
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._local = local(tenant)
        self._tokens = tokens
        self._peer_name = peer_name
        self._now_s = now_s
        self._monotonic = monotonic
        self._live = LiveCalls(tokens, now_s)
        self.life = new_id("", os.urandom)  # in which places of `watermarks` count
        self._bad_tokens = BadTokens()

    @property
    def authenticates(self) -> bool:
        """Callers are known, so that the listener may leave this machine."""
        return self._tokens is not None

    @property
    def watermarks(self) -> Watermarks:
        """What was revoked lately, as this node knows it."""
        return self._live.watermarks

    @property
    def calls(self) -> int:
        """Under way."""
        return len(self._live)

    def close(self) -> None:
        self._live.close()

    # -- revocation and renewal ----------------------------------------------------------------

    def revoke(self, tenant: str, sessions: str, device: str, before_s: float) -> None:
        """Tokens of the device which were valid before are void, from now on: for that session, or
        for all whose names begin so (a beginning and "*"). Its calls there end."""
        self._live.revoke(tenant, sessions, device, before_s)

    def forget_revoked(self, before_s: float) -> None:
        """Drop what was revoked earlier: tokens of that time have run out."""
        self._live.watermarks.forget(before_s)

    def renew(self, principal: Principal, token: str) -> int:
        """The device's calls go on under a newer token, those that it covers; returns how many."""
        return self._live.renew(principal, token)

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
            with self._live.under_way(call):
                return await call.waited(inner(checked, context))

        return serve

    def _stream(self, inner: Callable[[Any, Any], Any], verb: str, read: _Read) -> Any:
        async def serve(request: Any, context: Any) -> AsyncIterator[Any]:
            call = self._admit(verb, context)
            checked = read(call, request)
            with self._live.under_way(call):
                replies = inner(checked, context)
                if not hasattr(replies, "__aiter__"):  # it writes to the context by itself
                    await call.waited(replies)
                    return
                iterator = aiter(replies)
                try:
                    while (reply := await call.waited(anext(iterator, _END))) is not _END:
                        yield reply
                        if call.over is not None:
                            raise call.over
                finally:
                    if hasattr(iterator, "aclose"):
                        await iterator.aclose()

        return serve

    def _admit(self, verb: str, context: Any) -> Call:
        principal, token = self._find(context, verb)
        check(principal, verb)
        if not principal.tenant and RULES[verb].scope is not Scope.NONE:
            raise PermissionDenied(
                "The call names no tenant: a node acts for devices, with their tokens.",
                hint="Send the device's token along.",
            )
        late = self._now_s() >= principal.expires_s
        call = Call(principal, token, verb, late, self, context=context)
        enter(call)
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
        principal = self._bearer(context, token, late_s, counted=node is None)
        if node is None:
            return principal, token
        if node.kind is not Kind.EDGE:
            raise UnknownNode(
                "A token came over a connection of another node than an edge.",
                hint="Only edges speak for devices.",
            )
        return principal.through(node), token

    def _bearer(self, context: Any, token: str, late_s: float, *, counted: bool) -> Principal:
        """Who bears the token. `counted`: bad ones are held against the caller's address; not
        against an edge, which has checked its devices' tokens itself.

        Raises:
            Unauthenticated, Overloaded.
        """
        tokens, now_s = self._tokens, self._now_s()
        assert tokens is not None
        if not counted or tokens.knows(token):
            return tokens.principal(token, now_s, late_s=late_s)
        found: Principal = self._bad_tokens.checked(
            address_of(context.peer()),
            token,
            self._monotonic(),
            lambda: tokens.principal(token, now_s, late_s=late_s),
        )
        return found

    async def _first_checked(self, call: Call, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """A stream says in its first message what it is about."""
        first = True
        async for request in requests:
            if first:
                self._check_request(call, request)
                first = False
            yield request

    def _check_request(self, call: Call, request: Any) -> Any:
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
                name = check_session_pattern if rule.scope is Scope.PATTERN else _session
                check(call.principal, call.verb, name(session))
        self._live.watermarks.check(call.principal, sessions)
        if call.principal.kind is Kind.DEVICE and device not in ("", call.principal.name):
            raise PermissionDenied(
                "The request names another device than its token.",
                hint="Use the device that the token was issued for.",
            )
        call.sessions = tuple(sessions)
        return request


_END = object()


def _session(name: str) -> str:
    return check_id(name, "session")


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
