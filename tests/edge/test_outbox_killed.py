"""The outbox file and SIGKILL: whenever it strikes, what was acknowledged is there."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path


async def test_an_outbox_outlives_a_kill_at_any_step_of_its_writing(tmp_path: Path) -> None:
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.support.journal_child",
        str(tmp_path),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        out, err = await child.communicate()
    assert child.returncode == 0, err.decode()
    *wrong, deaths = out.decode().splitlines()
    assert wrong == []
    word, count = deaths.split()
    assert word == "deaths"
    assert int(count) > 30
