"""A run's text before it becomes tokens: its documents, without repeated paragraphs, and who holds which."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fedbert_jax.config import Config
from fedbert_jax.data.corpus import read_documents
from fedbert_jax.data.docs import DOCS_MIN_WORDS
from fedbert_jax.data.duplicates import Paragraphs, Repeats
from fedbert_jax.data.partition import assign, hold_out
from fedbert_jax.data.progress import Progress
from fedbert_jax.data.spool import Spool
from fedbert_jax.data.streams import seeds_of
from fedbert_jax.data.words import count_words
from fedbert_jax.errors import UserError


class Share(NamedTuple):
    """A client's documents, by index."""

    name: str
    train: np.ndarray
    heldout: np.ndarray
    emptied: int  # words of its documents that are gone, since all their paragraphs came before; 0 if documents are dealt

    @property
    def documents(self) -> np.ndarray:
        """All of the client's documents."""
        return np.concatenate([self.train, self.heldout])


@dataclass(frozen=True, eq=False)
class Text:
    """The D documents of all clients, in the order of their source."""

    words: np.ndarray  # int64 [D]
    dropped: np.ndarray  # int64 [D], words of repeated paragraphs left out of each document
    shares: list[Share]
    emptied: list[str]  # clients that are gone, since all their paragraphs came before
    _spool: Spool
    _places: np.ndarray  # int64 [D], increasing: where in the spool each document is
    _repeats: Repeats | None

    @property
    def owners(self) -> np.ndarray:
        """Which client holds each document, int64 [D]."""
        owners = np.zeros(len(self.words), np.int64)
        for client, share in enumerate(self.shares):
            owners[share.documents] = client
        return owners

    @property
    def sizes(self) -> np.ndarray:
        """The characters of each document, repeated paragraphs included, int64 [D]."""
        return self._spool.sizes[self._places]

    def texts(self, documents: np.ndarray | None = None) -> Iterator[str]:
        """Yields the documents, or those of them with these indices, in the order of their source."""
        wanted = np.zeros(len(self._spool), bool)
        wanted[self._places if documents is None else self._places[documents]] = True
        for place, text in zip(np.flatnonzero(wanted).tolist(), self._spool.texts(wanted), strict=True):
            yield text if self._repeats is None else self._repeats.left(place, text)


def read_text(
    config: Config, spool: Spool, warn: Callable[[str], None], progress: Progress, only: tuple[int, str] | None = None
) -> Text:
    """Reads `data.source`, leaves out paragraphs that came before, deals the documents and draws what is held out.

    Args:
      config: the run's.
      spool: where the documents go, which has to stay open while they are used; empty.
      warn, progress: see `dataset.prepare`.
      only: of a party in a federation, its index and name: all text is its own, and its draws are those of that index.

    Raises:
      UserError: for text that cannot be read, or fewer documents than clients.
    """
    data, seeds = config.data, seeds_of(config)
    progress.stage(f"reading data.source={data.source!r}", "documents")
    paragraphs = Paragraphs() if data.deduplicate else None
    counts = array("q")
    for document in read_documents(data, warn=warn, count=progress.count):
        spool.add(document.text, document.group if only is None else only[1])
        if paragraphs is None:
            counts.append(count_words(document.text))
        else:
            paragraphs.add(document.text)
    names, codes = spool.names, spool.groups
    words = np.array(counts, np.int64) if paragraphs is None else paragraphs.words
    chosen = np.ones(len(spool), bool)
    natural, wanted = data.partition.kind == "natural", config.federated.num_clients
    if natural and wanted is not None and only is None:
        # Before repeats are dropped, so that no text is lost because it first occurs at a client that doesn't take part.
        taking_part = set(assign([names[code] for code in codes], words, data.partition, wanted, seeds)[0])
        chosen = np.array([name in taking_part for name in names], bool)[codes]
    dropped, repeats = np.zeros_like(words), None
    if paragraphs is not None:
        repeats = paragraphs.repeats(chosen, None if data.deduplicate_across else codes, spool.directory)
        words, dropped = repeats.words, repeats.dropped

    min_words = DOCS_MIN_WORDS if data.source.startswith("docs:") else 1
    kept = np.flatnonzero(chosen & (words >= min_words))
    if not len(kept):
        raise UserError(f"data.source={data.source!r} has no text: no document in it has {min_words} words.")
    emptied: Counter[str] = Counter()
    for place in np.flatnonzero(chosen & (words < min_words)).tolist():
        emptied[names[codes[place]]] += int(words[place] + dropped[place])
    words, dropped, codes = words[kept], dropped[kept], codes[kept]

    groups = [names[code] for code in codes]
    clients, owned = assign(groups, words, data.partition, None if natural or only else wanted, seeds)
    taken = np.sort(np.concatenate(owned))  # the others belong to clients that don't take part
    shares = []
    for client, (name, mine) in enumerate(zip(clients, owned, strict=True)):
        held = hold_out(words[mine], data.eval_fraction, seeds, client if only is None else only[0])
        places = np.searchsorted(taken, mine)
        shares.append(Share(name, places[~held], places[held], emptied[name] if natural else 0))
    lost = sorted(emptied.keys() - set(groups)) if natural else []
    return Text(words[taken], dropped[taken], shares, lost, spool, kept[taken], repeats)
