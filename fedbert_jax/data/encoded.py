"""A run's documents as token ids, one after another in a file, of which only what is in use is in memory."""

from __future__ import annotations

import os
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from fedbert_jax.data.duplicates import kept_spans
from fedbert_jax.data.encoding import encode
from fedbert_jax.data.tokenizer import special_ids, token_dtype, vocab_size

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast


class TokenFile:
    """Token ids [n] in a file, uint16 or int32; a slice is read from it, since mapped pages would stay in memory."""

    def __init__(self, file: IO[bytes], dtype: np.dtype[np.uint16] | np.dtype[np.int32]) -> None:
        self._file, self._dtype = file, dtype
        self._size = file.seek(0, os.SEEK_END) // dtype.itemsize

    def __getitem__(self, part: slice) -> np.ndarray:
        """Returns some of the ids, [n]; read-only."""
        start, stop, _ = part.indices(self._size)
        self._file.seek(start * self._dtype.itemsize)
        return np.frombuffer(self._file.read((stop - start) * self._dtype.itemsize), self._dtype)


@dataclass(frozen=True, eq=False)
class Encoded:
    """D documents, some of whose text may be left out."""

    ids: TokenFile  # all documents one after another
    lengths: np.ndarray  # int64 [D], tokens of each document
    unknown: np.ndarray  # int64 [D], how many of them are [UNK]
    usual: np.ndarray  # int64 [D], how many of them are not special tokens, so that a model can be asked for them
    spans: np.ndarray  # int64 [S, 2], first token and end of each span that is kept, in order
    offsets: np.ndarray  # int64 [D + 1]: document d's spans are spans[offsets[d] : offsets[d + 1]]

    @property
    def kept(self) -> np.ndarray:
        """How many tokens of each document are kept, int64 [D]."""
        sizes = np.concatenate([[0], np.cumsum(self.spans[:, 1] - self.spans[:, 0])])
        return np.diff(sizes[self.offsets])

    def pieces(self, documents: Iterable[int]) -> Iterator[np.ndarray]:
        """Yields what is kept of these documents: each whole, or as the pieces that it was cut into."""
        for d in documents:
            for first, end in self.spans[self.offsets[d] : self.offsets[d + 1]].tolist():
                yield self.ids[first:end]


def encode_documents(
    tokenizer: PreTrainedTokenizerFast,
    texts: Iterable[str],
    directory: Path,
    deduplicate: bool,
    count: Callable[[int], None],
    groups: np.ndarray | None = None,
) -> Encoded:
    """Encodes documents into a file.

    Args:
      tokenizer: with [CLS], [SEP] and [MASK].
      texts: the documents' texts, in the order of their source.
      directory: on the disk that the file goes to, which has no name there.
      deduplicate: leave out windows of tokens that came before, see `kept_spans`.
      count: called with the number of characters encoded so far.
      groups: integers [D], whose windows are compared with one another; None: all documents'.
    """
    dtype, usual = token_dtype(vocab_size(tokenizer)), usual_tokens(tokenizer)
    unknown_id = -1 if tokenizer.unk_token_id is None else tokenizer.unk_token_id  # some tokenizers know every byte
    facts = array("q")  # of each document: its tokens, the unknown and the usual ones among them
    file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - as long-lived as the result
    for ids in encode(tokenizer, texts, count=count):
        file.write(ids.tobytes())
        facts.extend((len(ids), int(np.count_nonzero(ids == unknown_id)), int(np.count_nonzero(usual[ids]))))
    lengths, unknown, known = np.array(facts, np.int64).reshape(-1, 3).T.copy()
    ends = np.cumsum(lengths)
    everything = TokenFile(file, dtype)
    if deduplicate:
        document, *bounds = kept_spans(everything, ends, directory, groups).T
    else:
        document, bounds = np.arange(len(ends)), [ends - lengths, ends]
    offsets = np.searchsorted(document, np.arange(len(ends) + 1))
    return Encoded(everything, lengths, unknown, known, np.stack(bounds, axis=1), offsets)


def usual_tokens(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Returns bool [V], false for the special tokens, including [UNK], which are neither masked nor predicted."""
    usual = np.ones(vocab_size(tokenizer), bool)
    usual[list(special_ids(tokenizer))] = False
    return usual
