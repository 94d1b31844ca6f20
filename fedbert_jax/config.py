"""Configuration: frozen dataclasses, read from a ConfigDict and validated once, at the edge.

Every key a user can set is a field here, with its default; nothing else in the package invents one. Code past this module
receives a `Config` and trusts it.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import ml_collections
from ml_collections import config_dict

from fedbert_jax.errors import ConfigError

StrategyName = Literal["parallel", "sequential", "centralized", "local", "fedavg"]
# How the clients of a round train: side by side, one after another, or as one client who holds all text.
Arrangement = Literal["abreast", "turns", "pooled"]
ARRANGEMENTS: dict[StrategyName, Arrangement] = {
    "parallel": "abreast", "sequential": "turns", "centralized": "pooled", "local": "abreast", "fedavg": "abreast",
}  # fmt: skip

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

    preset: Literal["tiny", "mini", "small", "medium", "base", "large"] = "tiny"
    init_from: str = ""  # a Hugging Face directory or hub name to start from, with data.tokenizer=""; "" is from scratch
    vocab_size: int | None = None  # the tokenizer's, unless set (larger is allowed: padding of the table)
    hidden_size: int | None = None
    num_layers: int | None = None
    num_heads: int | None = None
    intermediate_size: int | None = None  # 4 * hidden_size
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0  # non-zero leaves the fused attention for an explicit one
    # cudnn: flash attention on NVIDIA GPUs, in bfloat16; auto takes it where it compiles, if clients have no own bodies.
    attention: Literal["auto", "xla", "cudnn"] = "auto"
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    unroll_layers: bool = True  # False scans over the layers: smaller programs, quicker compiles, slower steps on CPU
    remat: Literal["none", "dots", "full"] = "none"  # what the body's backward pass computes again
    logits_at_once: int | None = None  # at how many of a client's masked positions logits exist at a time; None: at all


@dataclass(frozen=True)
class PartitionConfig:
    """Which client holds which document."""

    kind: Literal["natural", "iid", "dirichlet"] = "natural"
    alpha: float = 0.5  # dirichlet: small is skewed, large is near iid


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes token blocks."""

    source: str = "docs:"  # docs:[PACKAGE,...] | text:GLOB | hf:NAME[/CONFIG]
    tokenizer: str = "train:4096"  # a Hugging Face directory or hub name, or train:SIZE
    lowercase: bool = True  # of a tokenizer trained here
    seq_len: int = 128
    eval_fraction: float = 0.05  # of each client's documents, held out
    documents: Literal["blank_lines", "file"] = "blank_lines"  # text: what separates documents
    document_start: str = ""  # a regular expression; a line or row that matches begins a new document
    text_field: str = "text"  # JSON, CSV, parquet and hf: the field or column of text
    client_field: str = ""  # JSON, CSV, parquet and hf: the field or column that names the client
    client_pattern: str = ""  # text: a regular expression on the file name; its first group names the client
    missing_client: Literal["error", "drop"] = "error"  # a row, or file, in which client_field or client_pattern has no name
    split: str = "train"  # hf and save_to_disk: the split to read, or a part of it as in train[:10%]
    deduplicate: bool = True  # drop a paragraph seen anywhere before, so that held-out text is not in the training text
    small_clients: Literal["drop", "error"] = "drop"  # a client with less text than one training block
    store: Literal["auto", "device", "memmap"] = "auto"  # where token blocks lie during training
    cache_dir: str = ""  # "" is ~/.cache/fedbert_jax
    partition: PartitionConfig = field(default_factory=PartitionConfig)


@dataclass(frozen=True)
class FederatedConfig:
    """The strategy, and the shape of a round."""

    strategy: StrategyName = "parallel"
    body: Literal["pooled", "merged", "private"] = "pooled"  # parallel: what the server does with its part
    num_clients: int | None = None  # None: as many as the natural partition has
    clients_per_round: int | None = None  # None: all of them
    # parallel, fedavg: how many of the cohort are computed side by side; None is all. The result is the same. What is
    # saved: activations and logits, and but for a pooled body the clients' copies of what they train.
    clients_at_once: int | None = None
    local_steps: int = 8
    rounds: int = 140
    batch_size: int = 4  # sequences per client per step
    weighting: Literal["examples", "uniform"] = "examples"
    order: Literal["shuffled", "fixed"] = "shuffled"  # sequential: the order of turns
    # At the start of a round (of bodies, too, where clients have their own). In `sequential`, average means handed on.
    client_optimizer_state: Literal["average", "reset", "keep"] = "average"

    @property
    def arrangement(self) -> Arrangement:
        return ARRANGEMENTS[self.strategy]

    @property
    def shared_body(self) -> bool:
        """Whether there is one body, which all clients of a step train; else each trains a copy."""
        return self.strategy not in ("local", "fedavg") and self.body == "pooled"


@dataclass(frozen=True)
class OptimizerConfig:
    """An optax optimizer by name, its arguments (None leaves optax's default), and its schedule in global steps."""

    name: Literal["adamw", "adam", "sgd", "lamb", "lion", "adagrad", "nadamw", "yogi"] = "adamw"
    learning_rate: float = 2e-3  # the schedule's peak
    schedule: Literal["constant", "linear", "cosine", "polynomial"] = "linear"
    warmup_steps: int = 100
    decay_steps: int | None = None  # the step at which the schedule ends; None is the end of the run
    end_learning_rate: float = 0.0
    power: float = 1.0  # polynomial
    clip_norm: float | None = 1.0  # per segment: in a real federation nobody sees the other's gradient
    b1: float | None = None
    b2: float | None = None
    eps: float | None = None
    weight_decay: float | None = None  # never of biases or LayerNorm
    momentum: float | None = None
    nesterov: bool | None = None


@dataclass(frozen=True)
class AggregatorConfig:
    """The outer update on the averaged client change: sgd 1.0 is FedAvg, with momentum FedAvgM, adam FedAdam."""

    name: Literal["sgd", "adam", "adamw", "adagrad", "yogi"] = "sgd"
    learning_rate: float = 1.0
    b1: float | None = None
    b2: float | None = None
    eps: float | None = None
    weight_decay: float | None = None
    momentum: float | None = None
    nesterov: bool | None = None


@dataclass(frozen=True)
class MlmConfig:
    """Masked language modelling: ceil(mask_prob * seq_len) positions a block, replaced 80/10/10."""

    mask_prob: float = 0.15
    whole_word: bool = False


@dataclass(frozen=True)
class WireConfig:
    """What crosses between client and server."""

    codec: Literal["float32", "bfloat16"] = "float32"
    downlink: Literal["masked", "all"] = "masked"


@dataclass(frozen=True)
class PrecisionConfig:
    """Types of parameters and of the arithmetic; LayerNorm, softmax and loss are float32 always."""

    param_dtype: Literal["float32"] = "float32"
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on accelerators, float32 on CPU


@dataclass(frozen=True)
class MeshConfig:
    """Devices: clients and batch lie on `data`, the body's and the tables' wide dimensions on `model`."""

    data: int = -1  # -1 takes what is left
    model: int = 1


@dataclass(frozen=True)
class CheckpointConfig:
    """How often the whole state is saved, and how many of the newest saves stay."""

    every_rounds: int = 50
    keep: int = 3


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on held-out text."""

    every_rounds: int = 20
    batch_size: int = 32
    max_clients: int = 64  # evaluated clients (drawn once, by seed), so that cost does not grow with num_clients
    max_blocks: int = 64  # held-out blocks a client


@dataclass(frozen=True)
class FinetuneConfig:
    """task=finetune: how long, and how often again. What is reported is the last epoch's, never the best one's."""

    epochs: float = 3.0
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

    task: Literal["pretrain", "finetune"] = "pretrain"
    seed: int = 0
    resume: Literal["auto", "force"] = "auto"  # force: accept harmless changes to an old workdir's config
    profile: str = ""  # START:STOP writes a trace of these rounds to the workdir's profile/
    fill_mask: tuple[str, ...] = ()  # sentences with [MASK], filled in when training ends
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    federated: FederatedConfig = field(default_factory=FederatedConfig)
    client_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    server_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    aggregator: AggregatorConfig = field(default_factory=AggregatorConfig)
    mlm: MlmConfig = field(default_factory=MlmConfig)
    wire: WireConfig = field(default_factory=WireConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)


# A change to one of these leaves finished rounds as they were, so `resume=force` accepts it on an old workdir.
HARMLESS = frozenset({
    "resume", "fill_mask", "federated.rounds", "federated.clients_at_once", "checkpoint.every_rounds", "checkpoint.keep",
    "eval.every_rounds", "mesh.data", "mesh.model", "data.store", "data.cache_dir", "model.remat", "model.unroll_layers",
    "model.attention", "model.logits_at_once",
})  # fmt: skip

# Settings that fine-tuning doesn't have: refused, rather than passed over. By what it has or does instead.
UNUSED_IN_FINETUNING = {
    "goes by finetune.epochs and finetune.warmup, and judges and saves once an epoch": (
        "federated.rounds", "client_optimizer.warmup_steps", "client_optimizer.decay_steps", "server_optimizer.warmup_steps",
        "server_optimizer.decay_steps", "checkpoint.every_rounds", "checkpoint.keep", "eval.every_rounds", "fill_mask",
    ),
    "reads labelled examples, and masks nothing": (
        "mlm.mask_prob", "mlm.whole_word", "model.logits_at_once", "data.lowercase", "data.eval_fraction", "data.documents",
        "data.document_start", "data.text_field", "data.client_field", "data.client_pattern", "data.missing_client",
        "data.split", "data.deduplicate", "data.small_clients", "data.store", "data.cache_dir", "eval.max_clients",
        "eval.max_blocks",
    ),
}  # fmt: skip
# A workdir of fine-tuning takes any change to these: finished seeds stay, and others are trained.
EXTENDABLE = frozenset({"finetune.seeds", "finetune.seeds_at_once", "finetune.predict"})


# --- ConfigDict and dict to dataclass --------------------------------------------------------------------------------


def default_config() -> ml_collections.ConfigDict:
    """Returns every key with its default, as a ConfigDict for a `configs/*.py` to change and return."""
    return _to_config_dict(Config)


def _to_config_dict(cls: type) -> ml_collections.ConfigDict:
    result = ml_collections.ConfigDict()
    hints = typing.get_type_hints(cls)
    defaults = cls()
    for f in dataclasses.fields(cls):
        kind, value = hints[f.name], getattr(defaults, f.name)
        if dataclasses.is_dataclass(kind):
            result[f.name] = _to_config_dict(typing.cast(type, kind))
        elif type(None) in typing.get_args(kind):
            inner = next(a for a in typing.get_args(kind) if a is not type(None))
            result[f.name] = value if value is not None else config_dict.placeholder(inner)
        else:
            result[f.name] = value
    return result


def from_dict(values: Mapping[str, Any] | ml_collections.ConfigDict) -> Config:
    """Builds and validates a `Config`.

    Args:
      values: nested mapping of keys to values; keys left out keep their defaults.

    Raises:
      ConfigError: for an unknown key, a value of the wrong type, or a combination that cannot run.
    """
    if isinstance(values, ml_collections.ConfigDict):
        values = values.to_dict()
    config = _build(Config, values, "")
    validate(config)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Returns the nested plain dict that `from_dict` takes back; JSON can hold it."""
    return dataclasses.asdict(config)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns `{"federated.rounds": 3, ...}` for a nested mapping."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, key + "."))
        else:
            flat[key] = list(value) if isinstance(value, tuple) else value
    return flat


def kind_of(key: str) -> str:
    """Returns in words what type of value a dotted key accepts; "" if words for it are lacking."""
    *sections, name = key.split(".")
    cls: Any = Config
    for section in sections:
        cls = typing.get_type_hints(cls)[section]
    kind = typing.get_type_hints(cls)[name]
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    words = {int: "an integer", float: "a number", bool: "true or false"}
    return next((words[k] for k in kinds if k in words), "")


def all_keys(cls: type = Config, prefix: str = "") -> list[str]:
    """Returns every key a config may set, dotted."""
    keys = []
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            keys += all_keys(typing.cast(type, kind), f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def unknown_key(key: str) -> ConfigError:
    """Returns the error for a key that does not exist, with the nearest that does."""
    near = difflib.get_close_matches(key, all_keys(), n=1, cutoff=0.5)
    group = key.rpartition(".")[0]
    siblings = [k for k in all_keys() if k.rpartition(".")[0] == group]
    if not group or not siblings:
        siblings = sorted({k.split(".")[0] for k in all_keys()})
    accepted = ", ".join(siblings)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return ConfigError(f"config key {key} does not exist{hint}; accepted: {accepted}.")


def _build(cls: type, values: Any, prefix: str) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"config key {prefix.rstrip('.')}={values!r} is a section; accepted: a mapping of its keys.")
    hints = typing.get_type_hints(cls)
    fields = {}
    for name, value in values.items():
        if name not in hints:
            raise unknown_key(prefix + str(name))
        kind = hints[name]
        if dataclasses.is_dataclass(kind):
            fields[name] = _build(typing.cast(type, kind), value, f"{prefix}{name}.")
        else:
            fields[name] = _convert(value, kind, prefix + name)
    return cls(**fields)


def _convert(value: Any, kind: Any, key: str) -> Any:
    args = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        if value not in args:
            raise ConfigError(f"config key {key}={value!r}: accepted: {', '.join(map(repr, args))}.")
        return value
    if typing.get_origin(kind) in (types.UnionType, typing.Union):  # T | None
        if value is None:
            return None
        kind = next(a for a in args if a is not type(None))
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (tuple, list)) or not all(isinstance(v, args[0]) for v in value):
            raise ConfigError(f"config key {key}={value!r}: accepted: a tuple of {args[0].__name__}.")
        return tuple(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"config key {key}={value!r} is {type(value).__name__}; accepted: {kind.__name__}.")
    return value


# --- combinations ----------------------------------------------------------------------------------------------------


def resolve_model(model: ModelConfig, vocab_size: int) -> ModelConfig:
    """Fills in the sizes that the preset gives and the tokenizer's vocabulary size."""
    sizes = dict(PRESETS[model.preset])
    for name in ("num_layers", "hidden_size", "num_heads"):
        sizes[name] = getattr(model, name) or sizes[name]
    sizes["intermediate_size"] = model.intermediate_size or 4 * sizes["hidden_size"]
    sizes["vocab_size"] = model.vocab_size or vocab_size
    return dataclasses.replace(model, **sizes)  # type: ignore[arg-type]


def validate(config: Config) -> None:
    """Raises `ConfigError` for the first value or combination that cannot run; reads no file."""
    m, d, f = config.model, config.data, config.federated

    def need(ok: bool, key: str, value: Any, accepted: str) -> None:
        if not ok:
            raise ConfigError(f"config key {key}={value!r}: accepted: {accepted}.")

    flat = flatten(to_dict(config))
    at_least_1 = (
        "federated.local_steps", "federated.rounds", "federated.batch_size", "federated.num_clients",
        "federated.clients_per_round", "federated.clients_at_once", "checkpoint.every_rounds", "checkpoint.keep",
        "eval.every_rounds", "eval.batch_size", "eval.max_clients", "eval.max_blocks", "model.hidden_size",
        "model.num_layers", "model.num_heads", "model.intermediate_size", "model.vocab_size", "model.type_vocab_size",
        "client_optimizer.decay_steps", "server_optimizer.decay_steps", "mesh.model", "model.logits_at_once",
    )  # fmt: skip
    for key in at_least_1:
        need(flat[key] is None or flat[key] >= 1, key, flat[key], "an integer of at least 1")
    span = re.fullmatch(r"(\d+):(\d+)", config.profile)
    need(
        config.profile == "" or (span is not None and 1 <= int(span[1]) <= int(span[2])), "profile", config.profile,
        "'' or 'START:STOP', rounds counted from 1, such as '3:5'",
    )  # fmt: skip
    need(config.profile == "" or config.task == "pretrain", "profile", config.profile, "'' with task='finetune'")
    most = 2**31 - 1 - config.finetune.seeds
    need(0 <= config.seed <= most, "seed", config.seed, f"an integer from 0 to {most}")
    need(config.mesh.data == -1 or config.mesh.data >= 1, "mesh.data", config.mesh.data, "-1 or at least 1")
    need(d.seq_len >= 8, "data.seq_len", d.seq_len, "at least 8")
    known = m.init_from == "" or m.vocab_size is not None  # a checkpoint's sizes are filled in later, and checked again
    need(
        not known or d.seq_len <= m.max_position_embeddings, "data.seq_len", d.seq_len,
        f"at most model.max_position_embeddings={m.max_position_embeddings}, the size of the position table",
    )  # fmt: skip
    need(0.0 < d.eval_fraction < 1.0, "data.eval_fraction", d.eval_fraction, "a number between 0 and 1")
    need(d.partition.alpha > 0, "data.partition.alpha", d.partition.alpha, "a number above 0")
    need(0.0 < config.mlm.mask_prob < 1.0, "mlm.mask_prob", config.mlm.mask_prob, "a number between 0 and 1")
    for key in ("model.hidden_dropout", "model.attention_dropout"):
        need(0.0 <= flat[key] < 1.0, key, flat[key], "a number from 0 to below 1")

    kind, _, rest = d.source.partition(":")
    tuning = config.task == "finetune"
    kinds = ("glue",) if tuning else ("docs", "text", "hf")
    shown = "'glue:TASK' or 'glue:TASK@DIR'" if tuning else "'docs:[PACKAGE,...]', 'text:GLOB' or 'hf:NAME[/CONFIG]'"
    need(
        kind in kinds and ":" in d.source, "data.source", d.source, f"{shown} with task={config.task!r}"
    )  # fmt: skip
    need(kind == "docs" or rest != "", "data.source", d.source, f"'{kind}:' followed by what to read")
    if d.tokenizer.startswith("train:"):
        size = d.tokenizer.removeprefix("train:")
        need(
            size.isdigit() and int(size) >= 64, "data.tokenizer", d.tokenizer,
            "a Hugging Face directory or hub name, or train:SIZE with a SIZE of at least 64",
        )  # fmt: skip
    need(
        d.tokenizer != "" or m.init_from != "", "data.tokenizer", d.tokenizer,
        "a Hugging Face directory or hub name, or train:SIZE",
    )  # fmt: skip

    need(
        m.init_from == "" or not d.tokenizer.startswith("train:"), "data.tokenizer", d.tokenizer,
        "'' with model.init_from (the checkpoint's own), or a Hugging Face directory or hub name",
    )  # fmt: skip

    sizes = resolve_model(m, vocab_size=1)
    need(
        sizes.hidden_size % sizes.num_heads == 0, "model.hidden_size", sizes.hidden_size,  # type: ignore[operator]
        f"a multiple of model.num_heads={sizes.num_heads}",
    )  # fmt: skip

    need(
        m.attention != "cudnn" or (f.shared_body and not m.attention_dropout and not tuning), "model.attention", m.attention,
        "'auto' or 'xla' with task='finetune', model.attention_dropout, or bodies of clients' own",
    )  # fmt: skip
    if tuning:
        _validate_finetune(config, need)
    need(
        d.partition.kind == "natural" or f.num_clients is not None, "federated.num_clients", f.num_clients,
        f"an integer, which data.partition.kind={d.partition.kind!r} needs",
    )  # fmt: skip
    if f.num_clients is not None and f.clients_per_round is not None:
        need(
            f.clients_per_round <= f.num_clients, "federated.clients_per_round", f.clients_per_round,
            f"at most federated.num_clients={f.num_clients}",
        )  # fmt: skip
    need(
        f.body == "pooled" or f.strategy == "parallel", "federated.body", f.body,
        f"'pooled' with federated.strategy={f.strategy!r} (merged and private belong to 'parallel')",
    )  # fmt: skip
    need(
        f.clients_at_once is None
        or (f.strategy in ("parallel", "fedavg") and f.body != "private" and f.client_optimizer_state != "keep"),
        "federated.clients_at_once", f.clients_at_once,
        "None, unless clients train side by side and end the round in an average: federated.strategy 'parallel' (body "
        "'pooled' or 'merged') or 'fedavg', and client_optimizer_state 'average' or 'reset'",
    )  # fmt: skip
    fixed = f.clients_per_round is None or f.clients_per_round == f.num_clients
    keeps_all = f.client_optimizer_state == "keep" or f.body == "private" or f.strategy == "local"
    need(
        fixed or not keeps_all, "federated.clients_per_round", f.clients_per_round,
        "all clients, since this strategy, body or client_optimizer_state='keep' has state of its own for each client",
    )  # fmt: skip
    need(
        f.client_optimizer_state != "keep" or f.strategy in ("parallel", "sequential"),
        "federated.client_optimizer_state", f.client_optimizer_state,
        f"'average' or 'reset' with federated.strategy={f.strategy!r}",
    )  # fmt: skip
    need(
        f.client_optimizer_state == "average" or f.strategy not in ("local", "centralized"),
        "federated.client_optimizer_state", f.client_optimizer_state,
        f"'average' with federated.strategy={f.strategy!r}, which averages nothing",
    )  # fmt: skip
    need(
        config.aggregator == AggregatorConfig() or f.strategy in ("parallel", "fedavg"), "aggregator",
        dataclasses.asdict(config.aggregator),
        f"its defaults with federated.strategy={f.strategy!r}, which averages nothing",
    )  # fmt: skip
    need(
        config.wire == WireConfig() or f.strategy in ("parallel", "sequential"), "wire", dataclasses.asdict(config.wire),
        f"its defaults with federated.strategy={f.strategy!r}, which has no cut",
    )  # fmt: skip
    need(
        f.weighting == "examples" or f.strategy in ("parallel", "fedavg"), "federated.weighting", f.weighting,
        f"'examples' with federated.strategy={f.strategy!r}, which averages nothing",
    )  # fmt: skip
    need(config.aggregator.learning_rate > 0, "aggregator.learning_rate", config.aggregator.learning_rate, "above 0")
    for section, opt in (("client_optimizer", config.client_optimizer), ("server_optimizer", config.server_optimizer)):
        need(opt.learning_rate >= 0, f"{section}.learning_rate", opt.learning_rate, "a number of at least 0")
        need(opt.warmup_steps >= 0, f"{section}.warmup_steps", opt.warmup_steps, "an integer of at least 0")
        need(
            opt.decay_steps is None or opt.decay_steps > opt.warmup_steps, f"{section}.decay_steps", opt.decay_steps,
            f"more than {section}.warmup_steps={opt.warmup_steps}",
        )  # fmt: skip
        need(opt.clip_norm is None or opt.clip_norm > 0, f"{section}.clip_norm", opt.clip_norm, "None or above 0")


def _validate_finetune(config: Config, need: Callable[[bool, str, Any, str], None]) -> None:
    f, t = config.federated, config.finetune
    need(f.strategy != "local" and f.body != "private", "federated.strategy", f.strategy,
         "'centralized', 'parallel' (pooled or merged), 'sequential' or 'fedavg' with task='finetune'")  # fmt: skip
    need(
        f.strategy == "centralized" or (config.data.partition.kind != "natural" and f.num_clients is not None),
        "federated.num_clients", f.num_clients,
        "an integer, with data.partition.kind 'iid' or 'dirichlet' (over the labels): GLUE has no clients of its own",
    )  # fmt: skip
    need(f.clients_per_round in (None, f.num_clients), "federated.clients_per_round", f.clients_per_round,
         "all clients with task='finetune'")  # fmt: skip
    need(not config.data.tokenizer.startswith("train:"), "data.tokenizer", config.data.tokenizer,
         "'' with model.init_from (the checkpoint's own), or a Hugging Face directory or hub name")  # fmt: skip
    need(f.client_optimizer_state != "keep", "federated.client_optimizer_state", f.client_optimizer_state,
         "'average' or 'reset' with task='finetune'")  # fmt: skip
    need(0 < t.epochs < float("inf"), "finetune.epochs", t.epochs, "a number above 0")
    need(t.seeds >= 1, "finetune.seeds", t.seeds, "an integer of at least 1")
    defaults, given = flatten(to_dict(Config())), flatten(to_dict(config))
    for instead, keys in UNUSED_IN_FINETUNING.items():
        for key in keys:
            need(given[key] == defaults[key], key, given[key],
                 f"its default, {defaults[key]!r}, with task='finetune', which {instead}")  # fmt: skip
    need(t.seeds_at_once >= 0, "finetune.seeds_at_once", t.seeds_at_once, "an integer of at least 0")
    for key, share in (("finetune.warmup", t.warmup), ("finetune.holdout", t.holdout)):
        need(0.0 <= share < 1.0, key, share, "a number from 0 to below 1")
