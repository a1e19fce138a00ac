"""Pure: who makes a call, as a value, whatever proved it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum

from segue_contract.errors import InvalidArgument, PermissionDenied, UnknownNode
from segue_contract.ids import check_id

ALL_SESSIONS = ("*",)


class Kind(StrEnum):
    LOCAL = "local"  # a process of this machine, on an open loopback listener
    DEVICE = "device"  # an app instance, by a session token
    EDGE = "edge"  # these three by a certificate
    CLOUD = "cloud"
    OPERATOR = "operator"


class Right(StrEnum):
    """What a token's `ops` may hold: a closed set."""

    READ = "read"  # sessions, their logs, who is there
    SEND = "send"  # messages, values, documents; makes sessions
    STOP = "stop"  # a running turn
    CONTROL = "control"  # take and give the right to act in a session
    TOOL = "tool"  # claim tool calls and answer them
    ADMIN = "admin"  # delete, expire and import sessions


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls. Make one with `local`, `of_certificate` or a `TokenChecker`.

    Attributes:
        tenant: of a device, and of LOCAL; "" for nodes and operators, who serve all tenants.
        name: a device's id; "edge/<site>/<name>" or "cloud/<name>" of a certificate's SAN; an
            operator's "operator/<name>".
        sessions: exact names, or a prefix with "*" at its end; ("*",): all of the tenant.
        expires_s: Unix seconds; inf: never. A call that goes on longer ends some time after it.
        issued_s: Unix seconds from which its token is valid; what was revoked before is void.
        token_id: of its token, for logs.
        device_key: RFC 7638 thumbprint of the key that its token is bound to; "": to none.
        via: name of the edge that speaks for it, where the connection bears an edge's certificate.
    """

    kind: Kind
    tenant: str
    name: str
    sessions: tuple[str, ...]
    rights: frozenset[Right]
    expires_s: float = math.inf
    issued_s: float = 0.0
    token_id: str = ""
    device_key: str = ""
    via: str = ""

    def may_see(self, session: str) -> bool:
        """Whether its sessions cover that one; what it may do there, its rights say."""
        return any("*" not in session and covers(one, session) for one in self.sessions)

    @property
    def sees_all(self) -> bool:
        """Every session of its tenant, those to come too."""
        return "*" in self.sessions

    @property
    def speaker(self) -> Kind:
        """The kind of whoever is at the other end of the connection."""
        return Kind.EDGE if self.via else self.kind

    def through(self, node: Principal) -> Principal:
        """The same caller, spoken for by an edge: a device's token on an edge's connection.

        Raises:
            PermissionDenied: `node` is no edge.
        """
        if node.kind is not Kind.EDGE:
            raise PermissionDenied(
                f"The kind {node.kind} speaks for no device.",
                hint="A device's token comes from the device itself or through an edge.",
            )
        return replace(self, via=node.name)


def local(tenant: str, name: str = "local") -> Principal:
    """The caller on an open loopback: all rights in the node's own tenant."""
    return Principal(Kind.LOCAL, tenant, name, ALL_SESSIONS, frozenset(Right))


# What a node may do for itself, with no device behind it: an edge delivers turns that it served
# offline after their device's token ran out.
_NODE_RIGHTS = {
    Kind.EDGE: frozenset({Right.READ, Right.SEND}),
    Kind.CLOUD: frozenset[Right](),
    Kind.OPERATOR: frozenset[Right](),
}


def of_certificate(name: str) -> Principal:
    """Who bears a certificate that was verified, by the name in its SAN.

    Args:
        name: "edge/<site>/<name>", "cloud/<name>" or "operator/<name>".

    Raises:
        UnknownNode: another form, or a part that cannot be a name.
    """
    kind, *parts = name.split("/")
    wanted = {"edge": 2, "cloud": 1, "operator": 1}.get(kind)
    try:
        if len(parts) != wanted:
            raise InvalidArgument("It has another number of parts.")
        for part in parts:
            check_id(part, "node")
    except InvalidArgument as error:
        raise UnknownNode(
            "The certificate names neither an edge, a cloud nor an operator.",
            hint="Issue one whose SAN is edge/<site>/<name>, cloud/<name> or operator/<name>.",
        ) from error
    rights = _NODE_RIGHTS[Kind(kind)]
    return Principal(Kind(kind), "", name, ALL_SESSIONS if rights else (), rights)


def check_session_pattern(pattern: str) -> str:
    """Return `pattern` if it may stand among a principal's sessions: a session's name, the
    beginning of such names and "*", or "*".

    Raises:
        InvalidArgument: anything else; "*" stands at the end only.
    """
    begin, star = pattern.removesuffix("*"), pattern.endswith("*")
    if star and not begin:
        return pattern
    try:
        # A beginning may end where a name may not ("user-7."): with a letter behind it, it is one.
        check_id(begin + "x" if star else begin, "session")
    except InvalidArgument as error:
        raise InvalidArgument(
            f"{pattern!r} is neither a session's name nor the beginning of one and *.",
            hint=error.hint,
        ) from error
    return pattern


def covers(pattern: str, sessions: str) -> bool:
    """Whether a pattern holds a session, or all that another pattern holds."""
    if not pattern.endswith("*"):
        return bool(sessions) and sessions == pattern
    return bool(sessions) and sessions.startswith(pattern[:-1])
