"""Every key a user can set, with its default and what it does: frozen dataclasses.

Nothing else in the package invents a key. Code past the configuration receives a `Config` and trusts it. The comment at a
key, above it or behind it, and the docstring of a section are what `python -m fedbert_jax.main --help` prints.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fedbert_jax.config.arrangement import ARRANGEMENTS, Arrangement, strategy_title

PRESETS: dict[str, dict[str, int]] = {
    # Turc et al. 2019 (the miniatures) and Devlin et al. 2019 (base, large).
    "tiny": dict(num_layers=2, hidden_size=128, num_heads=2),
    "mini": dict(num_layers=4, hidden_size=256, num_heads=4),
    "small": dict(num_layers=4, hidden_size=512, num_heads=8),
    "medium": dict(num_layers=8, hidden_size=512, num_heads=8),
    "base": dict(num_layers=12, hidden_size=768, num_heads=12),
    "large": dict(num_layers=24, hidden_size=1024, num_heads=16),
}


@dataclass(frozen=True)
class ModelConfig:
    """BERT's shape. A preset gives the sizes; any size set here overrides it."""

    # Layers x hidden size: tiny 2 x 128, mini 4 x 256, small 4 x 512, medium 8 x 512, base 12 x 768, large 24 x 1024.
    preset: Literal["tiny", "mini", "small", "medium", "base", "large"] = "tiny"
    init_from: str = ""  # a Hugging Face directory or hub name to start from, with data.tokenizer=""; "" is from scratch
    vocab_size: int | None = None  # the tokenizer's, unless set (larger is allowed: padding of the table)
    hidden_size: int | None = None  # the preset's, unless set; a multiple of num_heads
    num_layers: int | None = None  # the preset's, unless set
    num_heads: int | None = None  # the preset's, unless set
    client_layers: int = 0  # how many of the layers, the first ones, are the client's: where the cut is
    intermediate_size: int | None = None  # of the feed-forward layers: 4 * hidden_size, unless set
    max_position_embeddings: int = 512  # the longest sequence that the model can ever be given
    type_vocab_size: int = 2  # kinds of segments, as in sentence A and sentence B; pre-training uses the first
    hidden_dropout: float = 0.0  # of the embeddings and of what each layer adds to them
    attention_dropout: float = 0.0  # non-zero leaves the fused attention for an explicit one
    # cudnn: flash attention on NVIDIA GPUs, in bfloat16; auto takes it where it compiles, if clients have no own bodies.
    attention: Literal["auto", "xla", "cudnn"] = "auto"
    layer_norm_eps: float = 1e-12  # added to LayerNorm's variance
    initializer_range: float = 0.02  # standard deviation of the weights at the start
    unroll_layers: bool = True  # False scans over the layers: smaller programs, quicker compiles, slower steps on CPU
    # What the body's backward pass computes again to save memory: nothing, all but matrix products, or everything.
    remat: Literal["none", "dots", "full"] = "none"
    logits_at_once: int | None = None  # at how many of a client's masked positions logits exist at a time; None: at all


@dataclass(frozen=True)
class PartitionConfig:
    """Which client holds which document."""

    # natural: as the source says (folders, names, a column); iid: dealt at random, equally many documents to each;
    # dirichlet: each natural client's documents are divided in random shares.
    kind: Literal["natural", "iid", "dirichlet"] = "natural"
    alpha: float = 0.5  # dirichlet: small is skewed, large is near iid


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes token blocks."""

    source: str = "docs:"  # docs:[PACKAGE,...] | text:GLOB | hf:NAME[/CONFIG]
    tokenizer: str = "train:4096"  # a Hugging Face directory or hub name, or train:SIZE
    lowercase: bool = True  # of a tokenizer trained here: fold case, and drop accents that a reader may leave out
    seq_len: int = 128  # tokens of a block, [CLS] and [SEP] included
    eval_fraction: float = 0.05  # of each client's words, held out in whole documents
    documents: Literal["blank_lines", "file"] = "blank_lines"  # text: a document ends at a blank line, or with its file
    document_start: str = ""  # a regular expression; a line or row that matches begins a new document
    text_field: str = "text"  # JSON, CSV, parquet and hf: the field or column of text
    client_field: str = ""  # JSON, CSV, parquet and hf: the field or column that names the client
    client_pattern: str = ""  # text: a regular expression on the file name; its first group names the client
    missing_client: Literal["error", "drop"] = "error"  # a row, or file, in which client_field or client_pattern has no name
    split: str = "train"  # hf and save_to_disk: the split to read, or a part of it as in train[:10%]
    deduplicate: bool = True  # drop paragraphs, and 32 tokens in a row, seen before: what is held out isn't trained on
    small_clients: Literal["drop", "error"] = "drop"  # a client with less than one training block of text that is known
    store: Literal["auto", "device", "memmap"] = "auto"  # where token blocks lie during training
    cache_dir: str = ""  # "" is ~/.cache/fedbert_jax
    partition: PartitionConfig = field(default_factory=PartitionConfig)


@dataclass(frozen=True)
class FederatedConfig:
    """The strategy, and the shape of a round."""

    # parallel: all clients of a round against one server; sequential: they take turns; centralized: all text pooled;
    # local: each alone; fedavg: whole models, averaged.
    strategy: str = "parallel"
    # parallel, the server's layers: pooled is one body for all clients, trained at every step; merged a copy a client,
    # averaged with the round; private a copy a client for good.
    body: Literal["pooled", "merged", "private"] = "pooled"
    # parallel with a pooled body. parameters: the clients' segments, at the end of a round, as published; gradients: of one
    # segment, at every step, which is training on all clients' batches as one.
    average: Literal["parameters", "gradients"] = "parameters"
    # gradients: client gives each client of a round batch_size rows a step; size draws as many rows in all, from each client
    # in proportion to its text, whatever federated.weighting is, which then is of scores alone.
    batch_by: Literal["client", "size"] = "client"
    num_clients: int | None = None  # None: as many as the natural partition has
    clients_per_round: int | None = None  # None: all of them
    # parallel, fedavg: how many of the cohort are computed side by side; None is all. The result is the same. What is
    # saved: activations and logits, and but for a pooled body the clients' copies of what they train.
    clients_at_once: int | None = None
    # At most so many where clients_per_round is None and there are more; no limit where each has state of its own.
    max_clients_per_round: int | None = None
    local_steps: int = 8  # optimizer steps of each client in a round, before the average
    rounds: int = 140  # how long the run is; worked out from the text where epochs is set
    # How often, on average, each block of training text is seen; takes the place of rounds. None: rounds decides.
    epochs: float | None = None
    schedule_rounds: int | None = None  # for how many rounds the learning rates' schedules are made; None: all there are
    schedule_from: int = 0  # after which round the schedules begin, with their warm-up: to anneal a finished run again
    batch_size: int = 4  # sequences per client per step
    weighting: Literal["examples", "uniform"] = "examples"  # of clients in means: by their training text, or alike
    order: Literal["shuffled", "fixed"] = "shuffled"  # sequential: the order of turns
    # At the start of a round (of bodies, too, where these are copies). In `sequential`, average means handed on.
    client_optimizer_state: Literal["average", "reset", "keep"] = "average"

    @property
    def arrangement(self) -> Arrangement:
        return ARRANGEMENTS[self.strategy, self.body, self.average]

    @property
    def title(self) -> str:
        return strategy_title(self.strategy, self.body, self.average)

    def steps_per_round(self, cohort: int) -> int:
        """Returns the global steps of a round of so many clients: how far the schedules move in it."""
        return self.local_steps * (cohort if self.arrangement.clients == "in turn" else 1)

    @property
    def own_state(self) -> bool:
        """Whether each client keeps state of its own from round to round, so that all take part in each."""
        return self.client_optimizer_state == "keep" or self.arrangement.keeps_own


@dataclass(frozen=True)
class OptimizerConfig:
    """An optax optimizer by name, its arguments (None leaves optax's default), and its schedule in global steps."""

    name: Literal["adamw", "adam", "sgd", "lamb", "lion", "adagrad", "nadamw", "yogi"] = "adamw"  # optax's
    learning_rate: float = 2e-3  # the schedule's peak
    schedule: Literal["constant", "linear", "cosine", "polynomial"] = "linear"  # how the rate falls after the warm-up
    warmup_steps: int = 100  # steps in which the rate rises from 0 to its peak
    warmup: float | None = None  # the same as a share of the run's steps; takes the place of warmup_steps
    decay_steps: int | None = None  # the step at which the schedule ends; None is the end of the run
    end_learning_rate: float = 0.0  # what the rate falls to
    power: float = 1.0  # polynomial: 1 is a straight line
    clip_norm: float | None = 1.0  # per segment: in a real federation nobody sees the other's gradient
    b1: float | None = None  # Adam's kin: decay of the mean of gradients
    b2: float | None = None  # Adam's kin: decay of the mean of their squares
    eps: float | None = None  # Adam's kin: what keeps a division from being one by zero
    weight_decay: float | None = None  # never of biases or LayerNorm
    momentum: float | None = None  # sgd
    nesterov: bool | None = None  # sgd, adam and adamw: Nesterov's momentum


@dataclass(frozen=True)
class AggregatorConfig:
    """The outer update on the averaged client change: sgd 1.0 is FedAvg, with momentum FedAvgM, adam FedAdam."""

    name: Literal["sgd", "adam", "adamw", "adagrad", "yogi"] = "sgd"  # optax's
    learning_rate: float = 1.0  # 1 with sgd takes the average as it is
    b1: float | None = None  # Adam's kin: decay of the mean of changes
    b2: float | None = None  # Adam's kin: decay of the mean of their squares
    eps: float | None = None  # Adam's kin: what keeps a division from being one by zero
    weight_decay: float | None = None  # adamw
    momentum: float | None = None  # sgd
    nesterov: bool | None = None  # sgd, adam and adamw: Nesterov's momentum


@dataclass(frozen=True)
class MlmConfig:
    """Masked language modelling: ceil(mask_prob * seq_len) positions a block, replaced 80/10/10."""

    mask_prob: float = 0.15  # share of a block's positions that are predicted
    whole_word: bool = False  # choose words, and mask all tokens of each (WordPiece tokenizers)


@dataclass(frozen=True)
class WireConfig:
    """What crosses between client and server."""

    # What activations and their gradients are on their way. float32: as they were computed, in bfloat16 at most where
    # precision.compute_dtype is; bfloat16; int8: whole numbers, with a float32 scale for each row.
    codec: Literal["float32", "bfloat16", "int8"] = "float32"
    downlink: Literal["masked", "all"] = "masked"  # which positions' hidden states come back to the client
    clip: float | None = None  # to what norm each row of a client's activations is cut down before it leaves; None: not
    # Standard deviation of what the client adds to each number of its activations. Whoever knows privacy.client_seed, or
    # seed where that is None, can compute it and take it away again.
    noise: float = 0.0
    gradient_clip: float | None = None  # as clip, of the gradient by the hidden states that the client sends back
    gradient_noise: float = 0.0  # as noise, of the gradient by the hidden states that the client sends back
    # average=gradients: the clients' segment gradients on their way up; float32 and bfloat16 come back as they went, and
    # of int8 (a scale for each row, what a step loses being added to the next) the mean comes back in bfloat16.
    gradient_codec: Literal["float32", "bfloat16", "int8"] = "float32"


@dataclass(frozen=True)
class PrivacyConfig:
    """What the server can't work out for itself. docs/architecture.md says what it sees nevertheless."""

    # The clients' secret, from which their segment's first values, masks, dropout, noise and the order of their text follow;
    # the server's seed doesn't give it away. None: it follows from `seed`.
    client_seed: int | None = None
    # How copies are averaged, of the client segment and of bodies. fixed_point: as whole numbers modulo 2**32, which
    # one-time pads would hide and leave the sum as it is; it hides nothing, and optimizer states are averaged beside it.
    averaging: Literal["plain", "fixed_point"] = "plain"


@dataclass(frozen=True)
class PrecisionConfig:
    """Types of parameters and of the arithmetic; LayerNorm, softmax and loss are float32 always."""

    param_dtype: Literal["float32"] = "float32"  # of the parameters and the optimizers' moments
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on accelerators, float32 on CPU


@dataclass(frozen=True)
class MeshConfig:
    """Devices: clients and batch lie on `data`, the body's and the tables' wide dimensions on `model`."""

    data: int = -1  # devices along this axis; -1 takes what is left
    model: int = 1  # devices along this axis


@dataclass(frozen=True)
class CheckpointConfig:
    """How often the whole state is saved, and how many of the newest saves stay."""

    every_rounds: int = 50  # rounds between two saves; there is one at the end, too
    times: int | None = None  # saves in the whole run; takes the place of every_rounds
    keep: int = 3  # how many stay, the newest


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on held-out text."""

    every_rounds: int = 20  # rounds between two evaluations; there is one at the start and one at the end, too
    times: int | None = None  # evaluations in the whole run; takes the place of every_rounds
    batch_size: int = 32  # blocks that are evaluated at a time
    max_clients: int = 64  # evaluated clients (drawn once, by seed), so that cost does not grow with num_clients
    max_blocks: int = 64  # held-out blocks of a client that are evaluated


@dataclass(frozen=True)
class ExportConfig:
    """What an exported model says of itself beyond what the run knows; nothing is claimed that isn't set."""

    license: str = ""  # of the model, as the hub names it: apache-2.0, mit, other, ...
    language: str = ""  # of the text, codes with commas between: en,de
    datasets: str | None = None  # the text's hub names, with commas between; None: NAME of hf:NAME, if it is the hub's
    base_model: str | None = None  # a hub name; None: model.init_from, if it is one
    # config.json's hidden_dropout_prob, for whoever trains the model on. None: the first that is above 0 of the run's own,
    # the starting checkpoint's and BERT's 0.1.
    hidden_dropout: float | None = None
    attention_dropout: float | None = None  # the same for attention_probs_dropout_prob


@dataclass(frozen=True)
class FinetuneConfig:
    """task=finetune: how long, and how often again. What is reported is the last epoch's, never the best one's."""

    epochs: float = 3.0  # how often each training example is seen
    # Runs of the task, with seeds seed, seed + 1, ...: of the order, of dropout, and of what the checkpoint lacks, as a
    # rule the classifier.
    seeds: int = 1
    seeds_at_once: int = 0  # how many are trained in one program; 0 is all of them on accelerators and one on CPU
    warmup: float = 0.1  # share of the steps in which the rates rise; takes the place of *_optimizer.warmup_steps
    holdout: float = 0.0  # share of the training examples to judge by in place of the dev set: to choose settings by
    predict: bool = False  # write the test files' predictions as GLUE's site takes them


@dataclass(frozen=True)
class Config:
    """One run, entirely."""

    task: Literal["pretrain", "finetune"] = "pretrain"  # masked language modelling, or one of GLUE's tasks
    seed: int = 0  # of everything drawn: held-out text, initial weights, batches, masks, dropout
    resume: Literal["auto", "force"] = "auto"  # force: accept harmless changes to an old workdir's config
    profile: str = ""  # START:STOP writes a trace of these rounds to the workdir's profile/
    # A sentence with [MASK], or several as ('...', '...'), filled in when training ends. [MASK] stands for whatever the
    # tokenizer calls its mask token.
    fill_mask: tuple[str, ...] = ()
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    federated: FederatedConfig = field(default_factory=FederatedConfig)
    client_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    server_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    aggregator: AggregatorConfig = field(default_factory=AggregatorConfig)
    mlm: MlmConfig = field(default_factory=MlmConfig)
    wire: WireConfig = field(default_factory=WireConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)


HUB_NAME = r"\w[\w.-]*(/\w[\w.-]*)?"  # what a model or a dataset may be called on the hub
