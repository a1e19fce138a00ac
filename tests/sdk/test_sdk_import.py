"""`import segue` is light: it must never pull in what only nodes need."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("numpy", "torch", "onnxruntime", "tokenizers", "redis", "structlog", "transformers")

SIGNING = ("jwt", "cryptography")  # a fifth of a second, for those alone who issue or check tokens


def _loaded(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_import_loads_nothing_but_itself() -> None:
    loaded = _loaded("import segue; segue.__version__")
    assert "segue" in loaded
    assert loaded.isdisjoint({*HEAVY, *SIGNING, "grpc", "aiomqtt", "msgspec", "rich", "typer"})


def test_whole_api_does_without_the_nodes_packages() -> None:
    loaded = _loaded("import segue, segue._mqtt; [getattr(segue, name) for name in segue.__all__]")
    assert "grpc" in loaded
    assert loaded.isdisjoint({*HEAVY, *SIGNING})


def test_a_back_end_that_issues_tokens_needs_no_transport() -> None:
    loaded = _loaded("import segue; segue.tokens.issue")
    assert set(SIGNING) <= loaded
    assert loaded.isdisjoint({*HEAVY, "grpc", "aiomqtt", "rich", "typer"})


def test_public_names() -> None:
    import segue

    for name in segue.__all__:
        assert getattr(segue, name) is not None
    assert set(segue.__all__) <= set(dir(segue))


def test_every_error_that_an_app_may_meet_is_among_its_errors() -> None:
    """Those of KV streams, built models and servers meet only nodes and tools."""
    from segue import errors
    from segue_contract import errors as tree

    theirs = (tree.KvError, tree.ModelError)
    alone = {"NotLoopback", "OtherBroker", "PortInUse", "RankLost", "StartFailed"}
    whole = {
        name: value
        for name, value in vars(tree).items()
        if isinstance(value, type) and issubclass(value, tree.SegueError)
    }
    met = {name for name, value in whole.items() if not issubclass(value, theirs)} - alone
    assert set(errors.__all__) == met
