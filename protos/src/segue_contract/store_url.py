"""Where the session store is: one server, a primary that Sentinels name, or a Cluster.

    redis://[user:password@]host[:port][/db]                      one server
    redis+sentinel://[user:password@]host[:port],.../name[/db]  these Sentinels' primary `name`
    redis://[user:password@]host[:port],...?cluster=1             a Cluster with these nodes

rediss:// and rediss+sentinel:// are the same with TLS, unix://path is a socket. Whom TLS believes,
and our certificate: `ssl_ca_certs`, `ssl_certfile` and `ssl_keyfile`, paths of PEM files. User and
password are those of the store; `sentinel_username` and `sentinel_password` those of the Sentinels.
`wait=off|on|strict`, `wait_replicas=1`, `wait_ms=100`: how the store's replicas are waited for.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit, urlunsplit

from segue_contract.errors import InvalidArgument
from segue_contract.limits import STORE_WAIT_MAX_MS, STORE_WAIT_MAX_REPLICAS, STORE_WAIT_MS
from segue_contract.transport.hosts import is_loopback
from segue_contract.urls import without_password

Address = tuple[str, int]

STORE_PORT, SENTINEL_PORT = 6379, 26379
_SENTINEL = "+sentinel"
_OWN = (
    "cluster", "sentinel_username", "sentinel_password", "wait", "wait_replicas", "wait_ms",
)  # fmt: skip
_FORMS = (
    "Write redis://host:port, redis+sentinel://host:port,host:port/NAME, or "
    "redis://host:port,host:port?cluster=1."
)


class StoreKind(StrEnum):
    ONE = "one"
    SENTINEL = "sentinel"
    CLUSTER = "cluster"


@dataclass(frozen=True)
class WaitPolicy:
    """For how many replicas a turn's lease and end wait, and how long at most.

    `replicas` 0: for none. `strict`: what too few replicas have counts as not written.
    """

    replicas: int = 1
    timeout_ms: int = STORE_WAIT_MS
    strict: bool = False


@dataclass(frozen=True)
class StoreUrl:
    """A store's URL, taken apart.

    Attributes:
        seeds: the servers, Sentinels or Cluster nodes that it names; empty for unix://.
        service: what the Sentinels call the primary.
        plain: what is left of it, for one server, in the form that redis-py takes; with the
            password.
        shown: fit for a log or an error.
    """

    kind: StoreKind
    seeds: tuple[Address, ...]
    plain: str
    shown: str
    service: str = ""
    username: str = ""
    password: str = ""
    sentinel_username: str = ""
    sentinel_password: str = ""
    wait: WaitPolicy = WaitPolicy()


class _Wrong(ValueError):
    """What it says shows nothing of the URL."""


def parse_store_url(url: str) -> StoreUrl:
    """Raises InvalidArgument, without the password, where it is no such URL."""
    try:
        parts = urlsplit(url)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        return _parse(url, parts, query)
    except ValueError as error:
        shown = without_password(url)
        # What the parser says may quote a part of the password, in a traceback, too.
        reason = f": {error}" if shown == url or isinstance(error, _Wrong) else ""
        raise InvalidArgument(f"{shown!r} is no Redis address{reason}.", hint=_FORMS) from None


def check_login_stays(url: str, *, trusted: bool = False) -> str:
    """Return `url` where its login, and all that is stored, stays on this machine or has TLS.

    Args:
        trusted: an operator's word that nobody else listens on the network in between.

    Raises:
        InvalidArgument: a password would leave this machine unencrypted.
    """
    store = parse_store_url(url)
    far = [host for host, _ in store.seeds if not is_loopback(host)]
    secret = store.password or store.sentinel_password
    if far and secret and not trusted and not urlsplit(url).scheme.startswith("rediss"):
        raise InvalidArgument(
            f"The store's password, and every session, would travel to {far[0]} unencrypted.",
            hint="Write rediss:// (--redis-ca FILE); or, in a network of your own that nobody else "
            "listens to, give --redis-trusted-network.",
        )
    return url


def with_tls_files(url: str, *, ca: str = "", certificate: str = "", key: str = "") -> str:
    """`url`, with these PEM files where it has TLS and names none itself."""
    parts = urlsplit(url)
    if parts.scheme not in ("rediss", f"rediss{_SENTINEL}"):
        return url
    named = {name for name, _ in parse_qsl(parts.query, keep_blank_values=True)}
    added = {}
    if ca and "ssl_ca_certs" not in named:
        added["ssl_ca_certs"] = ca
    if certificate and "ssl_certfile" not in named:
        added.update(ssl_certfile=certificate, ssl_keyfile=key)
    if not added:
        return url
    query = "&".join(part for part in (parts.query, urlencode(added)) if part)
    return f"{url.partition('?')[0]}?{query}"


def _parse(url: str, parts: SplitResult, query: dict[str, str]) -> StoreUrl:
    rest = urlencode({name: value for name, value in query.items() if name not in _OWN})
    wait = _wait_policy(query)
    if parts.scheme == "unix":
        plain = f"unix://{parts.netloc}{parts.path}{'?' if rest else ''}{rest}"
        return StoreUrl(StoreKind.ONE, (), plain, without_password(url), wait=wait)
    scheme = parts.scheme.removesuffix(_SENTINEL)
    if scheme not in ("redis", "rediss"):
        raise _Wrong("it begins with none of redis://, rediss://, redis+sentinel://, unix://")
    kind = StoreKind.ONE
    if scheme != parts.scheme:
        kind = StoreKind.SENTINEL
    elif "cluster" in query:
        if query["cluster"] != "1":
            raise _Wrong("cluster may be 1")
        kind = StoreKind.CLUSTER
    login, at, places = parts.netloc.rpartition("@")
    port = SENTINEL_PORT if kind is StoreKind.SENTINEL else STORE_PORT
    seeds = tuple(_address(place, port) for place in places.split(","))
    if kind is StoreKind.ONE and len(seeds) > 1:
        raise _Wrong("only Sentinels and Clusters (?cluster=1) have several addresses")
    service, path = "", parts.path
    if kind is StoreKind.SENTINEL:
        service, _, database = parts.path.removeprefix("/").partition("/")
        if not service:
            raise _Wrong("the name of the primary is missing")
        path = f"/{database}" if database else ""
    elif kind is StoreKind.CLUSTER and parts.path.strip("/0"):
        raise _Wrong("a Cluster has only the database 0")
    host = places if kind is StoreKind.ONE else _written(seeds[0])
    username, _, password = login.partition(":")
    return StoreUrl(
        kind=kind,
        seeds=seeds,
        plain=urlunsplit((scheme, login + at + host, path, rest, "")),
        shown=without_password(url),
        service=unquote(service),
        username=unquote(username),
        password=unquote(password),
        sentinel_username=query.get("sentinel_username", ""),
        sentinel_password=query.get("sentinel_password", ""),
        wait=wait,
    )


def _wait_policy(query: dict[str, str]) -> WaitPolicy:
    mode = query.get("wait", "on")
    if mode not in ("off", "on", "strict"):
        raise _Wrong("wait may be off, on or strict")
    replicas = _number(query, "wait_replicas", 1, STORE_WAIT_MAX_REPLICAS)
    timeout_ms = _number(query, "wait_ms", STORE_WAIT_MS, STORE_WAIT_MAX_MS)
    return WaitPolicy(0 if mode == "off" else replicas, timeout_ms, mode == "strict")


def _number(query: dict[str, str], name: str, default: int, most: int) -> int:
    text = query.get(name, str(default))
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= most):
        raise _Wrong(f"{name} may be 1 to {most}")
    return int(text)


def _address(place: str, port: int) -> Address:
    """Of host, host:port or [v6]:port."""
    parts = urlsplit(f"//{place}")
    if not parts.hostname:
        raise _Wrong("a host is missing")
    return unquote(parts.hostname), parts.port if parts.port is not None else port


def _written(address: Address) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
