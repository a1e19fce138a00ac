"""Passwords in the addresses of the user's own servers are shown to nobody."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from segue.cli.up import addresses
from segue.local.stack import LocalStack

REDIS = "redis://app:hunter2@store.example:6379"
MQTT = "mqtt://app:hunter2@broker.example:1883"


def test_addresses_are_shown_without_passwords(tmp_path: Path) -> None:
    stack = LocalStack(redis_url=REDIS, mqtt_url=MQTT, folder=tmp_path)
    console = Console(width=200, record=True, quiet=True)
    with console.capture() as shown:
        console.quiet = False
        console.print(addresses(stack))
    assert "store.example:6379" in shown.get()
    assert "broker.example:1883" in shown.get()
    assert "hunter2" not in shown.get()


def test_the_cloud_gets_its_servers_by_environment(tmp_path: Path) -> None:
    stack = LocalStack(redis_url=REDIS, mqtt_url=MQTT, folder=tmp_path)
    assert not any("hunter2" in argument for argument in stack._cloud_command())
    environment = stack._cloud_environment()
    assert (environment["SEGUE_REDIS_URL"], environment["SEGUE_MQTT_URL"]) == (REDIS, MQTT)
