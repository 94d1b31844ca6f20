"""The sections of the schema that say what a run tells of itself, and when: evaluations, metrics, checkpoints, exports."""

from __future__ import annotations

from dataclasses import dataclass

SINKS = ("tensorboard", "wandb")  # that `metrics.sinks` may name


@dataclass(frozen=True)
class CheckpointConfig:
    """How often the whole state is saved, and how many of the newest saves stay."""

    every_rounds: int = 50  # rounds between two saves; there is one at the end, too
    times: int | None = None  # saves in the whole run; takes the place of every_rounds
    keep: int = 3  # how many of the newest saves stay


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on held-out text."""

    every_rounds: int = 20  # rounds between two evaluations; there is one at the start and one at the end, too
    times: int | None = None  # evaluations in the whole run; takes the place of every_rounds
    batch_size: int = 32  # blocks evaluated at a time
    max_clients: int = 64  # the most clients evaluated (drawn once, by seed), so that cost does not grow with num_clients
    max_blocks: int = 64  # the most held-out blocks evaluated per client
    # Text beside the clients', as in data.source (text:FILE), whose pseudo-perplexity is measured, too: every token of it
    # predicted from the rest of its block. Where clients have models of their own, by each model that is evaluated.
    extra: str = ""
    extra_blocks: int = 8  # the most blocks of that text, spread over it; a block of T tokens costs T forward passes
    # Ends the run after so many evaluations in a row that were no better than the best: by the pseudo-perplexity of
    # eval.extra or, without that, by the held-out loss. None: it ends with its last round. Schedules stay as they are.
    patience: int | None = None


@dataclass(frozen=True)
class ExportConfig:
    """What an exported model says about itself beyond what the run knows; it claims nothing that isn't set."""

    license: str = ""  # of the model, as the hub names it: apache-2.0, mit, other, ...
    language: str = ""  # of the text, as codes with commas between: en,de
    datasets: str | None = None  # the text's hub names, with commas between; None: NAME of hf:NAME, if it is on the hub
    base_model: str | None = None  # a hub name; None: model.init_from, if it is one
    # config.json's hidden_dropout_prob, for further training of the model. None: the run's own, the starting checkpoint's
    # or BERT's 0.1, whichever comes first and is above 0.
    hidden_dropout: float | None = None
    attention_dropout: float | None = None  # the same for attention_probs_dropout_prob


@dataclass(frozen=True)
class MetricsConfig:
    """Where the numbers of metrics.jsonl go, too."""

    # tensorboard: event files in DIR/tensorboard; wandb: a run of Weights & Biases, whose own environment variables name the
    # project and the mode. With commas between; needs pip install 'fedbert_jax[tensorboard]' or '[wandb]'.
    sinks: str = ""
