"""What reaches stderr: no secrets, nothing of libraries by other ways, and never by waiting."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading

from segue_contract.transport.log_writer import LogWriter

SECRETS = ("hunter2", "my own diary")

_CHILD = """
import logging, sys
import structlog
from segue_contract.transport.logs import set_up_logs

class Terminal:
    def __init__(self, tty): self.tty = tty
    def write(self, text): return sys.stderr.write(text)
    def flush(self): sys.stderr.flush()
    def isatty(self): return self.tty

set_up_logs("info", Terminal(sys.argv[1] == "tty"))
log = structlog.get_logger("test")

def fails(prompt, url):
    raise RuntimeError(f"no answer from {url}")

log.info("config", store={"options": [{"redis_password": "hunter2"}], "shown": "yes"},
         broker="mqtt://user:hunter2@host:1883/x", Authorization="hunter2")
try:
    fails("my own diary", "redis://:hunter2@store:6379/0")
except RuntimeError:
    log.exception("broke")
try:
    fails("my own diary", "redis://user:hunter2@store:6379/0")
except RuntimeError:
    logging.getLogger("some.library").exception("a library's %s", "words")
"""


def said(kind: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, kind], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == ""
    return done.stderr


def test_no_secret_is_written_at_any_depth_nor_with_a_traceback() -> None:
    lines = [json.loads(line) for line in said("pipe").splitlines()]
    assert [line["event"] for line in lines] == ["config", "broke", "library"]
    config, broke, library = lines
    assert config["store"] == {"options": [{"redis_password": "(hidden)"}], "shown": "yes"}
    assert config["broker"] == "mqtt://host:1883/x"
    assert broke["exception"][0]["exc_value"] == "no answer from redis://store:6379/0"
    assert broke["exception"][0]["frames"][-1]["name"] == "fails"
    assert library["said"] == "a library's words"
    assert library["exception"][0]["exc_type"] == "RuntimeError"
    for secret in SECRETS:
        assert secret not in json.dumps(lines)


def test_a_terminal_shows_no_secret_either() -> None:
    text = said("tty")
    assert "fails" in text
    assert "RuntimeError" in text
    for secret in SECRETS:
        assert secret not in text


def test_a_reader_that_stalls_holds_up_nobody() -> None:
    """The pipe is full and nobody reads: lines wait up to the bound, then they are counted."""
    read_end, write_end = os.pipe()
    line = "x" * 1023 + "\n"
    with os.fdopen(write_end, "w") as file, os.fdopen(read_end) as reader:
        writer = LogWriter(file, 64 * 1024)
        for _ in range(400):  # more than the pipe and the queue hold together
            writer.write(line)
        assert writer.dropped_in_all > 0
        assert not writer.drain(0.0)
        found: list[str] = []
        reading = threading.Thread(target=lambda: found.extend(reader), daemon=True)
        reading.start()
        assert writer.drain(30.0)
        writer.write("back\n")
        writer.close(30.0)
        file.close()
        reading.join(30.0)
    assert found.count(line) == 400 - writer.dropped_in_all
    assert any(f"({writer.dropped_in_all} log lines were dropped" in one for one in found)
    assert found[-1] == "back\n"


def test_a_reader_that_is_gone_is_no_error() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    file = os.fdopen(write_end, "w")
    writer = LogWriter(file, 1024)
    writer.write("to nobody\n")
    assert writer.drain(30.0)
    writer.write("again\n")
    writer.close(30.0)
    with contextlib.suppress(BrokenPipeError):
        file.close()
