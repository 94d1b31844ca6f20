"""A run's prepared data: made once, kept in its workdir, and never changed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fedbert_jax.config import Config
from fedbert_jax.data.blocks import BlockWriter, TokenBlocks, pack
from fedbert_jax.data.encoded import Encoded, encode_documents, usual_tokens
from fedbert_jax.data.partition import js_divergence
from fedbert_jax.data.progress import Logged, Progress
from fedbert_jax.data.rows import listed
from fedbert_jax.data.streams import seeds_of
from fedbert_jax.data.summary import ClientSummary, describe_left_out, describe_unknown
from fedbert_jax.data.text import Share, Text, read_text
from fedbert_jax.data.tokenizer import load_tokenizer, save_tokenizer, special_ids, token_dtype, vocab_size
from fedbert_jax.data.vocabulary import train_tokenizer
from fedbert_jax.errors import ConfigError, UserError, about

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast

FORMAT = 2  # of the prepared directory; raise it when the same config gives different blocks

log = logging.getLogger(__name__)


FILES = ("train.npy", "heldout.npy", "meta.json")  # of a prepared directory, beside tokenizer/
REMEDY = "give another --workdir"


@dataclass(frozen=True, eq=False)
class Dataset:
    """Everything that training reads."""

    train: TokenBlocks
    heldout: TokenBlocks  # of the same clients, some of which may have none
    client_names: tuple[str, ...]
    vocab_size: int
    special_ids: tuple[int, ...]
    summary: tuple[ClientSummary, ...]
    unigram: np.ndarray  # int64 [V], how often each token is in the training blocks


class _Packed(NamedTuple):
    """How many blocks of a client are in train.npy and heldout.npy."""

    train: int
    heldout: int
    unusable: int  # training blocks that are left out, since no token in them could be masked


def prepare(
    config: Config,
    directory: Path,
    *,
    warn: Callable[[str], None] = log.warning,
    progress: Progress | None = None,
    only: tuple[int, str] | None = None,
    remedy: str = REMEDY,
) -> tuple[Dataset, PreTrainedTokenizerFast]:
    """Makes a run's token blocks and tokenizer, or takes those that `directory` holds.

    A finished directory is taken as it is, so a resumed run has the same data even if the text has changed since. It
    holds `train.npy`, `heldout.npy`, `meta.json` and `tokenizer/`. It is made beside its final place and then renamed, so a
    process killed at any moment leaves all of it or none. Only one process at a time may prepare a directory.

    Args:
      config: the run's.
      directory: where the data is or goes.
      warn: called with a sentence about clients left out, text that the tokenizer doesn't know, or missing held-out text.
      progress: called as each stage begins, and with how much of it is done; by default, stages go to the log.
      only: of a party in a federation, its index in the roster and its name; None: all clients' text is here.
      remedy: what errors advise where the directory holds something else.

    Returns:
      The dataset, with its blocks memory-mapped read-only, and the tokenizer.

    Raises:
      UserError: for text that cannot be read or that the tokenizer knows nothing of, too few or too small clients, or a
        directory that holds something else.
    """
    unfinished = directory.with_name(f".{directory.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    if not (directory / "meta.json").exists():
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise UserError(f"{directory} holds something else than prepared data; {remedy}.")
        unfinished.mkdir(parents=True)
        try:
            if config.data.prepared:
                _take(config, Path(config.data.prepared).expanduser(), unfinished, progress or Logged())
            else:
                _make(config, unfinished, warn, progress or Logged(), only)
            os.replace(unfinished, directory)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
    return _load(config, directory, only, remedy)


def _take(config: Config, prepared: Path, directory: Path, progress: Progress) -> None:
    """Links what was prepared elsewhere into a run's own directory, or copies it from another file system."""
    if not (prepared / "meta.json").is_file():
        raise ConfigError(
            f"config key data.prepared={config.data.prepared!r}: accepted: a directory made by "
            "`python -m fedbert_jax.prepare`."
        )
    with about(f"config key data.prepared={config.data.prepared!r}"):
        _load(config, prepared, None, "prepare it for this config")
    progress.stage(f"taking the blocks that are in {prepared}")
    (directory / "tokenizer").mkdir()
    for path in [*map(prepared.joinpath, FILES), *(prepared / "tokenizer").iterdir()]:
        place = directory / path.relative_to(prepared)
        try:
            os.link(path, place)
        except OSError:  # another file system, or one without links
            shutil.copyfile(path, place)


def _origin(config: Config, only: tuple[int, str] | None) -> dict[str, Any]:
    """Returns what decides the data; a directory made from anything else is not this run's."""
    data = {k: v for k, v in dataclasses.asdict(config.data).items() if k not in ("store", "cache_dir", "prepared")}
    init_from = config.model.init_from if not config.data.tokenizer else ""
    # A party's own text doesn't depend on how many others there are, which it is told later.
    who = {"num_clients": config.federated.num_clients} if only is None else {"index": only[0], "name": only[1]}
    origin = {"format": FORMAT, "seed": config.seed, "client_seed": _print_of(seeds_of(config).client)}
    return origin | who | data | {"init_from": init_from}


def _print_of(secret: int) -> str:
    """Returns what tells one secret of the clients' from another without saying it: pads are made from it."""
    return "sha256:" + hashlib.sha256(f"fedbert_jax prepared data {secret}".encode()).hexdigest()


def _load(
    config: Config, directory: Path, only: tuple[int, str] | None, remedy: str
) -> tuple[Dataset, PreTrainedTokenizerFast]:
    try:
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{directory}/meta.json is damaged; remove {directory} to prepare the data again.") from error
    if meta["origin"].get("format") != FORMAT:
        raise UserError(
            f"{directory} was prepared by another version of fedbert_jax, which alone can go on with it or export its model."
        )
    ours = _origin(config, only)
    if isinstance(meta["origin"].get("client_seed"), int):  # of an earlier version
        meta["origin"]["client_seed"] = _print_of(meta["origin"]["client_seed"])
    for key, was in meta["origin"].items():
        value = ours.get(key, was)
        if key == "client_seed" and was != value:
            raise UserError(f"{directory} was prepared with another privacy.client_seed; {remedy}.")
        if was != value:
            raise UserError(f"{directory} was prepared with {key}={was!r}, not {value!r}; {remedy}.")
    summary = tuple(ClientSummary(**client) for client in meta["clients"])
    if only is None:
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


def _make(
    config: Config, directory: Path, warn: Callable[[str], None], progress: Progress, only: tuple[int, str] | None
) -> None:
    data = config.data
    text = read_text(config, warn, progress, only)
    tokenizer = _tokenizer(config, text, progress)
    save_tokenizer(tokenizer, directory / "tokenizer")
    special = special_ids(tokenizer)

    words, clients = int(text.words.sum()), len(text.shares)
    progress.stage(f"encoding {words:,} words of {clients:,} clients", "characters", sum(map(len, text.texts)))
    apart = None if data.deduplicate_across else text.owners
    encoded = encode_documents(tokenizer, text.texts, directory / "documents.bin", data.deduplicate, progress.count, apart)
    if not encoded.usual.any():
        key = "data.tokenizer" if data.tokenizer else "model.init_from"
        raise UserError(
            f"{key}={data.tokenizer or config.model.init_from!r} knows no word of data.source={data.source!r}; accepted: "
            "a tokenizer of the text's language, or data.tokenizer='train:SIZE', which makes one."
        )
    tokens = int(encoded.kept.sum())
    most = (tokens + len(encoded.spans)) // (data.seq_len - 1)
    progress.stage(f"packing {tokens:,} tokens into blocks of {data.seq_len}", "blocks", most)
    packed = _write_blocks(directory, text.shares, encoded, tokenizer, data.seq_len, progress)
    _report_left_out(config, text, encoded, packed, warn)
    kept = [(share, sizes) for share, sizes in zip(text.shares, packed, strict=True) if sizes.train]
    _check_cohort(config, len(kept), alone=only is not None)
    if not any(sizes.heldout for _, sizes in kept):
        warn("no client holds out as much as one block, so nothing will be evaluated; raise data.eval_fraction.")
    elif unjudged := [share.name for share, sizes in kept if not sizes.heldout]:
        warn(f"clients who hold out no block, so that they are not evaluated: {len(unjudged):,}: {listed(unjudged)}.")

    blocks = _open(directory / "train.npy", [sizes.train for _, sizes in kept])
    unigram = _count(blocks.tokens, vocab_size(tokenizer))
    usual = usual_tokens(tokenizer)  # without [CLS], which is equally frequent in every client's blocks
    each = (_count(blocks.client(c), len(unigram)) * usual for c in range(blocks.num_clients))
    divergences = js_divergence(each, unigram * usual)
    summaries = [
        _summarise(config, text, encoded, share, sizes, float(divergence), len(blocks.tokens))
        for (share, sizes), divergence in zip(kept, divergences, strict=True)
    ]
    unknown = describe_unknown(summaries)
    if unknown:
        warn(unknown)
    (directory / "documents.bin").unlink()
    meta = {
        "origin": _origin(config, only),
        "special_ids": special,
        "unigram": unigram.tolist(),
        "clients": [dataclasses.asdict(s) for s in summaries],
    }
    (directory / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def _tokenizer(config: Config, text: Text, progress: Progress) -> PreTrainedTokenizerFast:
    name = config.data.tokenizer or config.model.init_from
    if not name.startswith("train:"):
        progress.stage(f"loading the tokenizer {name!r}")
        return load_tokenizer(name)
    size = int(name.removeprefix("train:"))
    texts = [text.texts[i] for share in text.shares for i in share.train]  # held-out text stays unseen
    progress.stage(f"training a tokenizer of {size:,} tokens", "characters", sum(map(len, texts)))
    return train_tokenizer(texts, size, config.data.lowercase, progress.count)


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


def _check_cohort(config: Config, num_clients: int, alone: bool = False) -> None:
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


def _count(blocks: np.ndarray, size: int) -> np.ndarray:
    """Counts each token, int64 [V], in parts, since bincount makes an int64 copy of what it counts."""
    total = np.zeros(size, dtype=np.int64)
    for start in range(0, len(blocks), 65536):
        total += np.bincount(blocks[start : start + 65536].ravel(), minlength=size)
    return total
