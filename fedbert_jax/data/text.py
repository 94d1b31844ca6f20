"""A run's text before it becomes tokens: its documents, without repeated paragraphs, and who holds which."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fedbert_jax.config import Config
from fedbert_jax.data.corpus import Document, read_documents
from fedbert_jax.data.docs import DOCS_MIN_WORDS
from fedbert_jax.data.duplicates import drop_repeated_paragraphs
from fedbert_jax.data.partition import assign, hold_out
from fedbert_jax.data.progress import Progress
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
    """The documents of all clients, in the order of their source."""

    texts: list[str]
    words: np.ndarray  # int64 [D]
    dropped: np.ndarray  # int64 [D], words of repeated paragraphs left out of each document
    shares: list[Share]
    emptied: list[str]  # clients that are gone, since all their paragraphs came before

    @property
    def owners(self) -> np.ndarray:
        """Which client holds each document, int64 [D]."""
        owners = np.zeros(len(self.texts), np.int64)
        for client, share in enumerate(self.shares):
            owners[share.documents] = client
        return owners


def read_text(config: Config, warn: Callable[[str], None], progress: Progress, only: tuple[int, str] | None = None) -> Text:
    """Reads `data.source`, leaves out paragraphs that came before, deals the documents and draws what is held out.

    Args:
      config: the run's.
      warn, progress: see `dataset.prepare`.
      only: of a party in a federation, its index and name: all text is its own, and its draws are those of that index.

    Raises:
      UserError: for text that cannot be read, or fewer documents than clients.
    """
    data, seeds = config.data, seeds_of(config)
    progress.stage(f"reading data.source={data.source!r}", "documents")
    documents = read_documents(data, warn=warn, count=progress.count)
    if only is not None:
        documents = [Document(document.text, only[1]) for document in documents]
    natural, wanted = data.partition.kind == "natural", config.federated.num_clients
    if natural and wanted is not None and only is None:
        # Before repeats are dropped, so that no text is lost because it first occurs at a client that doesn't take part.
        words = np.array([count_words(document.text) for document in documents], np.int64)
        chosen = set(assign([document.group for document in documents], words, data.partition, wanted, seeds)[0])
        documents = [document for document in documents if document.group in chosen]
    kept, words, dropped, emptied = _without_repeats(documents, config)
    groups = [document.group for document in kept]
    names, owned = assign(groups, words, data.partition, None if natural or only else wanted, seeds)
    taken = np.sort(np.concatenate(owned))  # the others belong to clients that don't take part
    shares = []
    for client, (name, mine) in enumerate(zip(names, owned, strict=True)):
        held = hold_out(words[mine], data.eval_fraction, seeds, client if only is None else only[0])
        places = np.searchsorted(taken, mine)
        shares.append(Share(name, places[~held], places[held], emptied[name] if natural else 0))
    lost = sorted(emptied.keys() - set(groups)) if natural else []
    return Text([kept[i].text for i in taken], words[taken], dropped[taken], shares, lost)


def _without_repeats(
    documents: list[Document], config: Config
) -> tuple[list[Document], np.ndarray, np.ndarray, Counter[str]]:
    """Returns what is left of the documents, the words of each, the words left out of each, and emptied groups' words."""
    min_words = DOCS_MIN_WORDS if config.data.source.startswith("docs:") else 1
    texts: Iterable[str] = (document.text for document in documents)
    if config.data.deduplicate:
        groups = None if config.data.deduplicate_across else (document.group for document in documents)
        texts = drop_repeated_paragraphs(texts, groups)
    kept: list[Document] = []
    counts: list[tuple[int, int]] = []
    emptied: Counter[str] = Counter()
    for document, text in zip(documents, texts, strict=True):
        words = count_words(text)
        dropped = 0 if text is document.text else count_words(document.text) - words
        if words >= min_words:
            kept.append(document if not dropped else Document(text, document.group))
            counts.append((words, dropped))
        else:
            emptied[document.group] += words + dropped
    if not kept:
        raise UserError(f"data.source={config.data.source!r} has no text: no document in it has {min_words} words.")
    return kept, *np.array(counts, np.int64).T, emptied
