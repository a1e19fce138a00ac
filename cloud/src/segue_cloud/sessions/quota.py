"""What a session may hold, and what ops take of it. The script counts: see append.lua."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

from segue_contract.errors import QuotaExceeded
from segue_contract.ids import SessionName
from segue_contract.limits import MIB, SessionQuotas
from segue_contract.sync.ops import Doc, Op, Set, ToolClaim, ToolResult
from segue_contract.sync.state import SessionState

_NOTHING = "-" * 17


def slots(ops: Iterable[Op]) -> str:
    """What each op takes, 17 characters an op: "v" (a value), "d" (a doc) or "k" (something that is
    kept besides), and 64 bits of its name's hash in hex, so that equal names count once.
    """
    return "".join(map(_slot, ops))


def _slot(op: Op) -> str:
    match op:
        case Set():
            return "v" + _hash(op.name)
        case Doc():
            return "d" + _hash(op.name)
        case ToolClaim() | ToolResult():
            return "k" + _NOTHING[1:]
        case _:
            return _NOTHING


def _hash(name: str) -> str:
    return blake2b(name.encode(errors="surrogatepass"), digest_size=8).hexdigest()


def taken(state: SessionState) -> tuple[list[str], dict[str, int]]:
    """The slots of a whole session's names, and the script's counters."""
    names = ["v" + _hash(name) for name in state.values] + [
        "d" + _hash(name) for name in state.docs
    ]
    kept = sum(map(len, state.docs.values())) + len(state.claims) + len(state.results)
    return names, {"qv": len(state.values), "qd": len(state.docs), "qk": kept}


def quota_exceeded(session: SessionName, what: str, quotas: SessionQuotas) -> QuotaExceeded:
    """`what`: "bytes", "values", "docs" or "kept_ops"."""
    limit = getattr(quotas, what)
    shown, hint = {
        "bytes": (
            f"{limit / MIB:g} MiB, folded",
            'Set large values to b"", or begin a new session.',
        ),
        "values": (f"{limit} named values", "Set one of those that there are."),
        "docs": (f"{limit} documents", "Write into one of those that there are."),
        "kept_ops": (
            f"{limit} updates of documents, claims and results of tool calls",
            "Begin a new session.",
        ),
    }[what]
    return QuotaExceeded(
        f"The session {session.session} has no room for it: it may have {shown}.",
        hint=hint,
        limit=limit,
        what=what,
    )
