"""The command line: help, errors, exit codes, and how little it imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from segue.cli import COMMANDS, Command, _missing, load
from segue.local.device import Happened
from segue.local.inspect import State, instruction_set
from segue.local.measure import DemoNumbers, Seen, TurnNumbers, delays_s, percentile
from segue.local.ready import parse_ready, readable
from segue_contract.errors import MissingExtra
from segue_contract.plan import PlanReport

OWN = [command for command in COMMANDS if command.target]


def segue(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "segue", *args],
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "COLUMNS": "100", **env},
        check=False,
    )


def test_help_names_every_command() -> None:
    done = segue("--help")
    assert done.returncode == 0
    for command in COMMANDS:
        assert command.name in done.stdout
        assert command.help in done.stdout


def test_version() -> None:
    done = segue("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("segue 0.")


def test_without_a_command_it_shows_help_as_wrong_usage() -> None:
    done = segue()
    assert done.returncode == 2
    assert "Usage: segue" in done.stdout + done.stderr


@pytest.mark.parametrize("args", [["nonsense"], ["doctor", "--nonsense"], ["up", "--edges", "99"]])
def test_wrong_usage_is_exit_code_two(args: list[str]) -> None:
    done = segue(*args)
    assert done.returncode == 2
    assert "Usage" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", OWN, ids=lambda command: command.name)
def test_every_command_of_ours_has_help(command: Command) -> None:
    done = segue(command.name, "--help")
    assert done.returncode == 0, done.stderr
    assert f"segue {command.name}" in done.stdout


def test_an_error_is_one_calm_line_with_a_hint() -> None:
    done = segue("demo", "--json", "/no/such/folder/numbers.json")
    assert done.returncode == 1
    first, second = done.stderr.splitlines()
    assert first.startswith("error: The folder of /no/such/folder")
    assert second.startswith("hint:")


def test_a_missing_package_names_the_extra() -> None:
    command = Command("fly", "More", "", target="no_such_package.cli:app", extra="wings")
    with pytest.raises(MissingExtra, match="needs the package no_such_package") as caught:
        load(command)
    assert caught.value.hint == "pip install 'segue[wings]'"
    assert "not part of this installation" in _missing(Command("fly", "", ""), "fly").message


def test_help_imports_neither_grpc_nor_numpy() -> None:
    code = (
        "import sys\n"
        "from segue.cli import build_app\n"
        "build_app()\n"
        "heavy = {'grpc', 'numpy', 'torch', 'onnxruntime', 'redis', 'aiomqtt', 'transformers'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_doctor_tells_programs_the_same(tmp_path: Path) -> None:
    done = segue("doctor", "-o", "json", SEGUE_MODEL_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["usable"] is True
    by_name = {check["name"]: check for check in answer["checks"]}
    assert by_name["model"]["state"] == "note"
    assert "segue model build" in by_name["model"]["advice"]
    assert by_name["python"]["state"] == "ok"


def test_doctor_says_what_does_not_answer() -> None:
    done = segue("doctor", "--edge", "127.0.0.1:1", "--redis-url", "redis://127.0.0.1:1")
    assert done.returncode == 1
    assert "Not usable yet: edge, store." in done.stdout


def test_doctor_asks_each_of_several_clouds() -> None:
    done = segue("doctor", "-o", "json", SEGUE_EDGE_CLOUD="127.0.0.1:1,127.0.0.1:2")
    clouds = [check for check in json.loads(done.stdout)["checks"] if check["name"] == "cloud"]
    assert [check["state"] for check in clouds] == ["bad", "bad"]
    assert all(f":{port}" in str(check) for port, check in zip((1, 2), clouds, strict=True))


@pytest.mark.parametrize(
    ("flags", "state"),
    [
        ({"avx512_vnni", "sse2"}, State.OK),
        ({"asimddp"}, State.OK),
        ({"sse2", "avx2"}, State.NOTE),
        (set(), State.NOTE),
    ],
)
def test_instruction_sets(flags: set[str], state: State) -> None:
    assert instruction_set("x86_64", frozenset(flags)).state is state


def test_ready_lines() -> None:
    line = '{"event":"ready","role":"cloud","port":7412,"host":"127.0.0.1","dtype":"bf16"}'
    ready = parse_ready(line)
    assert ready is not None
    assert (ready.role, ready.address) == ("cloud", "127.0.0.1:7412")
    assert ready.facts == {"dtype": "bf16"}
    for other in ("ready", "{}", '{"event":"turn","role":"edge","port":1}', line[:-1], ""):
        assert parse_ready(other) is None
    assert parse_ready(line.replace("7412", "70000")) is None


def test_log_lines_become_readable() -> None:
    record = '{"event": "no link", "level": "warning", "timestamp": "now", "cloud": "a:1"}'
    assert readable(record) == "warning no link cloud=a:1"
    assert readable("plain text\n") == "plain text"
    assert len(readable("x" * 10_000)) < 1000


def test_percentiles_are_values_that_occurred() -> None:
    assert percentile([], 0.5) == 0.0
    assert percentile([3.0], 0.99) == 3.0
    assert percentile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.0
    hundred = [float(number) for number in range(1, 101)]
    assert percentile(hundred, 0.99) == 99.0
    assert percentile(hundred, 1.0) == 100.0


def tokens(index: int, pieces: list[str], at: float, by: str = "cloud") -> Happened:
    return Happened(event="tokens", at=at, turn="t", index=index, pieces=pieces, made_by=by)


def test_a_screen_keeps_the_first_time_of_a_token_and_forgets_what_is_rewound() -> None:
    seen = Seen()
    seen.apply(tokens(0, ["a"], 1.0, "edge"))
    seen.apply(tokens(0, ["a", "b"], 2.0))
    assert (seen.text, seen.at) == ("ab", [1.0, 2.0])
    assert (seen.made("edge"), seen.made("cloud")) == (1, 1)
    seen.apply(Happened(event="rewound", at=3.0, turn="t", index=1))
    seen.apply(tokens(1, ["c", "d"], 4.0))
    assert seen.text == "acd"
    assert seen.tokens_per_s == pytest.approx(2 / 3)
    assert delays_s(seen, Seen(at=[1.5, 3.75])) == [0.5, 0.25]


def test_the_numbers_of_the_demo_have_unique_names_and_units() -> None:
    plan = PlanReport(shape="ship", shipped_bytes=50, shipped_fp16_bytes=100)
    turn = TurnNumbers("phone", 0.25, "edge", 10, 1, 40.0, [0.001, 0.003], plan)
    rows = DemoNumbers([turn, turn], start_s=3.0, killed_after_tokens=5, same_text=True).rows()
    values = {row.name: row.value for row in rows}
    assert len(values) == len(rows)
    assert values["turn1_ttft_ms"] == 250.0
    assert values["turn2_kv_shipped_bytes"] == 50.0
    assert values["device_to_device_ms_p99"] == 3.0
    assert all(row.unit for row in rows)
