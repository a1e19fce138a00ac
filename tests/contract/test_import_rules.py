"""What may import what, read off the folders: a new package is under the rules by being there."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = {
    "segue_contract": ROOT / "protos/src",
    "segue": ROOT / "client_sdk/src",
    "segue_edge": ROOT / "edge/src",
    "segue_cloud": ROOT / "cloud/src",
}
# A heavy or stateful library, and the one folder that may know it.
HOMES = {
    "torch": "segue_cloud.engine",
    "onnxruntime": "segue_edge.prefill",
    "redis": "segue_cloud.sessions",
}
# What a module that calls itself pure leaves to others: I/O, clocks, chance, devices.
IMPURE = {
    "grpc", "aiomqtt", "paho", "asyncio", "socket", "ssl", "subprocess", "threading", "time",
    "random", "secrets", "redis", "torch", "onnxruntime", "structlog", "os", "signal", "tempfile",
}  # fmt: skip


@dataclass(frozen=True)
class Module:
    name: str
    doc: str
    imports: frozenset[str]  # full names

    @property
    def is_pure(self) -> bool:
        return any(part.strip().startswith("Pure") for part in self.doc.split(". "))


def modules() -> Iterator[Module]:
    for program, source in PROGRAMS.items():
        for path in sorted((source / program).rglob("*.py")):
            if path.name.endswith(("_pb2.py", "_pb2_grpc.py")):
                continue
            name = ".".join(path.relative_to(source).with_suffix("").parts)
            tree = ast.parse(path.read_text(encoding="utf-8"))
            yield Module(name, ast.get_docstring(tree) or "", frozenset(imports_of(tree)))


def imports_of(tree: ast.AST) -> Iterator[str]:
    """Every imported module, those inside functions too; not those for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        yield from imports_of(node)


ALL = list(modules())


def test_the_rules_see_the_programs() -> None:
    assert {module.name.partition(".")[0] for module in ALL} == set(PROGRAMS)
    assert any("torch" in module.imports for module in ALL)
    assert sum(module.is_pure for module in ALL) > 20


@pytest.mark.parametrize(("library", "home"), HOMES.items())
def test_a_library_is_known_in_its_folder_only(library: str, home: str) -> None:
    strangers = [
        module.name
        for module in ALL
        if not f"{module.name}.".startswith(f"{home}.")
        and any(name.partition(".")[0] == library for name in module.imports)
    ]
    assert strangers == []


def test_a_module_that_calls_itself_pure_is() -> None:
    found = {
        module.name: sorted({name.partition(".")[0] for name in module.imports} & IMPURE)
        for module in ALL
        if module.is_pure
    }
    assert {name: impure for name, impure in found.items() if impure} == {}


def test_a_pure_module_brings_none_of_the_libraries_with_it() -> None:
    """Neither does anything of ours that it imports: policies are tested without a device."""
    by_name = {module.name.removesuffix(".__init__"): module for module in ALL}
    for module in filter(lambda module: module.is_pure, ALL):
        seen: set[str] = set()
        todo = [module]
        while todo:
            for name in todo.pop().imports - seen:
                seen.add(name)
                todo.extend([by_name[name]] if name in by_name else [])
        assert not {name.partition(".")[0] for name in seen} & set(HOMES), module.name


def test_every_folder_says_what_lives_there() -> None:
    generated = "segue_contract.v1.__init__"
    folders = [module for module in ALL if module.name.endswith(".__init__")]
    inner = [module for module in folders if module.name.count(".") > 1]
    silent = [module.name for module in inner if not module.doc and module.name != generated]
    assert silent == []
