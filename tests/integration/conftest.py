"""One stack of real processes for the whole folder, and the tiny models that its tests build."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from segue.local.parts import Part, Program, module_command
from segue.testing import LocalStack
from tests.support.servers import require_broker, require_valkey
from tests.support.tiny_source import write_hf_folder

BUILD_TIMEOUT_S = 150
WINDOW = 40  # tokens, of the model that `built` gives
OnCrash = Callable[[Part], None]


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def running_stack(model_dir: Path) -> AsyncIterator[LocalStack]:
    require_valkey()
    require_broker()
    async with LocalStack(model=str(model_dir)) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="package")
async def stack(running_stack: LocalStack) -> AsyncIterator[LocalStack]:
    """All of it runs; a test may break parts of it, the next one finds them whole again."""
    parts = running_stack.processes.values()
    for part in parts:
        if not part.running:
            await part.restart()
    yield running_stack
    for part in parts:
        part.resume()
    assert running_stack.crashed is None, running_stack.crashed


def second_cloud(
    stack: LocalStack, model: Path, folder: Path, *arguments: str, on_crash: OnCrash | None = None
) -> Program:
    """Another cloud on the stack's servers, not started."""
    return Program(
        "cloud-2",
        module_command("segue", "cloud", "--port", "0", "--model", str(model), *arguments),
        log=folder / "cloud-2.log",
        env={**os.environ, "SEGUE_REDIS_URL": stack.redis_url, "SEGUE_MQTT_URL": stack.mqtt_url},
        on_crash=on_crash,
    )


class Home:
    """A model home of its own, and `segue model ...` in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {**os.environ, "SEGUE_MODEL_HOME": str(folder), "COLUMNS": "300"}

    def start(
        self, *arguments: str, limit: Callable[[], None] | None = None
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "segue", "model", *arguments],
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=limit,
        )

    def run(self, *arguments: str, limit: Callable[[], None] | None = None) -> tuple[int, str]:
        process = self.start(*arguments, limit=limit)
        out, _ = process.communicate(timeout=BUILD_TIMEOUT_S)
        return process.returncode, out

    def left(self) -> list[str]:
        """Everything in the home but lock files."""
        names = sorted(os.listdir(self.folder)) if self.folder.is_dir() else []
        return [name for name in names if not name.endswith(".lock")]


@dataclass(frozen=True)
class Built:
    """A home with the model `tiny`, what it was built of, and what the build said."""

    home: Home
    source: Path
    said: str

    @property
    def folder(self) -> Path:
        """The model's."""
        return self.home.folder / "tiny"


def build_tiny(folder: Path, source: Path, *budget: str) -> Built:
    home = Home(folder / "home")
    code, out = home.run("build", str(source), "--name", "tiny", *budget)
    assert code == 0, out
    return Built(home, source, out)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights, as a Hugging Face folder."""
    return write_hf_folder(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A model with a sliding window, under a budget that its INT8 graph meets.

    Random weights lose much in 8 bits. Tests must not change it.
    """
    folder = tmp_path_factory.mktemp("built")
    names = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    source = write_hf_folder(folder / "source", **names, sliding_window=WINDOW)
    return build_tiny(folder, source, "--max-agreement-loss", "0.9")
