"""Public text as an attacker would have it: of the same tokenizer, and without a word run that the clients have, too."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import numpy as np

from fedbert_jax.audit.source import Source
from fedbert_jax.config import Config, DataConfig
from fedbert_jax.data.blocks import pack
from fedbert_jax.data.corpus import read_documents
from fedbert_jax.data.duplicates import kept_spans
from fedbert_jax.data.tokenizer import encode

FAR = 0.2  # bits between the word frequencies of public text and of the clients', from which on it is of another domain

NEAR = ("sklearn", "matplotlib", "sympy", "networkx", "optax")  # packages whose docstrings are like those of the demo's


def default_source(config: Config) -> str:
    """Returns public text for a run on docstrings: those of other packages that are installed; "" for any other run."""
    kind, _, packages = config.data.source.partition(":")
    others = [name for name in NEAR if name not in packages.split(",") and importlib.util.find_spec(name)]
    return f"docs:{','.join(others)}" if kind == "docs" and others else ""


def read(run: Source, source: str, warn: Callable[[str], None]) -> np.ndarray:
    """Returns public text as token blocks, int [P, T], without the windows of 32 tokens that the run's own text has, too.

    Args:
      run: the attacked one; its tokenizer is public, too.
      source: as in `data.source`.
      warn: called with what looks wrong.

    Raises:
      UserError: for text that can't be read.
    """
    data = DataConfig(source=source, text_field=run.config.data.text_field)
    tokenizer, length = run.tokenizer, run.config.data.seq_len
    texts = [document.text for document in read_documents(data, warn=warn)]
    found = list(encode(tokenizer, texts))
    own = [tokens.ravel().astype(found[0].dtype) for tokens in run.text]
    tokens = np.concatenate([*own, *found])
    ends = np.cumsum([len(x) for x in (*own, *found)])
    spans = kept_spans(tokens, ends)
    theirs = spans[spans[:, 0] >= len(own)]
    pieces = (tokens[first:last] for _, first, last in theirs)
    blocks = list(pack(pieces, length, tokenizer.cls_token_id, tokenizer.sep_token_id))
    return np.concatenate(blocks).astype(np.int64) if blocks else np.zeros((0, length), np.int64)
