"""gRPC over TLS, with real servers: who is let in, what is said to who is not, and rotation."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509

from segue_contract.errors import InvalidArgument, NotLoopback, SegueError, Unreachable
from segue_contract.transport.channel import open_channel
from segue_contract.transport.gate import Gate
from segue_contract.transport.server import RunningServer, start_server
from segue_contract.transport.status import error_from_rpc
from segue_contract.transport.tls import TlsFiles, check_node_name, peer_name
from tests.support.certificates import Authority, replace
from tests.support.principals import KnownTokens

HERE = "127.0.0.2"  # reached as another machine is: by an address that certificates must name
_WHO = "/tests.Who/Ask"
_STREAM = "/tests.Who/Stream"


class Who(grpc.GenericRpcHandler):
    """Answers with the peer's name and its token; a stream of numbers, as they are let go."""

    def __init__(self) -> None:
        self.go = asyncio.Event()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        if handler_call_details.method == _WHO:
            return grpc.unary_unary_rpc_method_handler(self._ask)
        if handler_call_details.method == _STREAM:
            return grpc.unary_stream_rpc_method_handler(self._stream)
        return None

    async def _ask(self, request: bytes, context: Any) -> bytes:
        headers = dict(context.invocation_metadata())
        return f"{peer_name(context)}|{headers.get('authorization', '')}".encode()

    async def _stream(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield b"first"
        await self.go.wait()
        yield b"last"


class Unchecked(Gate):
    """The verbs here have no rule, and would be denied."""

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        return await continuation(handler_call_details)


@asynccontextmanager
async def serving(tls: TlsFiles | None, who: Who | None = None, **more: Any) -> AsyncIterator[Any]:
    asked = who or Who()

    def add(server: grpc.aio.Server) -> None:
        server.add_generic_rpc_handlers((asked,))

    running = await start_server(
        HERE, 0, [("tests.Who", add)], tls=tls, gate=Unchecked("default"), **more
    )
    try:
        yield running
    finally:
        await running.stop(0)


async def ask(
    address: str, tls: TlsFiles | None = None, token: Callable[[], str] | None = None
) -> str:
    """Raises the typed error of a call that failed."""
    channel = open_channel(address, tls=tls, token=token)
    try:
        answer: bytes = await channel.unary_unary(_WHO)(b"", timeout=20)
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from error
    finally:
        await channel.close()
    return answer.decode()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


async def test_a_client_with_the_authority_speaks_others_are_told_why(
    authority: Authority, tmp_path: Path
) -> None:
    other = Authority(tmp_path, "other")
    async with serving(authority.issue("node", HERE)) as node:
        assert await ask(node.address, authority.believed) == "|"
        with pytest.raises(Unreachable, match="none of the authorities") as caught:
            await ask(node.address, other.believed)
        assert "SEGUE_CA" in caught.value.hint
        with pytest.raises(Unreachable, match="none of the authorities"):
            await ask(node.address, TlsFiles())  # public authorities
        with pytest.raises(Unreachable, match="may want TLS"):
            await ask(node.address)
    async with serving(None) as node:
        with pytest.raises(Unreachable, match="does not speak TLS"):
            await ask(node.address, authority.believed)


@pytest.mark.parametrize(
    ("host", "begins", "reason"),
    [
        ("other.example", 0, "for other names"),
        (HERE, -3, "has expired"),
        (HERE, 1, "not valid yet"),
    ],
)
async def test_a_certificate_that_is_not_right_is_named(
    authority: Authority, host: str, begins: int, reason: str
) -> None:
    files = authority.issue("node", host, now=datetime.now(UTC) + timedelta(days=begins))
    async with serving(files) as node:
        with pytest.raises(Unreachable, match=reason):
            await ask(node.address, authority.believed)


async def test_nodes_are_known_by_their_certificates(authority: Authority, tmp_path: Path) -> None:
    files = authority.issue("node", HERE)
    edge = authority.issue("edge", "edge.example", name="edge/berlin/one")
    stranger = Authority(tmp_path, "other").issue("stranger", name="edge/berlin/one")
    stranger = TlsFiles(stranger.certificate, stranger.key, authority.file)
    async with serving(files, node_port=0) as node:
        at_node_port = f"{HERE}:{node.node_port}"
        assert await ask(node.address, authority.believed) == "|"
        assert await ask(node.address, edge) == "|"  # not asked for there
        assert await ask(at_node_port, edge) == "edge/berlin/one|"
        operator = authority.issue("ann", name="operator/ann")
        assert await ask(at_node_port, operator) == "operator/ann|"
        for refused in (authority.believed, stranger):
            with pytest.raises(Unreachable, match="client certificate"):
                await ask(at_node_port, refused)
    async with serving(files, clients="required") as node:
        assert await ask(node.address, edge) == "edge/berlin/one|"
        with pytest.raises(Unreachable, match="client certificate"):
            await ask(node.address, authority.believed)


@pytest.mark.parametrize(
    "names",
    [
        (),
        (b"edge/berlin/one",),
        (b"segue:edge/berlin",),
        (b"segue:edge/berlin/#",),
        (b"segue:operator/x/y",),
        (b"segue:operator/",),
        (b"segue:edge/\xff/one",),
        (b"segue:edge/berlin/one", b"segue:cloud/one"),
    ],
)
def test_a_certificate_without_one_name_of_a_node_names_none(names: tuple[bytes, ...]) -> None:
    assert peer_name(_Context(names)) == ""
    assert peer_name(_Context((b"edge.example", b"segue:cloud/one"))) == "cloud/one"
    assert peer_name(_Context((b"segue:cloud/one",), [b"insecure"])) == ""


class _Context:
    def __init__(self, names: tuple[bytes, ...], kind: Sequence[bytes] = (b"ssl",)) -> None:
        self._facts = {
            "transport_security_type": list(kind),
            "peer_uri": names,
            "x509_subject_alternative_name": (b"segue:edge/of/mail", *names),
        }

    def auth_context(self) -> dict[str, Sequence[bytes]]:
        return self._facts


async def test_a_rotated_certificate_is_used_at_once_and_streams_go_on(
    authority: Authority,
) -> None:
    files = authority.issue("node", HERE)
    who = Who()
    async with serving(files, who) as node, open_channel(node.address, tls=files) as channel:
        stream = channel.unary_stream(_STREAM)(b"", timeout=60)
        assert await stream.read() == b"first"
        over = asyncio.Event()
        asking = [
            asyncio.create_task(_ask_on(node.address, authority.believed, over)) for _ in range(2)
        ]
        seen = {await asyncio.to_thread(_shown, node)}
        for rotation in range(3):
            authority.issue("node", HERE)
            seen.add(await asyncio.to_thread(_shown, node))
            assert len(seen) == 2 + rotation
            assert await ask(node.address, authority.believed) == "|"
        over.set()
        assert min(await asyncio.gather(*asking)) > 0
        who.go.set()
        assert await stream.read() == b"last"


async def test_broken_files_keep_the_last_good_ones(authority: Authority, tmp_path: Path) -> None:
    files = authority.issue("node", HERE)
    assert files.certificate is not None
    assert files.key is not None
    chain, key = files.certificate.read_bytes(), files.key.read_bytes()
    others = authority.issue("others", HERE)
    assert others.key is not None
    async with serving(files) as node:
        good = _shown(node)
        for path, data in (
            (files.certificate, b""),
            (files.certificate, chain[: len(chain) // 2]),
            (files.key, b"-----BEGIN PRIVATE KEY-----\n"),
            (files.key, others.key.read_bytes()),  # of another certificate
        ):
            replace(path, data)
            assert _shown(node) == good
            assert await ask(node.address, authority.believed) == "|"
        files.key.unlink()
        assert _shown(node) == good
        replace(files.key, key)
        authority.issue("node", HERE)
        assert _shown(node) != good


async def test_a_new_authority_lets_its_clients_in(authority: Authority, tmp_path: Path) -> None:
    files = authority.issue("node", HERE)
    later = Authority(tmp_path, "later")
    edge = later.issue("edge", name="edge/berlin/one")
    edge = TlsFiles(edge.certificate, edge.key, authority.file)
    async with serving(files, clients="required") as node:
        with pytest.raises(Unreachable):
            await ask(node.address, edge)
        replace(authority.file, authority.file.read_bytes() + later.file.read_bytes())
        assert await ask(node.address, edge) == "edge/berlin/one|"


async def test_a_token_goes_with_each_call(authority: Authority) -> None:
    tokens = iter(("a.b.c", "d.e.f"))
    async with serving(authority.issue("node", HERE)) as node:
        channel = open_channel(node.address, tls=authority.believed, token=lambda: next(tokens))
        async with channel:
            method = channel.unary_unary(_WHO)
            assert await method(b"") == b"|Bearer a.b.c"
            assert await method(b"", metadata=(("x", "y"),)) == b"|Bearer d.e.f"
    async with serving(None) as node:
        assert await ask(node.address, token=lambda: "a.b.c") == "|Bearer a.b.c"


@pytest.mark.parametrize("token", ["", "a b", "a\nb", "tökén-hunter2"])
async def test_what_is_no_token_is_not_sent_nor_shown(token: str) -> None:
    async with serving(None) as node:
        with pytest.raises(InvalidArgument, match="token") as caught:
            await ask(node.address, token=lambda: token)
        assert "hunter2" not in str(caught.value)


def test_a_token_does_not_leave_this_machine_in_the_open() -> None:
    for target in ("192.0.2.1:7411", "cloud.example:7412"):
        with pytest.raises(InvalidArgument, match="unencrypted"):
            open_channel(target, token=lambda: "a.b.c")


async def test_off_loopback_only_with_both_and_the_error_names_what_is_missing(
    authority: Authority,
) -> None:
    files = authority.issue("node", HERE)
    gate = Gate("default", KnownTokens())
    for more, missing, given in (
        ({}, ("--tls-cert", "--tenant-keys"), ()),
        ({"tls": files}, ("--tenant-keys",), ("--tls-cert",)),
        # any certificate of the authority would be everybody
        ({"tls": files, "clients": "required"}, ("--tenant-keys",), ("--tls-cert",)),
        ({"gate": gate}, ("--tls-cert",), ("--tenant-keys",)),
    ):
        with pytest.raises(NotLoopback) as caught:
            await start_server("0.0.0.0", 0, [], **more)  # type: ignore[arg-type]
        assert all(flag in caught.value.hint for flag in missing)
        assert not any(flag in caught.value.hint for flag in given)
    running: RunningServer = await start_server("0.0.0.0", 0, [], tls=files, gate=gate)
    await running.stop(0)


@pytest.mark.parametrize("broken", ["certificate", "key", "ca", "pair"])
async def test_a_listener_does_not_start_with_broken_files(
    authority: Authority, broken: str
) -> None:
    files = authority.issue("node", HERE)
    if broken == "pair":
        other = authority.issue("other", HERE)
        files = TlsFiles(other.certificate, files.key, files.ca)
    else:
        getattr(files, broken).write_text("no PEM")
    with pytest.raises(InvalidArgument) as caught:
        async with serving(files, clients="required"):
            pass
    assert "no PEM" not in str(caught.value)


async def test_a_port_for_nodes_needs_certificates() -> None:
    with pytest.raises(InvalidArgument, match="--tls-cert"):
        async with serving(None, node_port=0):
            pass


@pytest.mark.parametrize("name", ["edge/a/b", "cloud/a", "edge/A-1/b_2.c", "operator/ann"])
def test_names_of_nodes(name: str) -> None:
    assert check_node_name(name) == name


@pytest.mark.parametrize("name", ["", "edge/a", "edge/a/b/c", "cloud/a/b", "edge/a/+", "edge/ä/b",
                                  "cloud/a\n", "device/a"])  # fmt: skip
def test_what_is_no_name_of_a_node(name: str) -> None:
    with pytest.raises(SegueError):
        check_node_name(name)


def _shown(node: RunningServer) -> int:
    """The serial number of the certificate that a new connection is shown."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((node.host, node.port), timeout=20) as plain,
        context.wrap_socket(plain) as secure,
    ):
        data = secure.getpeercert(binary_form=True)
    assert data is not None
    return x509.load_der_x509_certificate(data).serial_number


async def _ask_on(address: str, tls: TlsFiles, over: asyncio.Event) -> int:
    """New connections, one after another, until `over`; each must be served."""
    asked = 0
    while not over.is_set():
        await ask(address, tls)
        asked += 1
    return asked
