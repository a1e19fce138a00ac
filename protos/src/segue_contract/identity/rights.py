"""Pure: what each verb of each service asks of its caller. What is not in the table is denied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from segue_contract.errors import PermissionDenied, Revoked
from segue_contract.identity.principal import Kind, Principal, covers
from segue_contract.identity.principal import Right as Right
from segue_contract.sync import ops


class Scope(StrEnum):
    """Which sessions a verb is about."""

    NONE = "none"
    SESSION = "session"  # those that the request names; each is checked
    PATTERN = "pattern"  # one, or the beginning of names and "*": the caller has to see all of them
    LISTED = "listed"  # the answer holds those alone that the caller may see
    TENANT = "tenant"  # any of the tenant's: the caller has to see all of them


@dataclass(frozen=True, slots=True)
class Rule:
    """Who may use a verb.

    Attributes:
        kinds: of the other end of the connection (`Principal.speaker`).
        rights: one of them is enough; empty: none is needed.
    """

    kinds: frozenset[Kind]
    rights: frozenset[Right]
    scope: Scope

    @property
    def per_session(self) -> bool:
        """`check` wants the session, once the request is read."""
        return self.scope in (Scope.SESSION, Scope.PATTERN)


_EVERYBODY = frozenset(Kind)
_USERS = frozenset({Kind.LOCAL, Kind.DEVICE, Kind.EDGE})
_NODES = frozenset({Kind.LOCAL, Kind.EDGE})
_KEEPERS = frozenset({Kind.LOCAL, Kind.OPERATOR})


def _rule(kinds: frozenset[Kind], scope: Scope, *rights: Right) -> Rule:
    return Rule(kinds, frozenset(rights), scope)


_AGENT: Mapping[str, Rule] = {
    # a session that is not there yet is made with SEND only: `may_create`
    "OpenSession": _rule(_USERS, Scope.SESSION, Right.READ),
    "RunTurn": _rule(_USERS, Scope.SESSION, Right.SEND),
    "DismissTurns": _rule(_USERS, Scope.SESSION, Right.SEND),
    "Prepare": _rule(_USERS, Scope.SESSION, Right.SEND),
    "StopTurn": _rule(_USERS, Scope.SESSION, Right.STOP),
    "Attach": _rule(_USERS, Scope.SESSION, Right.READ),
    "Read": _rule(_USERS, Scope.SESSION, Right.READ),
    # and each op asks for a right of its own: `check_op`
    "Append": _rule(_USERS, Scope.SESSION, Right.SEND, Right.CONTROL, Right.TOOL),
    "ListSessions": _rule(_USERS, Scope.LISTED, Right.READ),
    "Nodes": _rule(_USERS, Scope.NONE),
    "Tails": _rule(_USERS, Scope.SESSION, Right.READ),
    "DeleteSession": _rule(_USERS, Scope.SESSION, Right.ADMIN),
    "ExpireSessions": _rule(_USERS, Scope.TENANT, Right.ADMIN),
    "ExportSession": _rule(_USERS, Scope.SESSION, Right.READ),
    "ImportSession": _rule(_USERS, Scope.SESSION, Right.ADMIN),
    "Renew": _rule(_USERS, Scope.NONE),
    "Revoke": _rule(_USERS, Scope.PATTERN, Right.ADMIN),
}
_DECODE: Mapping[str, Rule] = {
    "Begin": _rule(_NODES, Scope.SESSION, Right.SEND),
    "Run": _rule(_NODES, Scope.SESSION, Right.SEND),
    "Probe": _rule(_NODES, Scope.NONE),
}
_HEALTH: Mapping[str, Rule] = {
    "Check": _rule(_EVERYBODY, Scope.NONE),
    "Watch": _rule(_EVERYBODY, Scope.NONE),
}
_REFLECTION: Mapping[str, Rule] = {"ServerReflectionInfo": _rule(_KEEPERS, Scope.NONE)}

# By the verb's full name, as gRPC has it: "/segue.v1.Agent/RunTurn".
RULES: Final[Mapping[str, Rule]] = MappingProxyType(
    {
        f"/{service}/{verb}": rule
        for service, rules in (
            ("segue.v1.Agent", _AGENT),
            ("segue.v1.Decode", _DECODE),
            ("grpc.health.v1.Health", _HEALTH),
            ("grpc.reflection.v1alpha.ServerReflection", _REFLECTION),
        )
        for verb, rule in rules.items()
    }
)

# Of the ops that a device may append (`ops.DEVICE_KINDS`), and of those that it will.
_OP_RIGHTS: Final[Mapping[type[ops.Op], Right]] = MappingProxyType(
    {
        ops.ToolCall: Right.TOOL,
        ops.ToolClaim: Right.TOOL,
        ops.ToolResult: Right.TOOL,
        ops.Set: Right.SEND,
        ops.Doc: Right.SEND,
        ops.Feedback: Right.SEND,
        ops.Control: Right.CONTROL,
    }
)


def check(principal: Principal, verb: str, session: str | None = None) -> None:
    """Whether the caller may use a verb. Asked twice where the rule is `per_session`: when the
    call comes in, without a session, and with each session that the request names.

    Args:
        verb: as gRPC has it, "/segue.v1.Agent/RunTurn".

    Raises:
        PermissionDenied: it may not; also of a verb that the table does not have.
    """
    rule = RULES.get(verb)
    if rule is None:
        raise PermissionDenied(
            "This node knows no rule for that call, and so denies it.",
            hint="Update the node, or the caller: they are of different versions.",
        )
    name = verb.rpartition("/")[2]
    if principal.speaker not in rule.kinds:
        kinds = ", ".join(sorted(rule.kinds))
        raise PermissionDenied(
            f"{name} is not for the kind {principal.speaker}.",
            hint=f"It is for these: {kinds}.",
            verb=name,
        )
    if rule.rights and not rule.rights & principal.rights:
        raise _lacks(name, rule.rights)
    if rule.scope is Scope.TENANT and not principal.sees_all:
        raise PermissionDenied(
            f"{name} is about all sessions of the tenant, and the caller may see some of them.",
            hint='Ask for a token with the sessions ["*"].',
            verb=name,
        )
    if session is None:
        return
    if rule.scope is Scope.PATTERN and session.endswith("*"):
        if not any(covers(one, session) for one in principal.sessions):
            raise PermissionDenied(
                "The caller may see only some of the sessions that it names.",
                hint="Ask for a token that covers all of them.",
                session=session,
            )
        return
    check_session(principal, session)


def check_session(principal: Principal, session: str) -> None:
    """Raises PermissionDenied where the caller's sessions do not cover that one."""
    if not principal.may_see(session):
        raise PermissionDenied(
            "The caller may not see the session that it names.",
            hint="Ask for a token that names this session, or the beginning of its name and *.",
            session=session,
        )


def access_revoked(session: str = "") -> Revoked:
    """What is said to a device whose tokens for that session ("": for all) were made void."""
    return Revoked(
        f"This device's access{' to the session' if session else ''} was revoked.",
        hint="Ask whoever issues the tokens for a new one, half a minute later.",
        session=session,
    )


def may_create(principal: Principal) -> bool:
    """Whether opening a session that is not there makes it; who may only read is told NotFound."""
    return Right.SEND in principal.rights


def may_append(principal: Principal) -> bool:
    """Whether there is any op that it may append."""
    return bool(principal.rights & {Right.SEND, Right.CONTROL, Right.TOOL})


def check_op(principal: Principal, op: ops.Op) -> None:
    """Whether the caller may append that op. Raises PermissionDenied."""
    right = _OP_RIGHTS.get(type(op))
    if right is None:
        raise PermissionDenied(
            f"A caller does not append {type(op).__name__} itself.",
            hint="Whoever owns the turn writes that into the log.",
        )
    if right not in principal.rights:
        raise _lacks(f"Append of {type(op).__name__}", frozenset({right}))


def _lacks(what: str, rights: frozenset[Right]) -> PermissionDenied:
    names = " or ".join(sorted(rights))
    return PermissionDenied(
        f"{what} needs the right {names}, which the caller does not have.",
        hint=f"Ask for a token with it (ops: {names}).",
        verb=what,
        rights=names,
    )
