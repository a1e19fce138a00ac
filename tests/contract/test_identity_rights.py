"""Rights: a row for every verb that a server of ours answers, the same in the docs; else denied."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor import FileDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from hypothesis import given
from hypothesis import strategies as st

from segue_contract.errors import InvalidArgument, PermissionDenied, Unauthenticated
from segue_contract.identity.principal import (
    Kind,
    Principal,
    Right,
    check_session_pattern,
    local,
    of_certificate,
)
from segue_contract.identity.rights import (
    RULES,
    Scope,
    check,
    check_op,
    check_session,
    may_create,
)
from segue_contract.sync import ops
from segue_contract.v1 import agent_pb2, decode_pb2

DOCS = Path(__file__).parents[2] / "docs" / "security.md"
VERBS = sorted(RULES)

names = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,12}[A-Za-z0-9])?", fullmatch=True)
some_rights = st.frozensets(st.sampled_from(Right))


def device(rights: frozenset[Right], *sessions: str) -> Principal:
    return Principal(Kind.DEVICE, "acme", "phone", sessions or ("*",), rights)


def verbs_of(*files: FileDescriptor) -> Iterator[str]:
    for file in files:
        for service in file.services_by_name.values():
            yield from (f"/{service.full_name}/{method.name}" for method in service.methods)


def test_every_verb_has_a_rule_and_every_rule_a_verb() -> None:
    served = verbs_of(
        agent_pb2.DESCRIPTOR,
        decode_pb2.DESCRIPTOR,
        health_pb2.DESCRIPTOR,
        reflection_pb2.DESCRIPTOR,
    )
    assert sorted(served) == VERBS


def test_the_table_of_the_docs_is_the_table() -> None:
    rows = re.findall(
        r"^\| `([\w.]+)/(\w+)` \| (.+?) \| (.+?) \| (.+?) \|$", DOCS.read_text(), re.M
    )
    shown = {f"/{service}/{verb}": tuple(rest) for service, verb, *rest in rows}
    assert shown == {
        verb: (
            ", ".join(kind.value for kind in Kind if kind in rule.kinds),
            " or ".join(right.value for right in Right if right in rule.rights) or "none",
            rule.scope.value,
        )
        for verb, rule in RULES.items()
    }


def test_a_rule_of_sessions_is_one_whose_request_names_sessions() -> None:
    for service in (agent_pb2.DESCRIPTOR.services_by_name["Agent"],):
        for method in service.methods:
            fields = {field.name for field in method.input_type.fields}
            named = bool(fields & {"session", "sessions"})
            assert RULES[f"/{service.full_name}/{method.name}"].per_session == named, method.name


@given(verb=st.text(max_size=40) | names.map(lambda name: f"/segue.v1.Agent/{name}"))
def test_an_unknown_verb_is_denied_even_to_who_may_do_all(verb: str) -> None:
    if verb in RULES:
        return
    with pytest.raises(PermissionDenied, match="no rule"):
        check(local("acme"), verb)


@given(verb=st.sampled_from(VERBS), rights=some_rights)
def test_a_verb_is_denied_without_its_right(verb: str, rights: frozenset[Right]) -> None:
    rule = RULES[verb]
    caller = device(rights)
    if Kind.DEVICE in rule.kinds and (not rule.rights or rule.rights & rights):
        check(caller, verb, "trip")
    else:
        with pytest.raises(PermissionDenied) as caught:
            check(caller, verb, "trip")
        assert caught.value.hint


def test_without_rights_a_device_may_ask_for_health_and_nodes_and_renew_alone() -> None:
    allowed = []
    for verb in VERBS:
        try:
            check(device(frozenset()), verb, "trip")
        except PermissionDenied:
            continue
        allowed.append(verb)
    assert allowed == [
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/Watch",
        "/segue.v1.Agent/Nodes",
        "/segue.v1.Agent/Renew",
    ]


@pytest.mark.parametrize("verb", VERBS)
def test_a_local_caller_may_do_all(verb: str) -> None:
    check(local("acme"), verb)
    check(local("acme"), verb, "trip")


@pytest.mark.parametrize("verb", [verb for verb in VERBS if RULES[verb].per_session])
def test_a_session_that_the_caller_may_not_see_is_denied(verb: str) -> None:
    caller = device(frozenset(Right), "trip", "user-7.*")
    if verb.startswith("/segue.v1.Decode/"):
        caller = caller.through(of_certificate("edge/shop/one"))
    check(caller, verb)
    check(caller, verb, "trip")
    check(caller, verb, "user-7.notes")
    if RULES[verb].scope is Scope.PATTERN:
        check(caller, verb, "user-7.*")
        check(caller, verb, "user-7.a*")
    else:
        with pytest.raises(PermissionDenied):
            check(caller, verb, "user-7.*")
    for other in ("trips", "tri", "user-7", "user-71", "", "*", "user-*", "trip*", "Trip"):
        with pytest.raises(PermissionDenied):
            check(caller, verb, other)


def test_expiring_sessions_asks_for_all_of_them() -> None:
    expire = "/segue.v1.Agent/ExpireSessions"
    assert RULES[expire].scope is Scope.TENANT
    check(device(frozenset({Right.ADMIN})), expire)
    with pytest.raises(PermissionDenied, match="all sessions"):
        check(device(frozenset({Right.ADMIN}), "user-7.*"), expire)


def test_only_nodes_speak_to_the_decoder() -> None:
    begin = "/segue.v1.Decode/Begin"
    with pytest.raises(PermissionDenied, match="not for the kind device"):
        check(device(frozenset(Right)), begin, "trip")
    edge = of_certificate("edge/shop/one")
    check(edge, begin, "trip")
    check(device(frozenset({Right.SEND}), "trip").through(edge), begin, "trip")
    with pytest.raises(PermissionDenied, match="right send"):
        check(device(frozenset({Right.READ}), "trip").through(edge), begin, "trip")


def test_an_operator_reads_no_session() -> None:
    operator = of_certificate("operator/ann")
    for verb in VERBS:
        if verb.startswith("/segue."):
            with pytest.raises(PermissionDenied):
                check(operator, verb)
        else:
            check(operator, verb)
    with pytest.raises(PermissionDenied):
        check_session(operator, "trip")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("edge/shop/one", Kind.EDGE), ("cloud/a", Kind.CLOUD), ("operator/ann", Kind.OPERATOR)],
)
def test_certificates_name_nodes(name: str, kind: Kind) -> None:
    found = of_certificate(name)
    assert (found.kind, found.name, found.tenant, found.expires_s) == (kind, name, "", math.inf)
    assert Right.ADMIN not in found.rights


@pytest.mark.parametrize(
    "name",
    ["", "edge", "edge/one", "edge/a/b/c", "cloud/a/b", "cloud/", "device/x", "local/x", "edge/*/a",
     "edge/a/+", "cloud/#", "EDGE/a/b", "cloud/a\n"],
)  # fmt: skip
def test_other_certificates_name_nobody(name: str) -> None:
    with pytest.raises(Unauthenticated):
        of_certificate(name)


def test_only_an_edge_speaks_for_a_device() -> None:
    phone = device(frozenset(Right))
    for node in ("cloud/a", "operator/ann"):
        with pytest.raises(PermissionDenied, match="no device"):
            phone.through(of_certificate(node))
    assert phone.through(of_certificate("edge/shop/one")).speaker is Kind.EDGE


@given(sessions=st.lists(names | names.map(lambda name: f"{name}*"), max_size=4), session=names)
def test_a_pattern_covers_its_name_or_what_begins_so(sessions: list[str], session: str) -> None:
    covered = device(frozenset(), *(sessions or ["none"])).may_see(session)
    told = any(
        session.startswith(one[:-1]) if one[-1] == "*" else session == one for one in sessions
    )
    assert covered == told


@pytest.mark.parametrize("pattern", ["*", "trip", "trip*", "user-7.*", "a-*", "x" * 63 + "*"])
def test_patterns_that_may_stand_in_a_token(pattern: str) -> None:
    assert check_session_pattern(pattern) == pattern


@pytest.mark.parametrize(
    "pattern",
    ["", "**", "a*b", "*a", "a**", "+", "a+*", "#", "a/#", "a/*", ".*", "-*", "ä*", "a *",
     "x" * 64 + "*"],
)  # fmt: skip
def test_wildcards_elsewhere_are_refused(pattern: str) -> None:
    with pytest.raises(InvalidArgument):
        check_session_pattern(pattern)


# -- what a device appends ----------------------------------------------------------------------

EXAMPLES: list[tuple[ops.Op, Right]] = [
    (ops.ToolCall(id="a", turn="t", call="c", name="n"), Right.TOOL),
    (ops.ToolClaim(id="a", call="c"), Right.TOOL),
    (ops.ToolResult(id="a", call="c"), Right.TOOL),
    (ops.Set(id="a", name="n", value=b""), Right.SEND),
    (ops.Doc(id="a", name="n", update=b""), Right.SEND),
    (ops.Feedback(id="a", turn="t", value="+"), Right.SEND),
    (ops.Control(id="a", holder="phone", epoch=1), Right.CONTROL),
]


def test_every_op_of_devices_asks_for_a_right() -> None:
    assert set(ops.DEVICE_KINDS) <= {type(op) for op, _ in EXAMPLES}


@pytest.mark.parametrize(("op", "right"), EXAMPLES, ids=lambda value: type(value).__name__)
def test_an_op_is_denied_without_its_right(op: ops.Op, right: Right) -> None:
    check_op(device(frozenset({right})), op)
    check(device(frozenset({right})), "/segue.v1.Agent/Append", "trip")
    with pytest.raises(PermissionDenied, match=right.value):
        check_op(device(frozenset(Right) - {right}), op)


def test_what_the_owner_of_a_turn_writes_no_caller_appends() -> None:
    for op in (ops.UserMessage(id="a", turn="t", text=""), ops.Unknown(id="a")):
        with pytest.raises(PermissionDenied, match="itself"):
            check_op(local("acme"), op)


def test_only_who_may_send_makes_sessions() -> None:
    assert may_create(device(frozenset({Right.SEND})))
    assert not may_create(device(frozenset(Right) - {Right.SEND}))
