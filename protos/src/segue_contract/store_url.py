"""Where the session store is: one server, a primary that Sentinels name, or a Cluster.

    redis://[user:password@]host[:port][/db]                      one server
    redis+sentinel://[user:password@]host[:port],.../name[/db]  these Sentinels' primary `name`
    redis://[user:password@]host[:port],...?cluster=1             a Cluster with these nodes

rediss:// and rediss+sentinel:// are the same with TLS, unix://path is a socket. User and password
are those of the store; `sentinel_username` and `sentinel_password` those of the Sentinels.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit, urlunsplit

from segue_contract.errors import InvalidArgument
from segue_contract.urls import without_password

Address = tuple[str, int]

STORE_PORT, SENTINEL_PORT = 6379, 26379
_SENTINEL = "+sentinel"
_OWN = ("cluster", "sentinel_username", "sentinel_password")
_FORMS = (
    "Write redis://host:port, redis+sentinel://host:port,host:port/NAME, or "
    "redis://host:port,host:port?cluster=1."
)


class StoreKind(StrEnum):
    ONE = "one"
    SENTINEL = "sentinel"
    CLUSTER = "cluster"


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


def _parse(url: str, parts: SplitResult, query: dict[str, str]) -> StoreUrl:
    if parts.scheme == "unix":
        return StoreUrl(StoreKind.ONE, (), url, without_password(url))
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
    rest = {name: value for name, value in query.items() if name not in _OWN}
    host = places if kind is StoreKind.ONE else _written(seeds[0])
    username, _, password = login.partition(":")
    return StoreUrl(
        kind=kind,
        seeds=seeds,
        plain=urlunsplit((scheme, login + at + host, path, urlencode(rest), "")),
        shown=without_password(url),
        service=unquote(service),
        username=unquote(username),
        password=unquote(password),
        sentinel_username=query.get("sentinel_username", ""),
        sentinel_password=query.get("sentinel_password", ""),
    )


def _address(place: str, port: int) -> Address:
    """Of host, host:port or [v6]:port."""
    parts = urlsplit(f"//{place}")
    if not parts.hostname:
        raise _Wrong("a host is missing")
    return unquote(parts.hostname), parts.port if parts.port is not None else port


def _written(address: Address) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
