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
