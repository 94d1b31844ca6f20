"""Sources of text for tests: writing files, and reading documents from them."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest

from fedbert_jax.config import DataConfig
from fedbert_jax.data.corpus import read_documents
from fedbert_jax.errors import UserError


def read(source: object, warnings: list[str] | None = None, **keys: Any) -> list[tuple[str, str]]:
    """Returns text and group of each document; collects warnings in `warnings`; without it, there must be none."""
    told: list[str] = []
    documents = list(read_documents(DataConfig(source=str(source), **keys), warn=told.append))
    if warnings is None:
        assert told == []
    else:
        warnings += told
    return [(d.text, d.group) for d in documents]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(raw) if path.suffix.lower() == ".gz" else raw)
    return path


def refused(source: object, **keys: Any) -> str:
    """Returns the sentence with which a source is refused."""
    with pytest.raises(UserError) as caught:
        list(read_documents(DataConfig(source=str(source), **keys), warn=lambda _: None))
    assert "\n" not in str(caught.value)
    return str(caught.value)
