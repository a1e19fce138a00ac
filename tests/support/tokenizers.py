"""The tokenizers of built models, each read once: that takes half a second of computing."""

from __future__ import annotations

import functools
from pathlib import Path

from segue_contract.chat import ChatTokenizer
from segue_contract.model.manifest import read_manifest


@functools.cache
def tokenizer_of(directory: Path) -> ChatTokenizer:
    """Of a built model that does not change."""
    return ChatTokenizer.load(directory, read_manifest(directory))
