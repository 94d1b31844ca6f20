"""What fine-tuning starts from: a tokenizer, a model's sizes, and a checkpoint's tensors or random weights."""

from __future__ import annotations

import dataclasses
from typing import Any

from fedbert_jax import experiment
from fedbert_jax.config import Config
from fedbert_jax.data.tokenizer import load_tokenizer, vocab_size
from fedbert_jax.errors import UserError, about
from fedbert_jax.glue.examples import task_of
from fedbert_jax.models import huggingface
from fedbert_jax.models.bert import Params


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's tensors, from which a fresh model is filled."""

    tensors: huggingface.Tensors
    classifier: str = ""  # a sentence on what became of its own classifier; "" if it has none

    def __call__(self, client: Params, server: Params) -> tuple[Params, Params, list[str]]:
        """Fills parameters; also returns the names of those that the checkpoint lacks."""
        return huggingface.from_tensors(self.tensors, client, server, huggingface.CLASSIFIER_CLIENT)


def tokenizer_of(config: Config) -> Any:
    """Loads the tokenizer: the one named, or the starting checkpoint's."""
    key = "config key data.tokenizer" if config.data.tokenizer else "config key model.init_from"
    with about(key):
        try:
            return load_tokenizer(config.data.tokenizer or str(huggingface.local(config.model.init_from)))
        except UserError as error:
            raise type(error)(str(error).replace("data.tokenizer=", f"{key}=")) from error


def resolve(config: Config, tokenizer: Any) -> tuple[Config, Checkpoint | None]:
    """Fills in the model's sizes, and reads the checkpoint to start from; None is a random start.

    A classifier that the checkpoint has is kept if its labels are the task's, with its outputs in the task's order.

    Raises:
      UserError: for an unknown task, or a checkpoint that can't be started from.
    """
    task, config = task_of(config), experiment.resolve(config, vocab_size(tokenizer))
    if not config.model.init_from:
        return config, None
    with about("config key model.init_from"):
        tensors, hf = huggingface.load_tensors(huggingface.local(config.model.init_from))
        tensors, said = huggingface.fit_classifier(tensors, hf, task.name, task.labels)
        huggingface.check_finite(tensors, huggingface.CLASSIFIER_CLIENT)
    return config, Checkpoint(tensors, said)
