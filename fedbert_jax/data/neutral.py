"""Text beside the clients' own that a run is judged by: read and encoded once, and kept with the run's data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedbert_jax import disk
from fedbert_jax.config import Config, DataConfig
from fedbert_jax.data.blocks import pack
from fedbert_jax.data.corpus import read_documents
from fedbert_jax.data.encoded import usual_tokens
from fedbert_jax.data.encoding import encode
from fedbert_jax.errors import UserError

FILE = "extra.npy"  # beside the run's blocks


class Neutral(NamedTuple):
    """Blocks of text to be predicted token by token."""

    tokens: np.ndarray  # int32 [S, T]
    asked: np.ndarray  # bool [S, T], where a token is predicted: not [CLS], [SEP], [UNK] and the like


def neutral_text(config: Config, directory: Path, tokenizer: Any, warn: Callable[[str], None]) -> Neutral:
    """Returns the text of `eval.extra`, from `directory` if it is there, else read, and kept there.

    Args:
      config: the run's.
      directory: of the run's data.
      tokenizer: the run's.
      warn: called with what looks wrong with the text.

    Raises:
      UserError: for text that can't be read, or of which there is less than a block.
    """
    path = directory / FILE
    if not path.is_file():
        blocks = read_blocks(
            config.eval.extra, config.data, tokenizer, config.eval.extra_blocks, warn, "config key eval.extra"
        )
        with disk.replacing(path) as new, new.open("wb") as file:
            np.save(file, blocks)
    tokens = np.load(path)
    return Neutral(tokens, usual_tokens(tokenizer)[tokens])


def read_blocks(
    source: str, data: DataConfig, tokenizer: Any, most: int, warn: Callable[[str], None], key: str
) -> np.ndarray:
    """Returns token blocks of a text, int32 [S, T], spread evenly over it.

    Args:
      source: as in `data.source`.
      data: the run's, whose `text_field` and block length are taken.
      tokenizer: the run's.
      most: the most blocks.
      warn: called with what looks wrong.
      key: what errors call the source.

    Raises:
      UserError: for text that can't be read, or of which there is less than a block.
    """
    kind, _, rest = source.partition(":")
    if kind not in ("text", "hf", "docs") or not rest:
        raise UserError(f"{key}={source!r}: accepted: 'text:GLOB', 'hf:NAME[/CONFIG]' or 'docs:PACKAGE,...'.")
    plain = DataConfig(source=source, text_field=data.text_field, cache_dir=data.cache_dir)
    try:
        pieces = encode(tokenizer, (document.text for document in read_documents(plain, warn=warn)))
        packed = list(pack(pieces, data.seq_len, tokenizer.cls_token_id, tokenizer.sep_token_id))
    except UserError as error:
        raise UserError(str(error).replace("data.source", key)) from error
    blocks = np.concatenate(packed).astype(np.int32) if packed else np.zeros((0, data.seq_len), np.int32)
    if not len(blocks):
        raise UserError(f"{key}={source!r}: it has less than a block of {data.seq_len} tokens.")
    return blocks[np.unique(np.linspace(0, len(blocks) - 1, min(most, len(blocks))).astype(int))]
