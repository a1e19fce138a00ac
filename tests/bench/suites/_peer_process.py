"""Peers of the decode suite that live in environments of their own: found, fed, and closed.

`scripts/peers` builds the environments. A peer is a child process that reads one JSON request per
line and answers with one, so that a suite can measure it and our engine in turns.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from tests.bench.harness import ROOT

LOAD_TIMEOUT_S = 400
REQUEST_TIMEOUT_S = 300
_LOG_TAIL = 1500


class PeerMissing(Exception):
    """The peer's environment is not there, or the peer does not run; says what to do."""


def peer_python(name: str) -> Path:
    """The interpreter of a peer's finished environment.

    `SEGUE_PEERS` names another folder than `.peers` for all of them.

    Raises:
        PeerMissing: `scripts/peers` was not run, or did not finish.
    """
    home = Path(os.environ.get("SEGUE_PEERS") or ROOT / ".peers") / name
    python = home / "bin" / "python"
    if not (home / ".segue-peer").is_file() or not python.exists():
        raise PeerMissing(f"{name} is not there; `scripts/peers {name}` builds it")
    return python


class Peer:
    """A running peer. `ready` is its first line."""

    def __init__(self, process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
        self._process = process
        self._log = log
        self._rest = b""
        self.ready = self._answer(LOAD_TIMEOUT_S)

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request, one answer.

        Raises:
            PeerMissing: the peer ended, or took longer than `REQUEST_TIMEOUT_S`.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise PeerMissing(f"the peer ended; its last words: {self._last_words()}") from None
        return self._answer(REQUEST_TIMEOUT_S)

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout_s
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._rest:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                raise PeerMissing(f"the peer did not answer in {timeout_s:.0f} s")
            data = os.read(descriptor, 65536)
            if not data:
                raise PeerMissing(f"the peer ended; its last words: {self._last_words()}")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _last_words(self) -> str:
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - _LOG_TAIL))
        return self._log.read().decode(errors="replace").strip()


@contextlib.contextmanager
def running_peer(name: str, script: str, arguments: Sequence[str]) -> Iterator[Peer]:
    """The peer `name`, loaded; it ends with the block, however the block ends.

    Raises:
        PeerMissing: no environment, or the peer ended or hung while it loaded.
    """
    python = peer_python(name)
    command = [str(python), str(Path(__file__).parent / script), *arguments]
    # Segue's own packages must not shadow the peer's.
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
        try:
            yield Peer(process, log)
        finally:
            # With all processes it started; they hold nothing that a gentler end would save.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@contextlib.contextmanager
def hugging_face_folder(directory: Path) -> Iterator[Path]:
    """The built model's cloud half as a folder that vLLM opens: config, weights, tokenizer.

    Links, no copies: the weights are those that our engine loads.
    """
    with tempfile.TemporaryDirectory(prefix="segue-peer-") as temporary:
        folder = Path(temporary)
        for part in ("cloud/config.json", "cloud/model.safetensors", "tokenizer.json"):
            (folder / Path(part).name).symlink_to((directory / part).resolve())
        (folder / "generation_config.json").write_text("{}\n")
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
        )
        yield folder
