"""Fixtures of the cloud's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from segue_contract.chat import ChatTokenizer
from segue_contract.model.manifest import read_manifest


@pytest.fixture
def words(model_dir: Path) -> list[int]:
    """Token ids of a short reply, as the default model's tokenizer has them."""
    tokenizer = ChatTokenizer.load(model_dir, read_manifest(model_dir))
    return tokenizer.encode("The sea is wide and the night is long.")
