"""Fine-tuning as a federation's job: every client's labelled examples of one GLUE task, and a classifier for a head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from fedbert_jax.config import Config
from fedbert_jax.console.output import shown
from fedbert_jax.data.masking import MaskedBatch
from fedbert_jax.data.streams import seeds_of
from fedbert_jax.devices.tuning import compute_dtype
from fedbert_jax.errors import UserError, about
from fedbert_jax.federated import optim
from fedbert_jax.federated.evaluation import Exam
from fedbert_jax.federated.setting import Setting, make_setting
from fedbert_jax.federated.state import Rows
from fedbert_jax.glue import tallies
from fedbert_jax.glue.card import classifier_card
from fedbert_jax.glue.examples import TaskData, check_pairs, read_task, task_of
from fedbert_jax.glue.files import dev_splits
from fedbert_jax.glue.results import show
from fedbert_jax.glue.sequences import ExampleStream, eval_batches, padded_length, padded_lengths, take
from fedbert_jax.glue.start import resolve, tokenizer_of
from fedbert_jax.jobs.job import Shard, Verdict
from fedbert_jax.models import huggingface
from fedbert_jax.models.bert import ClientParams, ServerParams, make_segments
from fedbert_jax.runtime.frames import Schema, TensorSpec
from fedbert_jax.workdir.paths import Workdir, check_inputs, fingerprint

MOST_HELD_OUT = 10**6  # examples of a split: beyond it, a count is no number that a federation's frame may hold


class Classifying:
    """A classifier for the task that `data.source` names (`job.Job`).

    Args:
      config: validated, with task='serve' or 'join'.
    """

    def __init__(self, config: Config):
        self.tokenizer = tokenizer_of(config)
        self.config, self.start = resolve(config, self.tokenizer)
        self.task = task_of(config)
        self.agreed: Mapping[str, Any] = {"data.source": f"glue:{self.task.name}"}
        self.unit = ("examples", 1)
        self.lengths = padded_lengths(self.config.data.seq_len)
        self.splits = dev_splits(self.task)
        self.sums: tuple[int, ...] = (len(self.splits), tallies.size_of(self.task))
        self.data: TaskData | None = None

    def setting(self, clients: int, cohort: int) -> Setting:
        """Returns what the simulation's setting is, for the same clients and as many steps."""
        config, f = self.config, self.config.federated
        segments = make_segments(config.model, compute_dtype(config), self.task.num_outputs)
        span = optim.schedule_span(f, f.steps_per_round(cohort))
        return make_setting(config, segments, lambda _, batch: batch, clients, cohort, span)

    def batch(self) -> Rows:
        """Returns the shapes of a step's examples, padded to the longest."""
        size, label = self.config.federated.batch_size, np.float32 if self.task.regression else np.int32
        of = lambda dtype, *shape: jax.ShapeDtypeStruct((size, *shape), dtype)  # noqa: E731
        tokens, one = of(np.int32, self.lengths[-1]), of(np.int32, 1)
        return MaskedBatch(tokens, one, of(label, 1), of(np.float32, 1), tokens, of(np.int32))  # type: ignore[arg-type]

    def questions(self) -> Schema:
        """Returns what is expected of a batch of held-out examples."""
        size, wide = self.config.eval.batch_size, self.config.model.hidden_size
        assert wide is not None
        return {
            "activations": TensorSpec(compute_dtype(self.config).name, (size, self.lengths, wide)),
            "positions": TensorSpec("uint16", (size, 1)),
            "lengths": TensorSpec("uint16", (size,)),
        }

    def fill(self, client: ClientParams, server: ServerParams) -> tuple[ClientParams, ServerParams, list[str]]:
        """Fills a new model from the checkpoint that it starts from."""
        assert self.start is not None
        with about("config key model.init_from"):
            client, server, missing = self.start(client, server)
        said = self.start.classifier
        fresh = huggingface.describe_missing([name for name in missing if not said or name not in huggingface.CLASSIFIER])
        lacks = [f"the checkpoint lacks, so it starts fresh: {', '.join(fresh)}"] if fresh else []
        return client, server, lacks + ([said] if said else [])

    def read(self, index: int, name: str, workdir: Workdir, console: Console) -> None:
        """Reads this client's own examples, which must stay as they were."""
        self.data = data = read_task(self.config, self.tokenizer)
        check_pairs(self.config, data)
        for split, examples in data.dev.items():
            if len(examples) > MOST_HELD_OUT:
                many = f"{self.task.name}: {len(examples):,} examples in {split}"
                raise UserError(f"{many}; accepted over a network: up to {MOST_HELD_OUT:,}.")
        found = {"data.source": fingerprint(data.train, *data.dev.values())}
        check_inputs(workdir, found)
        if (facts := workdir.read_facts()).get("inputs") != found:  # whoever only reads a workdir leaves it as it is
            workdir.write_facts(facts | {"inputs": found})
        judges = ", ".join(f"{len(examples):,} of the split {split}" for split, examples in data.dev.items())
        console.print(f"{shown(name)}: {len(data.train):,} training examples of {self.task.name}, judged by {judges}")

    def shard(self, index: int) -> Shard:
        """Returns this client's examples in the order that the simulation draws for its place."""
        assert self.data is not None
        f, train, most = self.config.federated, self.data.train, self.config.data.seq_len
        stream = ExampleStream(seeds_of(self.config), index, train.lengths, f.local_steps, f.batch_size)
        length = lambda places: padded_length(int(train.lengths[places].max()), most)  # noqa: E731

        def rows(round: int) -> MaskedBatch:
            places = stream.round(round)
            return take(train, places, length(places))

        first: dict[int, np.ndarray] = {}  # a step of each length that comes up
        for round in range(f.rounds):
            places = stream.round(round)
            first.setdefault(length(places), places[0])
        return Shard(len(train), rows, [take(train, places, n) for n, places in first.items()], self._exam(self.data))

    def text(self) -> tuple[np.ndarray, ...]:
        """Returns this client's training examples."""
        assert self.data is not None
        return (self.data.train.tokens,)

    def _exam(self, data: TaskData) -> Exam:
        """Returns what the model is asked: all held-out examples; what is said of the answers is a tally of each split."""
        size, most, outputs = self.config.eval.batch_size, self.config.data.seq_len, self.task.num_outputs

        def questions() -> Iterator[tuple[MaskedBatch, Any]]:
            for n, held in enumerate(data.dev.values()):
                for places, batch in eval_batches(held, size, most):
                    real = np.arange(size) < len(places)  # the rest of the last batch repeats examples
                    yield batch, np.where(real, n, -1).astype(np.float32)[:, None]

        def marks(logits: jax.Array, batch: MaskedBatch, split: Any) -> jax.Array:
            return jnp.concatenate([logits[:, 0], batch.labels.astype(jnp.float32), split], axis=1)  # [B, outputs + 2]

        def total(marks: Sequence[np.ndarray]) -> np.ndarray:
            rows = np.concatenate([np.zeros((0, outputs + 2), np.float32), *marks])
            parts = [rows[rows[:, -1] == n] for n in range(len(self.splits))]
            return np.stack([tallies.tally(self.task, part[:, :outputs], part[:, outputs]) for part in parts])

        return Exam(questions, marks, total)

    def judge(self, sums: Mapping[str, np.ndarray], sizes: Mapping[str, int]) -> Verdict | None:
        """Returns the metrics of all clients' held-out examples together, and each client's."""
        found = self._scores(list(sums.values()))
        if not found:
            return None
        each = {client: scores for client, one in sums.items() if (scores := self._scores([one]))}
        fields, text = self._verdict(found)
        text += f"  (all held-out examples of {len(each)} of {len(sizes)} clients)"
        return Verdict(fields | {"eval_clients_scored": len(each), "eval_clients": each}, text)

    def judge_own(self, sums: np.ndarray) -> Verdict | None:
        """Returns the metrics of this client's held-out examples."""
        found = self._scores([sums])
        if self.data is not None and "holdout" in self.data.dev:  # which is no file of the task's
            found = dict(zip(["holdout"], found.values(), strict=False))
        return self._verdict(found) if found else None

    def _scores(self, sums: Sequence[np.ndarray]) -> dict[str, dict[str, float]]:
        """Returns loss and metrics by split; a split without examples is left out."""
        found = {split: tallies.metrics_of(self.task, [one[n] for one in sums]) for n, split in enumerate(self.splits)}
        return {split: scores for split, scores in found.items() if scores}

    def _verdict(self, found: dict[str, dict[str, float]]) -> Verdict:
        loss = float(np.mean([scores["loss"] for scores in found.values()]))
        official = {split: {k: v for k, v in scores.items() if k != "loss"} for split, scores in found.items()}
        return Verdict({"eval_loss": loss, "scores": official}, f"held-out loss {loss:.3f}  {show(official)}")

    def save(
        self, directory: Path, client: ClientParams, server: ServerParams, round: int, verdict: Verdict | None = None
    ) -> None:
        """Writes the model of a round as a directory that `AutoModelForSequenceClassification` loads."""
        scores = verdict.fields["scores"] if verdict is not None else {}
        card = classifier_card(self.config, self.task, scores)
        huggingface.save(
            directory,
            client,
            server,
            self.config.model,
            self.tokenizer,
            card,
            labels=self.task.labels or (huggingface.SCORE,),
            regression=self.task.regression,
            export=self.config.export,
        )
