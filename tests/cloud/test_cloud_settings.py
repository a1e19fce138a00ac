"""Settings of the cloud: where they come from, and where not."""

from __future__ import annotations

from pathlib import Path

import pytest

from segue_cloud.cli import load_settings
from segue_cloud.config import CloudSettings
from segue_contract.errors import InvalidArgument


def test_a_file_in_the_working_directory_sets_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".env").write_text("SEGUE_REDIS_URL=redis://elsewhere:1\nSEGUE_CLOUD_PORT=7999\n")
    monkeypatch.chdir(tmp_path)
    settings = CloudSettings()
    assert settings.redis_url == ""
    assert settings.port == 7412


@pytest.mark.parametrize("tenant", ["", "a:b", "a/b", "a#", "+", "{a}", "a b", "x" * 65])
def test_a_tenant_that_is_no_part_of_keys_and_topics_is_refused(tenant: str) -> None:
    with pytest.raises(InvalidArgument, match="tenant"):
        load_settings({"tenant": tenant})
    assert load_settings({"tenant": "acme"}).tenant == "acme"


def test_the_stores_password_stays_on_this_machine_unless_the_operator_says_so() -> None:
    far = {"redis_url": "redis://:secret@10.0.0.5"}
    with pytest.raises(InvalidArgument, match="unencrypted"):
        _ = load_settings(far).store_url
    trusted = load_settings({**far, "redis_trusted_network": True})
    assert trusted.store_url == far["redis_url"]


def test_probes_ask_on_loopback_unless_told_otherwise() -> None:
    assert load_settings({}).health is None
    assert load_settings({"health_port": 7414}).health == ("127.0.0.1", 7414)
    pod = load_settings({"health_port": 7414, "health_host": "0.0.0.0"})
    assert pod.health == ("0.0.0.0", 7414)
