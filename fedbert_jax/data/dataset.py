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
from typing import TYPE_CHECKING, Any

import numpy as np

from fedbert_jax.config import Config
from fedbert_jax.data.blocks import TokenBlocks
from fedbert_jax.data.making import check_cohort, make
from fedbert_jax.data.progress import Logged, Progress
from fedbert_jax.data.streams import seeds_of
from fedbert_jax.data.summary import ClientSummary
from fedbert_jax.data.tokenizer import load_tokenizer
from fedbert_jax.errors import ConfigError, UserError, about

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast

FORMAT = 2  # of the prepared directory; raise it when the same config gives different blocks

log = logging.getLogger(__name__)


FILES = ("train.npy", "heldout.npy", "meta.json")  # of a prepared directory, beside tokenizer/
UNRELATED = ("store", "cache_dir", "prepared", "streaming")  # keys of `data` on which the blocks don't depend
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
            holds = "holds something else than prepared data" if directory.is_dir() else "is a file"
            raise UserError(f"{directory} {holds}; {remedy}.")
        unfinished.mkdir(parents=True)
        try:
            if config.data.prepared:
                _take(config, Path(config.data.prepared).expanduser(), unfinished, progress or Logged())
            else:
                made = make(config, unfinished, warn, progress or Logged(), only)
                meta = {
                    "origin": _origin(config, only),
                    "special_ids": made.special_ids,
                    "unigram": made.unigram.tolist(),
                    "clients": [dataclasses.asdict(client) for client in made.clients],
                }
                (unfinished / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
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
            "`fedbert prepare`, which is `python -m fedbert_jax.prepare`."
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
    data = {k: v for k, v in dataclasses.asdict(config.data).items() if k not in UNRELATED}
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
    if not (directory / "tokenizer" / "tokenizer.json").is_file():
        raise UserError(f"{directory}/tokenizer is missing or damaged; remove {directory} to prepare the data again.")
    summary = tuple(ClientSummary(**client) for client in meta["clients"])
    if only is None:
        check_cohort(config, len(summary))
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
    try:
        blocks = np.load(path, mmap_mode="r")
    except (FileNotFoundError, ValueError, EOFError) as error:
        why = "missing" if isinstance(error, FileNotFoundError) else "damaged"
        raise UserError(f"{path} is {why}; remove {path.parent} to prepare the data again.") from error
    return TokenBlocks(blocks, np.cumsum([0, *sizes], dtype=np.int64))
