"""A run's prepared data: made once, kept in its workdir, and the same ever after."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from fedbert_jax.config import Config
from fedbert_jax.console import Name
from fedbert_jax.data.blocks import BlockWriter, TokenBlocks, pack
from fedbert_jax.data.corpus import Document, read_documents
from fedbert_jax.data.partition import assign, hold_out, js_divergence
from fedbert_jax.data.tokenizer import encode, load_tokenizer, special_ids, token_dtype, train_tokenizer, vocab_size
from fedbert_jax.errors import ConfigError, UserError
from fedbert_jax.streams import seeds_of

if TYPE_CHECKING:  # it takes seconds to import
    from transformers import PreTrainedTokenizerFast

FORMAT = 1  # of the prepared directory; raise it when the same config makes other blocks
TABLE_ROWS, TABLE_LARGEST, TABLE_SMALLEST = 40, 10, 5

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClientSummary:
    """What one client holds."""

    name: str
    documents: int  # held-out ones included
    words: int  # held-out ones included
    train_blocks: int
    heldout_blocks: int
    tokens: int  # in its training blocks
    share: float  # of all training blocks
    js_divergence: float  # bits, of its training tokens (special ones aside) from everybody's


@dataclass(frozen=True, eq=False)
class Dataset:
    """Everything training reads."""

    train: TokenBlocks
    heldout: TokenBlocks  # of the same clients; one may have none
    client_names: tuple[str, ...]
    vocab_size: int
    special_ids: tuple[int, ...]
    summary: tuple[ClientSummary, ...]
    unigram: np.ndarray  # int64 [V], how often each token is in the training blocks


@dataclass(frozen=True)
class _Share:
    """A client's documents, by index."""

    name: str
    train: np.ndarray
    heldout: np.ndarray


def prepare(
    config: Config, directory: Path, *,
    warn: Callable[[str], None] = log.warning, progress: Callable[[str], None] = log.info,
) -> tuple[Dataset, PreTrainedTokenizerFast]:  # fmt: skip
    """Makes a run's token blocks and tokenizer, or takes those that `directory` holds.

    A finished directory is taken as it is, so a resumed run has the same data even if the text has changed since. It
    holds `train.npy`, `heldout.npy`, `meta.json` and `tokenizer/`; it is made beside its place and renamed into it, so
    a process killed at any moment leaves all of it or none. One process at a time may prepare a directory.

    Args:
      config: of the run.
      directory: where the data is or goes.
      warn: is told in a sentence of clients dropped because they fill no block, and of having no held-out text.
      progress: is told of each stage as it begins.

    Returns:
      The dataset, its blocks memory-mapped read-only, and the tokenizer.

    Raises:
      UserError: for text that cannot be read, too few or too small clients, or a directory that holds something else.
    """
    unfinished = directory.with_name(f".{directory.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    if not (directory / "meta.json").exists():
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise UserError(f"{directory} holds something else than prepared data; give another --workdir.")
        unfinished.mkdir(parents=True)
        try:
            _make(config, unfinished, warn, progress)
            os.replace(unfinished, directory)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
    return _load(config, directory)


def _origin(config: Config) -> dict[str, Any]:
    """What decides the data; a directory made from anything else is not this run's."""
    data = {k: v for k, v in dataclasses.asdict(config.data).items() if k not in ("store", "cache_dir")}
    init_from = config.model.init_from if not config.data.tokenizer else ""
    data |= {"num_clients": config.federated.num_clients, "init_from": init_from}
    return {"format": FORMAT, "seed": config.seed} | data


def _load(config: Config, directory: Path) -> tuple[Dataset, PreTrainedTokenizerFast]:
    try:
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{directory}/meta.json is damaged; remove {directory} to prepare the data again.") from error
    ours = _origin(config)
    for key, was in meta["origin"].items():
        value = ours.get(key, was)
        if was != value:
            raise UserError(f"{directory} was prepared with {key}={was!r}, not {value!r}; give another --workdir.")
    summary = tuple(ClientSummary(**client) for client in meta["clients"])
    _check_cohort(config, len(summary))
    dataset = Dataset(
        train=_open(directory / "train.npy", [c.train_blocks for c in summary]),
        heldout=_open(directory / "heldout.npy", [c.heldout_blocks for c in summary]),
        client_names=tuple(c.name for c in summary),
        vocab_size=len(meta["unigram"]),
        special_ids=tuple(meta["special_ids"]),
        summary=summary,
        unigram=np.array(meta["unigram"], dtype=np.int64),
    )
    return dataset, load_tokenizer(str(directory / "tokenizer"))


def _open(path: Path, sizes: Sequence[int]) -> TokenBlocks:
    return TokenBlocks(np.load(path, mmap_mode="r"), np.cumsum([0, *sizes], dtype=np.int64))


def _make(config: Config, directory: Path, warn: Callable[[str], None], progress: Callable[[str], None]) -> None:
    data, f = config.data, config.federated
    progress(f"reading data.source={data.source!r}")
    documents = read_documents(data, warn=warn, count=lambda n: None)
    words = np.array([len(document.text.split()) for document in documents])
    names, owned = assign([d.group for d in documents], words, data.partition, f.num_clients, seeds_of(config))
    shares = []
    for client, (name, mine) in enumerate(zip(names, owned, strict=True)):
        held = hold_out(words[mine], data.eval_fraction, seeds_of(config), client)
        shares.append(_Share(name, mine[~held], mine[held]))

    tokenizer = _tokenizer(config, documents, shares, progress)
    special = special_ids(tokenizer)
    tokenizer.save_pretrained(directory / "tokenizer")

    taken = sum(int(words[mine].sum()) for mine in owned)
    progress(f"packing {taken:,} words of {len(shares):,} clients into blocks of {data.seq_len} tokens")
    sizes = _write_blocks(directory, documents, shares, tokenizer, data.seq_len)
    kept = [(share, train, heldout) for share, (train, heldout) in zip(shares, sizes, strict=True) if train]
    _report_small([share.name for share, (train, _) in zip(shares, sizes, strict=True) if not train], config, warn)
    _check_cohort(config, len(kept))
    if not any(heldout for *_, heldout in kept):
        warn("no client holds out as much as one block, so nothing will be evaluated; raise data.eval_fraction.")

    blocks = _open(directory / "train.npy", [train for _, train, _ in kept])
    unigram = _count(blocks.tokens, vocab_size(tokenizer))
    usual = ~np.isin(np.arange(len(unigram)), special)  # [CLS] is as often in every client's blocks
    each = (_count(blocks.client(c), len(unigram)) * usual for c in range(blocks.num_clients))
    divergences = js_divergence(each, unigram * usual)
    clients = []
    for (share, train, heldout), divergence in zip(kept, divergences, strict=True):
        mine = np.concatenate([share.train, share.heldout])
        summary = ClientSummary(
            name=share.name, documents=len(mine), words=int(words[mine].sum()), train_blocks=train,
            heldout_blocks=heldout, tokens=train * data.seq_len, share=train / len(blocks.tokens),
            js_divergence=float(divergence),
        )  # fmt: skip
        clients.append(dataclasses.asdict(summary))
    meta = {"origin": _origin(config), "special_ids": special, "unigram": unigram.tolist(), "clients": clients}
    (directory / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def _tokenizer(
    config: Config, documents: Sequence[Document], shares: Sequence[_Share], progress: Callable[[str], None]
) -> PreTrainedTokenizerFast:
    name = config.data.tokenizer or config.model.init_from
    if not name.startswith("train:"):
        progress(f"loading the tokenizer {name!r}")
        return load_tokenizer(name)
    size = int(name.removeprefix("train:"))
    progress(f"training a tokenizer of {size:,} tokens")
    texts = (documents[i].text for share in shares for i in share.train)  # held-out text stays unseen
    return train_tokenizer(texts, size, config.data.lowercase)


def _write_blocks(
    directory: Path, documents: Sequence[Document], shares: Sequence[_Share], tokenizer: PreTrainedTokenizerFast,
    seq_len: int,
) -> list[tuple[int, int]]:  # fmt: skip
    """Writes train.npy and heldout.npy, a client after the other; returns each one's number of blocks in them.

    Blocks go to the files as they fill, so memory holds the text and a batch of tokens. A client without a training
    block has none held out.
    """
    dtype = token_dtype(vocab_size(tokenizer))
    texts = (documents[i].text for share in shares for part in (share.train, share.heldout) for i in part)
    ids = encode(tokenizer, texts)
    cls_id, sep_id = int(tokenizer.cls_token_id), int(tokenizer.sep_token_id)
    sizes = []
    with (
        BlockWriter(directory / "train.npy", seq_len, dtype) as train,
        BlockWriter(directory / "heldout.npy", seq_len, dtype) as heldout,
    ):
        for share in shares:
            before = train.num_blocks, heldout.num_blocks
            for writer, part in ((train, share.train), (heldout, share.heldout)):
                for blocks in pack(itertools.islice(ids, len(part)), seq_len, cls_id, sep_id):
                    if writer is train or train.num_blocks > before[0]:
                        writer.append(blocks)
            sizes.append((train.num_blocks - before[0], heldout.num_blocks - before[1]))
    return sizes


def _report_small(names: Sequence[str], config: Config, warn: Callable[[str], None]) -> None:
    if not names:
        return
    listed = ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")
    what = f"without text for one training block of data.seq_len={config.data.seq_len} tokens: {listed}"
    if config.data.small_clients == "error":
        raise UserError(f"data.small_clients='error' refuses clients ({len(names):,} here) {what}.")
    warn(f"dropped {len(names):,} of the clients, those {what}.")


def _check_cohort(config: Config, num_clients: int) -> None:
    per_round = config.federated.clients_per_round
    if num_clients == 0:
        raise UserError(
            f"data.source={config.data.source!r} leaves no client with a training block of data.seq_len="
            f"{config.data.seq_len} tokens; give more text, fewer clients or a smaller data.seq_len."
        )
    if per_round is not None and per_round > num_clients:
        raise ConfigError(
            f"config key federated.clients_per_round={per_round}: accepted: at most {num_clients}, "
            "which is how many clients have a training block."
        )


def _count(blocks: np.ndarray, size: int) -> np.ndarray:
    """Counts each token, int64 [V]; by parts, since bincount makes an int64 copy of what it counts."""
    total = np.zeros(size, dtype=np.int64)
    for start in range(0, len(blocks), 65536):
        total += np.bincount(blocks[start : start + 65536].ravel(), minlength=size)
    return total


def client_table(dataset: Dataset) -> Table:
    """Lists the clients, largest first, and all together; of more than 40, the largest ten and the smallest five."""
    table = Table(title=f"{len(dataset.summary):,} clients")
    table.add_column("client", overflow="fold")
    for column in ("documents", "blocks", "held-out", "tokens", "share", "JS (bits)"):
        table.add_column(column, justify="right", no_wrap=True)
    clients = sorted(dataset.summary, key=lambda c: (-c.train_blocks, c.name))
    hidden = len(clients) - TABLE_LARGEST - TABLE_SMALLEST if len(clients) > TABLE_ROWS else 0

    def add(name: str, members: Sequence[ClientSummary]) -> None:
        sums = [sum(getattr(c, k) for c in members) for k in ("documents", "train_blocks", "heldout_blocks", "tokens")]
        share, divergence = sum(c.share for c in members), np.mean([c.js_divergence for c in members])
        table.add_row(Name(name), *(f"{n:,}" for n in sums), f"{share:.1%}", f"{divergence:.3f}")

    for place, client in enumerate(clients):
        if not hidden or not TABLE_LARGEST <= place < TABLE_LARGEST + hidden:
            add(client.name, [client])
        elif place == TABLE_LARGEST:
            table.add_row(f"... {hidden:,} more", *["..."] * 6)
    table.add_section()
    add("all (JS: their mean)", clients)
    return table
