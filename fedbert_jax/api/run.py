"""A run in a directory: trained, stopped and gone on with, looked at, exported and audited from Python."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedbert_jax import config as config_lib
from fedbert_jax import disk
from fedbert_jax.config import Config
from fedbert_jax.config.files import known, load_config
from fedbert_jax.console.output import make_console
from fedbert_jax.errors import ConfigError, UserError
from fedbert_jax.workdir.log import Record, read_metrics
from fedbert_jax.workdir.paths import Workdir

if TYPE_CHECKING:
    import pandas as pd

    from fedbert_jax.federated.state import Pair

Documents = Iterable[tuple[str, str]]  # (client, text), a document each
Callback = Callable[[Record], object]
# A library says nothing by itself; Orbax warns that a checkpoint that is only read will not be written.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname or record.levelno >= logging.ERROR)
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # without torch, it would say so
STOP: Literal["stop"] = "stop"  # what a callback returns to end the training after the round under way
DOCUMENTS = "documents.jsonl"
INTERRUPTED = 130


class Run:
    """A run in a directory of its own, the one that the commands call its workdir.

    Args:
      workdir: the directory; made when training begins. One in which a run was begun is gone on with.
      config: what to train: a config, or the name or file of one. A run that was begun has its own.
      changes: to the config, by dotted key, as `load_config` takes them.
      documents: the text, in place of the config's `data.source`: pairs of a client's name and a document. They are kept in
        the workdir, in clear, as documents.jsonl.

    Raises:
      UserError: if there is neither a config nor a run, or the config can't be used.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        config: Config | str | os.PathLike[str] | None = None,
        changes: Mapping[str, Any] | None = None,
        *,
        documents: Documents | None = None,
    ) -> None:
        self.workdir, self._documents = Path(workdir), documents
        changes = dict(changes or {})
        if documents is not None:
            source = f"text:{(self.workdir / DOCUMENTS).resolve()}"
            begun = Workdir(self.workdir).read_config().data.source if Workdir(self.workdir).exists() else ""
            source = begun if begun.endswith(f"/{DOCUMENTS}") else source  # wherever the workdir was then
            changes |= {"data.source": source, "data.text_field": "text", "data.client_field": "client"}
        if config is None:
            config = Workdir(self.workdir).read_config()  # says so if there is no run
        if isinstance(config, Config):
            self._given = config_lib.from_dict(config_lib.to_dict(config_lib.replace(config, known(changes))))
        else:
            self._given = load_config(config, changes)

    def __repr__(self) -> str:
        return f"fedbert_jax.Run({str(self.workdir)!r})"

    @property
    def config(self) -> Config:
        """The resolved config; before training begins, the one given."""
        there = Workdir(self.workdir)
        return there.read_config() if there.exists() else self._given

    @property
    def round(self) -> int:
        """Rounds that are finished and in metrics.jsonl; 0 before the first."""
        records = self._records()
        return int(records[-1]["round"]) if records else 0

    @property
    def finished(self) -> bool:
        """Whether training has come to its end, and the model is in DIR/hf."""
        return bool(Workdir(self.workdir).read_facts().get("finished"))

    # --- training ---

    def train(self, callback: Callback | None = None, *, progress: bool = True) -> bool:
        """Trains to the last round, from where the workdir's newest checkpoint is, and exports the model to DIR/hf.

        Args:
          callback: called after every round with its line of metrics.jsonl: `round` (from 1; 0 is the evaluation before the
            first), `step`, `tokens`, `train_loss`, ... and, where the round was evaluated, `eval_loss` (nats a token),
            `eval_accuracy` and `eval_clients`. If it returns `STOP`, training ends after the round under way, with a
            checkpoint. Rounds that were trained before are not told again.
          progress: whether to print what the command prints, with a bar on a terminal or in a notebook.

        Returns:
          True if the last round is over, False if the callback has ended it; `train` again goes on, bit for bit as if it had
          never stopped.

        Raises:
          UserError: for what can be mended: a setting, text, a full disk, numbers that are no longer finite.
          KeyboardInterrupt: for Ctrl-C, when the round under way is over and saved.
        """
        from fedbert_jax.train import train

        config = self._given
        if config.task != "pretrain":
            raise ConfigError(f"config key task={config.task!r}: accepted by Run.train: 'pretrain'.")
        self._write_documents()
        asked = False

        def watch(record: Record) -> bool:
            nonlocal asked
            asked = (callback is not None and callback(record) is STOP) or asked
            return asked

        code = train(config, self.workdir, make_console(quiet=not progress), watch)
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        if code and not asked:
            raise SystemExit(code)  # SIGTERM
        return code == 0

    def _write_documents(self) -> None:
        """Writes the documents down, or checks that they are those the run was begun with."""
        if self._documents is None:
            return
        place, seen = self.workdir / DOCUMENTS, hashlib.sha256()
        if self.workdir.exists() and not self.workdir.is_dir():
            raise UserError(f"{self.workdir} is no directory; give another place.")
        with disk.writing(place):
            self.workdir.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.workdir, prefix=f".{DOCUMENTS}")
            try:
                with os.fdopen(handle, "wb") as file:
                    for pair in self._documents:
                        if not (isinstance(pair, tuple | list) and [*map(type, pair)] == [str, str]):
                            raise UserError("documents: accepted: pairs of a client's name and a text, both str.")
                        document = json.dumps(dict(zip(("client", "text"), pair, strict=True)), ensure_ascii=False)
                        try:
                            line = document.encode() + b"\n"
                        except UnicodeEncodeError as error:
                            raise UserError(
                                f"documents: one of client {pair[0]!r} can't be written as UTF-8 ({error})."
                            ) from error
                        seen.update(line)
                        file.write(line)
                begun = Workdir(self.workdir).exists()
                if begun and not place.is_file():
                    raise UserError(f"documents: accepted by the run in {self.workdir}: none, as {DOCUMENTS} is gone.")
                if begun and _digest(place) != seen.hexdigest():
                    raise UserError(f"documents: they are not those that the run in {self.workdir} was begun with.")
                os.replace(name, place)
            finally:
                if os.path.exists(name):
                    os.unlink(name)
        self._documents = None  # an iterator gives them once

    # --- what came of it ---

    def metrics(self) -> pd.DataFrame:
        """Returns metrics.jsonl as a table: a row a round, indexed by `round`, a column a number; NaN where there is none.

        What evaluations found for each client is in `clients`.
        """
        import pandas as pd

        rows = [{name: x for name, x in record.items() if not isinstance(x, dict | list)} for record in self._records()]
        return pd.DataFrame(rows).set_index("round") if rows else pd.DataFrame()

    def clients(self) -> pd.DataFrame:
        """Returns what evaluations found for each client: `round`, `client`, and the numbers of its held-out text."""
        import pandas as pd

        return pd.DataFrame(
            [
                {"round": record["round"], "client": name} | scores
                for record in self._records()
                for name, scores in (record.get("eval_clients") or {}).items()
            ]
        )

    def evaluate(self, round: int | None = None) -> dict[str, Any]:
        """Scores a checkpoint on held-out text anew, on the devices that are here.

        Args:
          round: which checkpoint; None: the newest.

        Returns:
          The fields of an evaluation in metrics.jsonl: `eval_loss` (nats a masked token), `eval_accuracy`, both means, and
          `eval_clients`; {} if no client has held-out text.

        Raises:
          UserError: if there is no such checkpoint.
        """
        from fedbert_jax import experiment
        from fedbert_jax.finished import reopen
        from fedbert_jax.train import evaluated

        run, checkpoints, found = reopen(self.workdir, round)
        state, _ = experiment.restore(run, checkpoints, found)
        return evaluated(run, state)

    def perplexity(self, text: str = "", blocks: int = 8, *, round: int | None = None) -> dict[str, float]:
        """Returns the pseudo-perplexity of text: each token predicted from the rest of its block, one [MASK] at a time.

        Salazar et al., "Masked Language Model Scoring" (ACL 2020). A block of T tokens costs T forward passes.

        Args:
          text: as `data.source` names it, "text:FILE" or "docs:PACKAGE,..."; "" is each client's own held-out text.
          blocks: the most blocks scored: of the text, or of each client's, spread over it.
          round: which checkpoint; None: the newest.

        Returns:
          By client: of its own held-out text, or of the text by its own model; under "", of the text by one that all share.

        Raises:
          UserError: if there is no such checkpoint, or the text can't be read.
        """
        import numpy as np

        from fedbert_jax import experiment
        from fedbert_jax.data.encoded import usual_tokens
        from fedbert_jax.data.neutral import read_blocks
        from fedbert_jax.finished import reopen

        if blocks < 1:
            raise UserError(f"blocks={blocks}: accepted: at least 1.")
        run, checkpoints, found = reopen(self.workdir, round)
        state, _ = experiment.restore(run, checkpoints, found)
        usual, names = usual_tokens(run.tokenizer), run.dataset.client_names
        own = run.config.federated.arrangement.keeps_own
        if text:
            tokens = read_blocks(text, run.config.data, run.tokenizer, blocks, lambda _: None, "text")
            scores = run.simulation.pseudo_perplexity(state, tokens, usual[tokens])
            return {names[c] if own else "": value for c, value in scores.items()}
        held, scores = run.dataset.heldout, {}
        for c in range(held.num_clients):
            first, end = int(held.offsets[c]), int(held.offsets[c + 1])
            if end > first:
                rows = np.unique(np.linspace(first, end - 1, min(blocks, end - first)).astype(int))
                tokens = np.asarray(held.tokens[rows], np.int32)
                by_model = run.simulation.pseudo_perplexity(state, tokens, usual[tokens], (c if own else 0,))
                scores[c] = next(iter(by_model.values()))
        return {names[c]: value for c, value in scores.items()}

    def parameters(self, *, client: str = "", round: int | None = None) -> Pair:
        """Returns a checkpoint's model as pytrees of NumPy arrays, float32.

        Args:
          client: whose model, where each client has its own (`local`, a `private` body); "" is the first one's.
          round: which checkpoint; None: the newest.

        Returns:
          `.client`, the embedding and the MLM head, and `.server`, the layers [L, ...], as `models.bert.Segments` take them.

        Raises:
          UserError: if there is no such checkpoint or client.
        """
        import jax

        from fedbert_jax import experiment
        from fedbert_jax.federated.state import Pair
        from fedbert_jax.finished import reopen

        run, checkpoints, found = reopen(self.workdir, round)
        state, _ = experiment.restore(run, checkpoints, found)
        names = run.dataset.client_names
        if client and client not in names:
            raise UserError(f"client={client!r}: there is no client of that name in {self.workdir}.")
        return Pair(*jax.device_get(run.simulation.model_of(state, names.index(client) if client else 0)))

    def export(self, directory: str | os.PathLike[str], *, client: str = "", round: int | None = None) -> Path:
        """Writes a checkpoint's model as a Hugging Face directory, for `AutoModelForMaskedLM.from_pretrained`.

        Args:
          directory: a new or empty one, or an earlier export, which is replaced.
          client: whose model, where each client has its own.
          round: which checkpoint; None: the newest.

        Returns:
          The directory.

        Raises:
          UserError: if there is no such checkpoint or client, or the directory is anything else.
        """
        from fedbert_jax import experiment
        from fedbert_jax.export import check_place
        from fedbert_jax.finished import reopen
        from fedbert_jax.models import huggingface

        out = Path(directory)
        Workdir(self.workdir).read_config()  # says so if there is no run
        check_place(out, self.workdir)
        huggingface.check_target(out)
        run, checkpoints, found = reopen(self.workdir, round)
        state, facts = experiment.restore(run, checkpoints, found)
        experiment.export(run, state, out, facts, client)
        return out

    def report(self) -> Path:
        """Writes the page about the run, DIR/report/index.html, and returns its path; also for a run that still goes on."""
        from fedbert_jax.report.page import write_report

        return Path(write_report(self.workdir))

    def audit(self, *arguments: str) -> pd.DataFrame:
        """Attacks what crosses in a round, as `fedbert audit` does, and returns what each attack recovered.

        Args:
          arguments: of the command, such as "--knows=segment,public_text" or "--blocks=16"; none: all attacks that fit.

        Returns:
          A row an attack: `knows` (what the attacker knows beside the messages), `attack`, `of` (tokens, labels or words),
          `top1` (share recovered) with its 95% interval `low` and `high`, `floor_unigram` (what guessing gives), `auc`, ...

        Raises:
          UserError: for a run without checkpoints, or in which nothing crosses.
        """
        import pandas as pd

        from fedbert_jax.audit.command import audited, parse

        flags = parse([str(self.workdir), *arguments])
        return pd.DataFrame([row.to_dict() for row in audited(flags, make_console(quiet=True)).rows])

    def _records(self) -> list[Record]:
        path = Workdir(self.workdir).metrics
        return read_metrics(path) if path.is_file() else []


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
