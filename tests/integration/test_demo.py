"""The demo, played for real: what it prints and what it writes."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from segue.testing import local_stack
from tests.support.servers import require_broker, require_valkey

WAIT_S = 280.0


@pytest.mark.slow
async def test_the_demo_plays_and_writes_its_numbers(model_dir: Path, tmp_path: Path) -> None:
    require_valkey()
    require_broker()
    written = tmp_path / "demo.json"
    command = ["-m", "segue", "demo", "--json", str(written), "--model", str(model_dir)]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(WAIT_S):
            said = (await process.communicate())[0].decode()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, said
    for expected in ("The phone was killed", "exactly as in the log", "What was measured"):
        assert expected in said
    assert "\x1b[" not in said  # no terminal: no control characters

    numbers = json.loads(written.read_text())
    values = {row["name"]: row["value"] for row in numbers["rows"]}
    assert values["same_text"] == 1.0
    assert 0 < values["killed_after_tokens"] < values["turn1_tokens"]
    assert values["turn1_edge_tokens"] >= 1
    assert 0 < values["turn1_kv_shipped_bytes"] < 0.55 * values["turn1_kv_shipped_fp16_bytes"]
    assert values["turn2_cloud_reused_blocks"] >= 1
    assert values["device_to_device_tokens"] > values["killed_after_tokens"]
    first, second = numbers["turns"]
    assert (first["asked_by"], second["asked_by"]) == ("phone", "laptop")
    assert first["first_token_by"] == "edge"
    assert first["plan"]["shape"] == "ship"


@pytest.mark.slow
def test_a_stack_for_code_without_an_event_loop(model_dir: Path) -> None:
    require_valkey()
    require_broker()
    with local_stack(model=str(model_dir)) as stack:
        command = [sys.executable, "-m", "segue", "doctor", "-o", "json"]
        command += ["--edge", stack.edge_address, "--cloud", stack.cloud_address]
        command += ["--redis-url", stack.redis_url, "--mqtt-url", stack.mqtt_url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        pids = [part.pid for part in stack.processes.values()]
    assert done.returncode == 0, done.stdout + done.stderr
    checks = json.loads(done.stdout)["checks"]
    reached = [check for check in checks if check["group"] == "reachable"]
    assert [check["name"] for check in reached] == [
        "edge",
        "cloud",
        "store",
        "broker",
        "one broker",
    ]
    assert all("round trip" in check["value"] for check in reached[:4])
    assert len(pids) == 4
    assert not any(psutil.pid_exists(pid) for pid in pids)
