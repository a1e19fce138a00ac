"""scripts/peers: what cannot be built is said and skipped, what is there is left alone."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.bench.harness import ROOT


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """scripts/peers as a module with a folder of its own, and nothing to build yet."""
    loader = importlib.machinery.SourceFileLoader("scripts_peers", str(ROOT / "scripts" / "peers"))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, loader.name, module)
    loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "PEERS", tmp_path / ".peers")
    monkeypatch.setattr(module, "ALL", {})
    monkeypatch.setattr(sys, "argv", ["scripts/peers"])
    return module


def add(script: Any, name: str, proof: str = "", refuses: Exception | None = None) -> list[str]:
    """A peer whose environment is this Python; returns the builds that were asked for."""
    built: list[str] = []
    home = script.PEERS / name / "bin"
    home.mkdir(parents=True)
    (home / "python").symlink_to(sys.executable)

    def build(python: Path, log: Path) -> None:
        built.append(name)
        if refuses is not None:
            raise refuses

    script.ALL[name] = script.Peer(name, f"{name}==1", build, proof)
    return built


def test_one_that_fails_and_one_that_cannot_be_built_do_not_stop_the_others(
    script: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    add(script, "broken", refuses=script.Failed("no network"))
    add(script, "odd", refuses=script.Skipped("There is no compiler."))
    add(script, "good")
    assert script.main() == 1
    said = capsys.readouterr().err
    assert "broken: failed, and left out. no network" in said
    assert "odd: skipped. There is no compiler." in said
    assert "good: good==1 built" in said
    assert (script.PEERS / "good" / ".segue-peer").exists()
    assert not (script.PEERS / "broken" / ".segue-peer").exists()


def test_a_second_run_builds_nothing_and_a_new_version_does(script: Any) -> None:
    built = add(script, "good")
    assert script.main() == 0
    assert script.main() == 0
    assert built == ["good"]
    old = script.ALL["good"]
    script.ALL["good"] = script.Peer("good", "good==2", old.build, old.proof)
    assert script.main() == 0
    assert built == ["good", "good"]


def test_an_environment_that_cannot_run_its_peer_is_not_called_built(
    script: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    add(script, "hollow", proof="import there_is_no_such_module")
    assert script.main() == 1
    assert "there_is_no_such_module" in capsys.readouterr().err
    assert not (script.PEERS / "hollow" / ".segue-peer").exists()


def test_a_disk_that_is_too_full_is_said_before_anything_is_fetched(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built = add(script, "good")
    monkeypatch.setattr(script, "FREE_GIB", 10**9)
    assert script.main() == 0
    assert built == []
    assert "of disk" in capsys.readouterr().err


def test_a_requirement_is_known_by_its_package(script: Any) -> None:
    assert script.package_of("torchaudio; platform_machine != 's390x'") == "torchaudio"
    assert script.package_of("torch==2.13.0+cpu; x") == "torch"
    assert script.package_of("fastapi[standard]<0.137.0") == "fastapi"
    assert script.package_of("regex") == "regex"
