"""The examples of docs/sdk.md run as they are printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import segue
from segue.testing import FakeNode, SyncFakeNode

PAGE = Path(__file__).parents[2] / "docs" / "sdk.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
TESTS = [block for block in BLOCKS if "pytest" in block]
PARTS = [block for block in BLOCKS if "pytest" not in block]


def test_the_page_has_examples() -> None:
    assert TESTS
    assert PARTS


@pytest.mark.parametrize("block", TESTS)
def test_examples_that_are_tests(block: str, tmp_path: Path) -> None:
    (tmp_path / "test_app.py").write_text(block, encoding="utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\nasyncio_mode = auto\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "pytest_asyncio.plugin", "test_app.py"],
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert f"{block.count('def test_')} passed" in done.stdout


@pytest.mark.parametrize("block", PARTS, ids=lambda block: block.split("\n")[0][:40])
async def test_examples_that_are_parts(block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a session at hand, and `segue.Client` leading to a FakeNode."""
    replies = [lambda prompt: f"About {prompt}"] * 9
    async with FakeNode(replies) as node, node.client("phone") as client:
        session = await client.session("trip")
        plain = SyncFakeNode(replies)
        monkeypatch.setattr(segue, "Client", node.client)
        monkeypatch.setattr(segue, "SyncClient", plain.client)
        names = {"segue": segue, "print": lambda *_, **__: 0}
        body = textwrap.indent(block, "    ")
        exec(f"async def example(client, session):\n{body}", names)
        with plain:
            await names["example"](client, session)  # type: ignore[operator]
