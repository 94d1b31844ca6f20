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
from fedbert_jax.data.encoding import encode
from fedbert_jax.errors import UserError

FAR = 0.2  # bits between the word frequencies of public text and of the clients', from which on it is of another domain

NEAR = ("sklearn", "matplotlib", "sympy", "networkx", "optax")  # packages whose docstrings are like those of the demo's


def default_source(config: Config) -> str:
    """Returns public text for a run on docstrings: those of other packages that are installed; "" for any other run."""
    kind, _, packages = config.data.source.partition(":")
    others = [name for name in NEAR if name not in map(str.strip, packages.split(",")) and importlib.util.find_spec(name)]
    return f"docs:{','.join(others)}" if kind == "docs" and others else ""


GRAM, SHARED = 8, 0.1  # words in a row, and the share of a document's that may be in the run's text, too


def read(run: Source, source: str, warn: Callable[[str], None]) -> np.ndarray:
    """Returns public text as token blocks, int [P, T], without what the run's own text has, too.

    Left out are windows of 32 tokens that the run has, and documents of whose sequences of 8 tokens it has a tenth.

    Args:
      run: the attacked one; its tokenizer is public, too.
      source: as in `data.source`.
      warn: called with what looks wrong.

    Raises:
      UserError: for text that can't be read, or of which too little is left.
    """
    data = DataConfig(source=source, text_field=run.config.data.text_field)
    tokenizer, length = run.tokenizer, run.config.data.seq_len
    texts = [document.text for document in read_documents(data, warn=warn)]
    special = np.array(run.special_ids)
    own = [row[~np.isin(row, special)] for tokens in run.text for row in tokens]
    grams = np.unique(_grams(np.concatenate([*own, special[:1]]).astype(np.int64)))
    theirs = [x for x in encode(tokenizer, texts) if _shared(_grams(x.astype(np.int64)), grams) <= SHARED]
    tokens = np.concatenate([*(x.astype(np.int64) for x in (*own, *theirs)), np.zeros(0, np.int64)])
    spans = kept_spans(tokens, np.cumsum([len(x) for x in (*own, *theirs)]))
    pieces = (tokens[first:last] for _, first, last in spans[spans[:, 0] >= len(own)])
    blocks = list(pack(pieces, length, tokenizer.cls_token_id, tokenizer.sep_token_id))
    if not blocks:
        raise UserError(f"--public {source}: less than a block of {length} tokens is left without what the run has, too.")
    return np.concatenate(blocks).astype(np.int64)


def _shared(some: np.ndarray, of: np.ndarray) -> float:
    """Returns the share of hashes that are among others, which are sorted."""
    places = np.minimum(np.searchsorted(of, some), len(of) - 1)
    return float(np.mean(of[places] == some))


def _grams(tokens: np.ndarray) -> np.ndarray:
    """Returns a hash of each sequence of `GRAM` tokens, uint64; of a shorter text, one."""
    if len(tokens) < GRAM:
        tokens = np.pad(tokens, (0, GRAM - len(tokens)))
    factors = np.array([pow(0x9E3779B97F4A7C15, n + 1, 2**64) for n in range(GRAM)], np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(tokens.astype(np.uint64) + np.uint64(1), GRAM)
    return windows @ factors
