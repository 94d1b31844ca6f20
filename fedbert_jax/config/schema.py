"""Every key a user can set, with its default and what it does, as frozen dataclasses.

`config/telling.py` has four of the sections, and no other module adds a key. Code past the configuration receives a `Config`
and trusts it. The comment at a key, above it or behind it, and the docstring of a section are what
`python -m fedbert_jax.main --help` prints.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fedbert_jax.config.arrangement import ARRANGEMENTS, Arrangement, strategy_title
from fedbert_jax.config.telling import CheckpointConfig, EvalConfig, ExportConfig, MetricsConfig

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
    init_from: str = ""  # a Hugging Face directory or hub name to start from, with data.tokenizer=""; "" starts from scratch
    vocab_size: int | None = None  # the tokenizer's unless set; a larger one pads the table
    hidden_size: int | None = None  # the preset's unless set; a multiple of num_heads
    num_layers: int | None = None  # the preset's unless set
    num_heads: int | None = None  # the preset's unless set
    client_layers: int = 0  # how many of the first layers belong to the client: where the cut is
    intermediate_size: int | None = None  # size of the feed-forward layers; 4 * hidden_size unless set
    max_position_embeddings: int = 512  # the longest sequence that the model can ever take
    type_vocab_size: int = 2  # kinds of segments, such as sentence A and sentence B; pre-training uses the first
    hidden_dropout: float = 0.0  # dropout rate of the embeddings and of what each layer adds to them
    attention_dropout: float = 0.0  # dropout rate of the attention weights; above 0, attention is explicit, not fused
    # cudnn: flash attention on NVIDIA GPUs, in bfloat16; auto uses it if it compiles and no client has a body of its own.
    attention: Literal["auto", "xla", "cudnn"] = "auto"
    layer_norm_eps: float = 1e-12  # added to LayerNorm's variance
    initializer_range: float = 0.02  # standard deviation of the weights at the start
    unroll_layers: bool = True  # False scans over the layers: smaller programs, quicker compiles, slower steps
    # What the body's backward pass recomputes to save memory: nothing, all but matrix products, or everything.
    remat: Literal["none", "dots", "full"] = "none"
    logits_at_once: int | None = None  # how many of a client's masked positions have logits at a time; None: all of them


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

    # docs:[PACKAGE,...] | text:GLOB | hf:NAME[/CONFIG]; finetune, and serve and join to train a classifier: glue:TASK[@DIR]
    source: str = "docs:"
    tokenizer: str = "train:4096"  # a Hugging Face directory or hub name, or train:SIZE
    lowercase: bool = True  # for a tokenizer trained here: fold case, and drop accents that writers may leave out
    seq_len: int = 128  # tokens of a block, including [CLS] and [SEP]
    eval_fraction: float = 0.05  # share of each client's words that is held out, in whole documents
    documents: Literal["blank_lines", "file"] = "blank_lines"  # text: a document ends at a blank line, or with its file
    document_start: str = ""  # a regular expression; a line or row that matches begins a new document
    text_field: str = "text"  # JSON, CSV, parquet and hf: the field or column of text
    client_field: str = ""  # JSON, CSV, parquet and hf: the field or column that names the client
    client_pattern: str = ""  # text: a regular expression on the file name; its first group names the client
    missing_client: Literal["error", "drop"] = "error"  # a row or file in which client_field or client_pattern finds no name
    split: str = "train"  # hf and save_to_disk: the split to read, or a part of it as in train[:10%]
    # hf: rows are read as they arrive, and no copy of the dataset is kept, which may be larger than the disk. data.split
    # then counts rows from the beginning, as in train[:1000000], and only these are fetched.
    streaming: bool = False
    deduplicate: bool = True  # drop paragraphs, and runs of 32 tokens, seen before: no held-out text is trained on
    # Whether "before" means in any client's text, or in the same client's: organisations see no more than their own.
    deduplicate_across: bool = True
    small_clients: Literal["drop", "error"] = "drop"  # a client with less than one training block of known text
    store: Literal["auto", "device", "memmap"] = "auto"  # where token blocks are kept during training
    cache_dir: str = ""  # "" is ~/.cache/fedbert_jax
    # A directory that `python -m fedbert_jax.prepare` has made of the same text: its blocks are linked, or copied, and no
    # text is read. "": the run prepares its own.
    prepared: str = ""
    partition: PartitionConfig = field(default_factory=PartitionConfig)


@dataclass(frozen=True)
class FederatedConfig:
    """The strategy, and the shape of a round."""

    # parallel: all clients of a round train with one server; sequential: they take turns; centralized: all text is pooled;
    # local: each client trains alone; fedavg: whole models are averaged.
    strategy: str = "parallel"
    # parallel, the server's layers: pooled is one body for all clients, trained at every step; merged a copy a client,
    # averaged with the round; private a copy a client, never averaged.
    body: Literal["pooled", "merged", "private"] = "pooled"
    # What parallel with a pooled body averages. parameters: the clients' segments, at the end of a round, as published;
    # gradients: those of one shared segment, at every step, which is the same as training on all clients' batches as one.
    average: Literal["parameters", "gradients"] = "parameters"
    # average=gradients: client gives each client of a round batch_size rows a step; size draws as many rows in all, from
    # each client in proportion to its text, whatever federated.weighting is; that then weights scores only.
    batch_by: Literal["client", "size"] = "client"
    num_clients: int | None = None  # None: as many as the natural partition has
    clients_per_round: int | None = None  # None: all of them
    # parallel, fedavg: how many clients of the cohort are computed side by side; None: all of them. The result is the same.
    # Fewer save the memory of activations and logits and, unless the body is pooled, of the copies that clients train.
    clients_at_once: int | None = None
    # The most clients in a round if clients_per_round is None; no limit if each client has state of its own.
    max_clients_per_round: int | None = None
    local_steps: int = 8  # optimizer steps of each client in a round, before the average
    rounds: int = 140  # how long the run is; worked out from the text if epochs is set
    # How often, on average, each block of training text is seen; takes the place of rounds. None: rounds decides.
    epochs: float | None = None
    schedule_rounds: int | None = None  # how many rounds the learning rates' schedules span; None: all after schedule_from
    schedule_from: int = 0  # the round after which the schedules begin, with their warm-up: to anneal a finished run again
    batch_size: int = 4  # sequences per client per step
    weighting: Literal["examples", "uniform"] = "examples"  # of clients in means: by their training text, or equally
    order: Literal["shuffled", "fixed"] = "shuffled"  # sequential: the order of turns
    # What becomes of the state at the start of a round (and of the bodies' states, if bodies are copies). In `sequential`,
    # average means handed on.
    client_optimizer_state: Literal["average", "reset", "keep"] = "average"

    @property
    def arrangement(self) -> Arrangement:
        return ARRANGEMENTS[self.strategy, self.body, self.average]

    @property
    def title(self) -> str:
        return strategy_title(self.strategy, self.body, self.average)

    def steps_per_round(self, cohort: int) -> int:
        """Returns the global steps of a round with a cohort of this size: how far the schedules move in it."""
        return self.local_steps * (cohort if self.arrangement.clients == "in turn" else 1)

    @property
    def own_state(self) -> bool:
        """Whether clients train at once with state of their own from earlier rounds, so that all take part in each round."""
        in_turn = self.arrangement.clients == "in turn"  # each finds its own when its turn comes
        return not in_turn and (self.client_optimizer_state == "keep" or self.arrangement.keeps_own)


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
    clip_norm: float | None = 1.0  # of each segment's gradient: in a real federation nobody sees the other's gradient
    b1: float | None = None  # Adam family: decay of the mean of gradients
    b2: float | None = None  # Adam family: decay of the mean of their squares
    eps: float | None = None  # Adam family: keeps a denominator from being zero
    weight_decay: float | None = None  # never applied to biases or LayerNorm
    momentum: float | None = None  # sgd
    nesterov: bool | None = None  # sgd, adam and adamw: Nesterov's momentum


@dataclass(frozen=True)
class AggregatorConfig:
    """The outer update on the averaged client change: sgd 1.0 is FedAvg, with momentum FedAvgM, adam FedAdam."""

    name: Literal["sgd", "adam", "adamw", "adagrad", "yogi"] = "sgd"  # optax's
    learning_rate: float = 1.0  # 1 with sgd takes the average as it is
    b1: float | None = None  # Adam family: decay of the mean of changes
    b2: float | None = None  # Adam family: decay of the mean of their squares
    eps: float | None = None  # Adam family: keeps a denominator from being zero
    weight_decay: float | None = None  # adamw
    momentum: float | None = None  # sgd
    nesterov: bool | None = None  # sgd, adam and adamw: Nesterov's momentum


@dataclass(frozen=True)
class MlmConfig:
    """Masked language modelling: ceil(mask_prob * seq_len) positions per block, replaced 80/10/10."""

    mask_prob: float = 0.15  # share of a block's positions that are predicted
    whole_word: bool = False  # choose words, and mask all tokens of each (WordPiece tokenizers)


@dataclass(frozen=True)
class WireConfig:
    """What crosses between client and server."""

    # How activations and their gradients are sent. float32: as they were computed, which is bfloat16 if
    # precision.compute_dtype is; bfloat16; int8: whole numbers, with a float32 scale for each row.
    codec: str = "float32"
    downlink: Literal["masked", "all"] = "masked"  # which positions' hidden states come back to the client
    clip: float | None = None  # clips each row of a client's activations to this norm before it leaves; None: no clipping
    # Standard deviation of the noise that the client adds to each number of its activations. Whoever knows
    # privacy.client_seed, or seed if that is None, can compute the noise and subtract it again.
    noise: float = 0.0
    gradient_clip: float | None = None  # as clip, for the gradient of the hidden states, which the client sends back
    gradient_noise: float = 0.0  # as noise, for the gradient of the hidden states, which the client sends back
    # average=gradients: how the clients' segment gradients are sent. With float32 and bfloat16, the mean comes back in the
    # same type; with int8 (a scale for each row, and what a step loses is added to the next), it comes back in bfloat16.
    gradient_codec: Literal["float32", "bfloat16", "int8"] = "float32"
    # serve, join: parts of a client's batch that travel one after another, so that one is computed while another crosses; a
    # divisor of federated.batch_size; 1 with dropout or wire.noise. The result is the same, to rounding.
    microbatches: int = 1


@dataclass(frozen=True)
class PrivacyConfig:
    """What the server can't work out by itself. docs/architecture.md says what it sees nevertheless."""

    # The clients' secret, which decides their segment's initial values, masks, dropout, noise and the order of their text;
    # the server's seed doesn't reveal it. Draw it at random: who can guess it is told by the masked positions that it is
    # right. None: it follows from `seed`.
    client_seed: int | None = None
    # blinded: what clients send is averaged as whole numbers, with task=serve and join under pads that they can take off the
    # sum and the server can't, which so holds no segment, no average and no gradient of one. Optimizer states don't travel.
    averaging: Literal["plain", "blinded"] = "plain"
    # client: client-level differential privacy of averages. A client's move in a round is clipped, and noise is added to the
    # average. It says nothing of what crosses the cut, and needs 100 clients and pip install 'fedbert_jax[privacy]'.
    dp: Literal["none", "client"] = "none"
    dp_clip: float = 1.0  # dp=client: the Euclidean norm to which a client's move, of all averaged arrays, is clipped
    # dp=client: the noise on the sum of clipped moves has the standard deviation dp_noise * dp_clip. It follows from `seed`:
    # whoever knows that, or finds it by trying, can subtract it. Never give away models of two runs with one seed.
    dp_noise: float = 1.0
    dp_delta: float = 1e-5  # dp=client: the delta for which epsilon is computed; far below 1 / the number of clients


@dataclass(frozen=True)
class PrecisionConfig:
    """Types of parameters and of the arithmetic; LayerNorm, softmax and loss are always float32."""

    param_dtype: Literal["float32"] = "float32"  # of the parameters and the optimizers' moments
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on accelerators, float32 on CPU


@dataclass(frozen=True)
class MeshConfig:
    """Devices: clients and batch lie on `data`, the wide dimensions of the body and the tables on `model`."""

    data: int = -1  # devices along this axis; -1 takes all that are left
    model: int = 1  # devices along this axis


@dataclass(frozen=True)
class FinetuneConfig:
    """task=finetune: how long, and with how many seeds. The scores reported are the last epoch's, never the best one's."""

    epochs: float = 3.0  # how often each training example is seen
    seeds: int = 1  # runs of the task, with seeds seed, seed + 1, ... for order, dropout, and what the checkpoint lacks
    seeds_at_once: int = 0  # how many are trained in one program; 0 is all of them on accelerators and one on CPU
    warmup: float = 0.1  # share of the steps in which the rates rise; takes the place of *_optimizer.warmup_steps
    # Share of the training examples to evaluate on instead of the dev set, for choosing settings, or if a client has none.
    holdout: float = 0.0
    predict: bool = False  # write predictions for the test files in the form that GLUE's site takes


@dataclass(frozen=True)
class NetworkConfig:
    """task=serve, task=join: a federation over a network. docs/federation.md says how to set one up."""

    host: str = "127.0.0.1"  # serve: the address to listen at; join: the server's
    port: int = 8476  # the server's; serve takes any that is free for 0
    name: str = ""  # join: the client's, as in the roster; "" is the workdir's name
    credentials: str = ""  # a folder of `python -m fedbert_jax.provision`; needed for any host but this machine
    quorum: int | None = None  # clients without whom no round begins or goes on; None: all of the round's who have not left
    # Seconds that a step waits for the last client of a round; then it goes on without, if a quorum is left.
    deadline: float = 300.0
    join_grace: float = 60.0  # seconds that the beginning of a round waits for clients who are not there
    patience: float = 600.0  # join: seconds for which a server that can't be reached is called again
    metrics_port: int = 0  # serve: a port of this machine at which Prometheus finds the numbers; 0: none
    release_body: bool = True  # serve: whether clients get the body when training is over, and so a model of their own
    leave: bool = False  # join: say that this client leaves for good, and end


@dataclass(frozen=True)
class AuditConfig:
    """task=serve: what a server keeps, so that `python -m fedbert_jax.audit` can attack what has crossed."""

    # serve: keep the messages of some rounds, as they came, in the workdir's recorded/: of the first round, of the one after
    # each checkpoint, and of the last one; as many of the newest as checkpoint.keep.
    record: bool = False


@dataclass(frozen=True)
class Config:
    """All settings of one run."""

    # Masked language modelling, all clients simulated here; a GLUE task; or one party of a federation over a network.
    task: Literal["pretrain", "finetune", "serve", "join"] = "pretrain"
    seed: int = 0  # of everything drawn: held-out text, initial weights, batches, masks, dropout
    resume: Literal["auto", "force"] = "auto"  # force: accept harmless changes to an old workdir's config
    profile: str = ""  # START:STOP writes a trace of these rounds to the workdir's profile/
    # A sentence with [MASK], whatever the tokenizer calls that, or several as ('...', '...'), filled in when training ends.
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
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)

    @property
    def labelled(self) -> bool:
        """Whether a classifier is trained on labelled examples, and not a language model on text."""
        return self.data.source.startswith("glue:")
