"""The tiny models that are built here, once for the whole folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.tiny_source import write_hf_folder

BUILD_TIMEOUT_S = 280
WINDOW = 40  # tokens, of the model that `built` gives


class Home:
    """A model home of its own, and `segue model ...` in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {**os.environ, "SEGUE_MODEL_HOME": str(folder), "COLUMNS": "300"}

    def start(
        self, *arguments: str, limit: Callable[[], None] | None = None
    ) -> subprocess.Popen[str]:
        def prepare() -> None:
            # A shell that runs the tests in the background has it ignored, and so would the build.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if limit is not None:
                limit()

        return subprocess.Popen(
            [sys.executable, "-m", "segue", "model", *arguments],
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=prepare,
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
