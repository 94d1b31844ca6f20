"""Makes a run's token blocks and its tokenizer from its text, most of which is never in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fedbert_jax.config import Config
from fedbert_jax.data.blocks import BlockWriter, pack
from fedbert_jax.data.encoded import Encoded, encode_documents, usual_tokens
from fedbert_jax.data.partition import js_divergence
from fedbert_jax.data.progress import Progress
from fedbert_jax.data.rows import listed
from fedbert_jax.data.spool import Spool
from fedbert_jax.data.summary import ClientSummary, describe_left_out, describe_unknown
from fedbert_jax.data.text import Share, Text, read_text
from fedbert_jax.data.tokenizer import load_tokenizer, save_tokenizer, special_ids, token_dtype, vocab_size
from fedbert_jax.data.vocabulary import train_tokenizer
from fedbert_jax.errors import ConfigError, UserError

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast

LEARNT_FROM = 200_000_000  # characters that a tokenizer is trained on; of more text, documents spread evenly over it
COUNTED = 1 << 18  # tokens that are counted together, since each becomes 8 bytes


class Made(NamedTuple):
    """What is known of the blocks of N clients."""

    clients: tuple[ClientSummary, ...]
    special_ids: tuple[int, ...]
    unigram: np.ndarray  # int64 [V], how often each token is in the training blocks


class _Packed(NamedTuple):
    """How many blocks of a client are in train.npy and heldout.npy."""

    train: int
    heldout: int
    unusable: int  # training blocks that are left out, since no token in them could be masked


def make(
    config: Config, directory: Path, warn: Callable[[str], None], progress: Progress, only: tuple[int, str] | None
) -> Made:
    """Reads, deals, encodes and packs a run's text into `train.npy`, `heldout.npy` and `tokenizer/` of a directory.

    The text and its tokens are in temporary files there meanwhile.

    Args:
      config: the run's.
      directory: an empty one.
      warn, progress, only: see `dataset.prepare`.

    Raises:
      UserError: for text that cannot be read or that the tokenizer knows nothing of, or too few or too small clients.
    """
    text, encoded, tokenizer = _read(config, directory, warn, progress, only)
    data, special = config.data, special_ids(tokenizer)
    tokens = int(encoded.kept.sum())
    most = (tokens + len(encoded.spans)) // (data.seq_len - 1)
    progress.stage(f"packing {tokens:,} tokens into blocks of {data.seq_len}", "blocks", most)
    packed = _write_blocks(directory, text.shares, encoded, tokenizer, data.seq_len, progress)
    _report_left_out(config, text, encoded, packed, warn)
    kept = [(share, sizes) for share, sizes in zip(text.shares, packed, strict=True) if sizes.train]
    check_cohort(config, len(kept), alone=only is not None)
    if not any(sizes.heldout for _, sizes in kept):
        warn("no client holds out as much as one block, so nothing will be evaluated; raise data.eval_fraction.")
    elif unjudged := [share.name for share, sizes in kept if not sizes.heldout]:
        warn(f"clients who hold out no block, so that they are not evaluated: {len(unjudged):,}: {listed(unjudged)}.")

    blocks = [sizes.train for _, sizes in kept]
    unigram = np.zeros(vocab_size(tokenizer), np.int64)
    for counts in _counts(directory / "train.npy", blocks, len(unigram)):
        unigram += counts
    usual = usual_tokens(tokenizer)  # without [CLS], which is equally frequent in every client's blocks
    each = (counts * usual for counts in _counts(directory / "train.npy", blocks, len(unigram)))
    divergences = js_divergence(each, unigram * usual)
    summaries = [
        _summarise(config, text, encoded, share, sizes, float(divergence), sum(blocks))
        for (share, sizes), divergence in zip(kept, divergences, strict=True)
    ]
    unknown = describe_unknown(summaries)
    if unknown:
        warn(unknown)
    return Made(tuple(summaries), special, unigram)


def _read(
    config: Config, directory: Path, warn: Callable[[str], None], progress: Progress, only: tuple[int, str] | None
) -> tuple[Text, Encoded, PreTrainedTokenizerFast]:
    """Reads and encodes the text, of which no copy is kept."""
    data = config.data
    with Spool(directory) as spool:
        text = read_text(config, spool, warn, progress, only)
        tokenizer = _tokenizer(config, text, progress)
        save_tokenizer(tokenizer, directory / "tokenizer")
        words, clients = int(text.words.sum()), len(text.shares)
        progress.stage(f"encoding {words:,} words of {clients:,} clients", "characters", total := int(text.sizes.sum()))
        apart = None if data.deduplicate_across else text.owners
        encoded = encode_documents(tokenizer, text.texts(), directory, data.deduplicate, progress.count, apart)
        progress.count(total)  # repeated paragraphs, too, of which it wasn't told
    if not encoded.usual.any():
        key = "data.tokenizer" if data.tokenizer else "model.init_from"
        raise UserError(
            f"{key}={data.tokenizer or config.model.init_from!r} knows no word of data.source={data.source!r}; accepted: "
            "a tokenizer of the text's language, or data.tokenizer='train:SIZE', which makes one."
        )
    return text, encoded, tokenizer


def _tokenizer(config: Config, text: Text, progress: Progress) -> PreTrainedTokenizerFast:
    name = config.data.tokenizer or config.model.init_from
    if not name.startswith("train:"):
        progress.stage(f"loading the tokenizer {name!r}")
        return load_tokenizer(name)
    size = int(name.removeprefix("train:"))
    documents = np.sort(np.concatenate([share.train for share in text.shares]))  # held-out text stays unseen
    documents = documents[_spread(text.sizes[documents], LEARNT_FROM)]
    progress.stage(f"training a tokenizer of {size:,} tokens", "characters", int(text.sizes[documents].sum()))
    return train_tokenizer(text.texts(documents), size, config.data.lowercase, progress.count)


def _spread(sizes: np.ndarray, most: int) -> np.ndarray:
    """Returns bool [D]: all documents, or as many, spread evenly over them, as hold about `most` characters."""
    part = min(most / max(int(sizes.sum()), 1), 1.0)
    golden = (np.sqrt(5) - 1) / 2  # its multiples fall evenly into [0, 1), and in step with nothing that recurs
    return np.modf(np.arange(len(sizes)) * golden)[0] <= part


def _write_blocks(
    directory: Path,
    shares: Sequence[Share],
    encoded: Encoded,
    tokenizer: PreTrainedTokenizerFast,
    seq_len: int,
    progress: Progress,
) -> list[_Packed]:
    """Writes train.npy and heldout.npy, one client after another.

    Blocks are written as they fill. A client without a training block has none held out. A block in which no token may be
    masked, since all are special or [UNK], goes into neither file.
    """
    dtype, usual = token_dtype(vocab_size(tokenizer)), usual_tokens(tokenizer)
    cls_id, sep_id = int(tokenizer.cls_token_id), int(tokenizer.sep_token_id)
    packed = []
    with (
        BlockWriter(directory / "train.npy", seq_len, dtype) as train,
        BlockWriter(directory / "heldout.npy", seq_len, dtype) as heldout,
    ):
        for share in shares:
            before, unusable = (train.num_blocks, heldout.num_blocks), 0
            for writer, part in ((train, share.train), (heldout, share.heldout)):
                for blocks in pack(encoded.pieces(part), seq_len, cls_id, sep_id):
                    usable = usual[blocks].any(axis=1)
                    if writer is train or train.num_blocks > before[0]:
                        writer.append(blocks[usable])
                        progress.count(train.num_blocks + heldout.num_blocks)
                    unusable += int(np.count_nonzero(~usable)) if writer is train else 0
            packed.append(_Packed(train.num_blocks - before[0], heldout.num_blocks - before[1], unusable))
    return packed


def _summarise(
    config: Config, text: Text, encoded: Encoded, share: Share, sizes: _Packed, divergence: float, all_blocks: int
) -> ClientSummary:
    mine = share.documents
    left = text.words[mine] * encoded.kept[mine] / np.maximum(encoded.lengths[mine], 1)  # words, in proportion to tokens
    read = int((text.words[mine] + text.dropped[mine]).sum()) + share.emptied
    return ClientSummary(
        name=share.name,
        documents=int(np.count_nonzero(encoded.kept[mine])),
        words=round(left.sum()),
        train_blocks=sizes.train,
        heldout_blocks=sizes.heldout,
        tokens=sizes.train * config.data.seq_len,
        share=sizes.train / all_blocks,
        js_divergence=divergence,
        unknown=float(encoded.unknown[mine].sum() / encoded.lengths[mine].sum()),
        dropped_words=read - round(left.sum()),
    )


def _report_left_out(
    config: Config, text: Text, encoded: Encoded, packed: Sequence[_Packed], warn: Callable[[str], None]
) -> None:
    """Warns of clients without a training block, and says why; raises UserError if data.small_clients refuses them."""
    unknown, repeated = "with only unknown text for this tokenizer", "with little but repeated text (data.deduplicate)"
    small = f"without text for one training block of data.seq_len={config.data.seq_len} tokens"
    left_out = {unknown: [], repeated: list(text.emptied), small: []}
    for share, sizes in zip(text.shares, packed, strict=True):
        if not sizes.train:
            tokens, words, dropped = (int(x[share.train].sum()) for x in (encoded.lengths, text.words, text.dropped))
            # How many tokens there were before anything was left out, estimated for text that was not encoded.
            tokens += round(tokens * (dropped + share.emptied) / max(words, 1))
            if sizes.unusable or not encoded.usual[share.documents].any():
                left_out[unknown].append(share.name)
            else:
                left_out[repeated if tokens >= config.data.seq_len - 1 else small].append(share.name)
    clients = describe_left_out(left_out)
    if clients and config.data.small_clients == "error":
        raise UserError(f"data.small_clients='error' refuses clients: {clients}.")
    if clients:
        warn(f"clients left out: {clients}.")


def check_cohort(config: Config, num_clients: int, alone: bool = False) -> None:
    """Raises UserError unless a round can be made of as many clients; a party is alone, and can't tell."""
    per_round = config.federated.clients_per_round
    if num_clients == 0:
        raise UserError(
            f"data.source={config.data.source!r} leaves no client with a training block of data.seq_len="
            f"{config.data.seq_len} tokens; give more text, fewer clients or a smaller data.seq_len."
        )
    if per_round is not None and per_round > num_clients and not alone:
        raise ConfigError(
            f"config key federated.clients_per_round={per_round}: accepted: at most {num_clients}, "
            "which is how many clients have a training block."
        )


def _counts(path: Path, sizes: Sequence[int], vocab: int) -> Iterator[np.ndarray]:
    """Yields how often each token is in each client's blocks, int64 [V], reading them in parts."""
    blocks = np.load(path, mmap_mode="r")
    width = blocks.shape[1]
    step = max(COUNTED // width, 1)
    start = 0
    for size in sizes:
        total = np.zeros(vocab, np.int64)
        for first in range(start, start + size, step):
            rows = min(step, start + size - first)
            place = blocks.offset + first * width * blocks.itemsize  # not from the map, whose pages would stay in memory
            total += np.bincount(np.fromfile(path, blocks.dtype, rows * width, offset=place), minlength=vocab)
        yield total
        start += size
