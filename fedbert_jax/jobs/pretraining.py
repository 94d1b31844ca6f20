"""Masked language modelling as a federation's job: every client's text, in blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from fedbert_jax import disk, experiment
from fedbert_jax.config import Config
from fedbert_jax.console.output import print_table, shown
from fedbert_jax.console.progress import Stages
from fedbert_jax.data import sampling
from fedbert_jax.data.dataset import Dataset, prepare
from fedbert_jax.data.streams import seeds_of
from fedbert_jax.data.summary import client_table
from fedbert_jax.data.tokenizer import load_tokenizer, vocab_size
from fedbert_jax.devices.tuning import compute_dtype
from fedbert_jax.federated.evaluation import EvalSet, evaluation, masked_exam, plan_evaluation
from fedbert_jax.federated.setting import Setting
from fedbert_jax.federated.state import Rows
from fedbert_jax.jobs.job import Shard, Verdict
from fedbert_jax.models import huggingface
from fedbert_jax.models.bert import ClientParams, ServerParams
from fedbert_jax.runtime.frames import Schema
from fedbert_jax.runtime.script import questions
from fedbert_jax.workdir.paths import Workdir


class Pretraining:
    """Masked language modelling (`job.Job`).

    Args:
      config: validated, with task='serve' or 'join'.
    """

    agreed: Mapping[str, Any] = {}
    lengths: tuple[int, ...] = ()
    sums: tuple[int, ...] = (3,)  # summed loss, right answers, positions asked for

    def __init__(self, config: Config):
        if config.task == "serve":  # whose text is the clients', wherever it lies there
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, source="text:"))
        self.tokenizer = load_tokenizer(config.data.tokenizer or str(huggingface.local(config.model.init_from)))
        self.config = experiment.resolve(config, vocab_size(self.tokenizer))
        self.mask = experiment.mask_spec(self.config, self.tokenizer)
        self.unit = ("tokens", self.config.data.seq_len)
        self.dataset: Dataset | None = None

    def setting(self, clients: int, cohort: int) -> Setting:
        """Returns what the simulation's setting is, for the same clients."""
        return experiment.party_setting(self.config, self.mask, clients, cohort)

    def batch(self) -> Rows:
        """Returns the shape of a step's blocks."""
        return jax.ShapeDtypeStruct((self.config.federated.batch_size, self.config.data.seq_len), np.uint16)

    def questions(self) -> Schema:
        """Returns what is expected of a batch of held-out blocks."""
        e, m = self.config.eval, self.config.model
        assert m.hidden_size is not None
        batch = min(e.batch_size, e.max_blocks)
        return questions(
            batch, self.config.data.seq_len, self.mask.num_masked, m.hidden_size, compute_dtype(self.config).name
        )

    def fill(self, client: ClientParams, server: ServerParams) -> tuple[ClientParams, ServerParams, list[str]]:
        """Fills a new model from the checkpoint that it starts from."""
        tensors, _ = huggingface.load_tensors(huggingface.local(self.config.model.init_from))
        client, server, missing = huggingface.from_tensors(tensors, client, server)
        lacks = ", ".join(huggingface.describe_missing(missing))
        return client, server, [f"the checkpoint lacks, so it starts fresh: {lacks}"] if missing else []

    def read(self, index: int, name: str, workdir: Workdir, console: Console) -> None:
        """Prepares this client's own text, with the draws of its place in the roster."""
        warn = lambda text: console.print(f"warning: {shown(text)}", style="yellow")  # noqa: E731
        with Stages(console) as stages, disk.writing(workdir.data):
            self.dataset, _ = prepare(self.config, workdir.data, warn=warn, progress=stages, only=(index, name))
        print_table(console, client_table(self.dataset.summary))

    def shard(self, index: int) -> Shard:
        """Returns this client's blocks as the simulation draws them for its place."""
        assert self.dataset is not None
        f, seeds, own = self.config.federated, seeds_of(self.config), self.dataset.train.client(0)

        def rows(round: int) -> np.ndarray:
            count = f.local_steps * f.batch_size
            places = sampling.block_indices(seeds, index, len(own), round * count, count)
            return np.asarray(own[places]).reshape(f.local_steps, f.batch_size, -1)

        return Shard(len(own), rows, (), masked_exam(self._heldout(self.dataset, index), self.mask, seeds))

    def text(self) -> tuple[np.ndarray, ...]:
        """Returns this client's blocks, those held out, too."""
        assert self.dataset is not None
        return np.asarray(self.dataset.train.tokens), np.asarray(self.dataset.heldout.tokens)

    def _heldout(self, dataset: Dataset, index: int) -> EvalSet | None:
        """Returns this client's held-out blocks, in batches, as the simulation draws them for its place."""
        held, e = dataset.heldout, self.config.eval
        if not len(held.tokens):
            return None
        offsets = np.zeros(index + 2, np.int64)
        offsets[index + 1] = len(held.tokens)
        plan = plan_evaluation(offsets, np.array([index]), e.max_blocks, e.batch_size, seeds_of(self.config))
        tokens = np.asarray(held.tokens)[plan.rows]
        return EvalSet(tokens, plan.real, plan.blocks, plan.clients)  # type: ignore[arg-type]

    def judge(self, sums: Mapping[str, np.ndarray], sizes: Mapping[str, int]) -> Verdict | None:
        """Returns the clients' scores, and both their means."""
        names = list(sizes)
        owners = np.array([names.index(c) for c in sums])
        found = evaluation(np.array([*sums.values()], np.float64), owners, np.array([*sizes.values()]))
        if found is None:
            return None
        weighting = self.config.federated.weighting
        fields = found.fields("eval_loss", "eval_accuracy", weighting)
        each = {names[c]: score._asdict() for c, score in found.clients.items()}
        score = found.headline(weighting)
        text = f"held-out loss {score.loss:.3f}  accuracy {score.accuracy:.1%}  ({found.scope(weighting, len(names))})"
        return Verdict(fields | {"eval_clients_scored": len(each), "eval_clients": each}, text)

    def judge_own(self, sums: np.ndarray) -> Verdict | None:
        """Returns this client's own scores."""
        loss, right, count = map(float, sums)
        if not count:
            return None
        fields = {"eval_loss": loss / count, "eval_accuracy": right / count}
        return Verdict(fields, f"held-out loss {loss / count:.3f}  accuracy {right / count:.1%}")

    def save(
        self, directory: Path, client: ClientParams, server: ServerParams, round: int, verdict: Verdict | None = None
    ) -> None:
        """Writes the model of a round."""
        f = self.config.federated
        facts = {"round": round, "num_clients": f.num_clients, "clients_per_round": f.clients_per_round or f.num_clients}
        card = huggingface.model_card(self.config, facts)
        huggingface.save(directory, client, server, self.config.model, self.tokenizer, card, export=self.config.export)
