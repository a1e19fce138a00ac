"""A store's URL, taken apart."""

from __future__ import annotations

import pytest

from segue_contract.errors import InvalidArgument
from segue_contract.store_url import StoreKind, WaitPolicy, check_login_stays, parse_store_url


def test_one_server() -> None:
    url = parse_store_url("redis://me:p%40w@h/3?socket_keepalive=1")
    assert (url.kind, url.seeds) == (StoreKind.ONE, (("h", 6379),))
    assert url.plain == "redis://me:p%40w@h/3?socket_keepalive=1"
    assert (url.username, url.password, url.shown) == ("me", "p@w", "redis://h/3")
    assert parse_store_url("unix:///run/valkey.sock").plain == "unix:///run/valkey.sock"


def test_sentinels_and_the_primarys_name() -> None:
    url = parse_store_url(
        "rediss+sentinel://u:pw@a,[::1]:7000/main/2?sentinel_username=s&sentinel_password=x%26y"
    )
    assert (url.kind, url.service) == (StoreKind.SENTINEL, "main")
    assert url.seeds == (("a", 26379), ("::1", 7000))
    assert url.plain == "rediss://u:pw@a:26379/2"
    assert (url.sentinel_username, url.sentinel_password) == ("s", "x&y")
    assert url.shown == "rediss+sentinel://a,[::1]:7000/main/2"


def test_a_cluster() -> None:
    url = parse_store_url("redis://:pw@a:1,b:2/0?cluster=1")
    assert (url.kind, url.seeds) == (StoreKind.CLUSTER, (("a", 1), ("b", 2)))
    assert (url.plain, url.password) == ("redis://:pw@a:1/0", "pw")


def test_how_replicas_are_waited_for() -> None:
    assert parse_store_url("redis://h").wait == WaitPolicy(replicas=1, timeout_ms=100)
    url = parse_store_url("unix:///s?db=1&wait=strict&wait_replicas=2&wait_ms=50")
    assert (url.wait, url.plain) == (WaitPolicy(2, 50, strict=True), "unix:///s?db=1")
    assert parse_store_url("redis://h?wait=off").wait.replicas == 0


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("redis://h?wait=yes", "off, on or strict"),
        ("redis://h?wait_ms=0", "1 to 1000"),
        ("redis://h?wait_replicas=x", "1 to 16"),
        ("redis+sentinel://a:1,b:2", "name of the primary"),
        ("redis+sentinel://a:1,/name", "host is missing"),
        ("redis://a:1,b:2", "several addresses"),
        ("redis://a:1/4?cluster=1", "database 0"),
        ("redis://a:1?cluster=yes", "cluster may be 1"),
        ("redis://a:x", "redis://host:port"),
        ("redis+cluster://a:1", "redis://"),
        ("", "redis://"),
    ],
)
def test_what_is_no_store(url: str, why: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_store_url(url)
    assert why in str(caught.value) + caught.value.hint


@pytest.mark.parametrize(
    "url", ["redis+sentinel://u:hunter2@a", "redis://u:hunter2@a,b", "redis://h?cluster=hunter2@b"]
)
def test_what_is_wrong_shows_no_password(url: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_store_url(url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "stays"),
    [
        ("redis://10.0.0.5", True),
        ("redis://:secret@localhost", True),
        ("redis://u:secret@[::1]:1", True),
        ("unix://:secret@/run/redis", True),
        ("rediss://u:secret@10.0.0.5", True),
        ("rediss+sentinel://u:secret@10.0.0.5/main", True),
        ("redis://:secret@10.0.0.5", False),
        ("redis://u:secret@store.example", False),
        ("redis://:secret@127.0.0.1,10.0.0.5?cluster=1", False),
        ("redis+sentinel://10.0.0.5/main?sentinel_password=secret", False),
    ],
)
def test_a_password_leaves_the_machine_over_tls_or_on_the_operators_word(
    url: str, stays: bool
) -> None:
    assert check_login_stays(url, trusted=True) == url
    if stays:
        assert check_login_stays(url) == url
        return
    with pytest.raises(InvalidArgument, match="unencrypted") as refused:
        check_login_stays(url)
    assert "secret" not in str(refused.value)
