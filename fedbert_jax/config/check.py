"""What cannot run: values and combinations of them that are refused before anything is read."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

from fedbert_jax.config.arrangement import ARRANGEMENTS, rows
from fedbert_jax.config.keys import flatten, listed, to_dict
from fedbert_jax.config.schema import HUB_NAME, PRESETS, AggregatorConfig, Config, ModelConfig, WireConfig
from fedbert_jax.errors import ConfigError

# Settings that fine-tuning doesn't have: refused, rather than passed over. By what it has or does instead.
UNUSED_IN_FINETUNING = {
    "goes by finetune.epochs and finetune.warmup, and judges and saves once an epoch": (
        "federated.rounds", "federated.epochs", "federated.schedule_rounds", "federated.schedule_from",
        "client_optimizer.warmup", "server_optimizer.warmup", "checkpoint.times",
        "eval.times", "client_optimizer.warmup_steps", "client_optimizer.decay_steps", "server_optimizer.warmup_steps",
        "server_optimizer.decay_steps", "checkpoint.every_rounds", "checkpoint.keep", "eval.every_rounds", "fill_mask",
    ),
    "reads labelled examples, and masks nothing": (
        "mlm.mask_prob", "mlm.whole_word", "model.logits_at_once", "data.lowercase", "data.eval_fraction", "data.documents",
        "data.document_start", "data.text_field", "data.client_field", "data.client_pattern", "data.missing_client",
        "data.split", "data.deduplicate", "data.small_clients", "data.store", "data.cache_dir", "eval.max_clients",
        "eval.max_blocks",
    ),
}  # fmt: skip

# What an exported model's card may say, and what is accepted for it.
CARD = {
    "export.license": (r"[a-z0-9][a-z0-9.-]*", "a license as the hub names it, such as apache-2.0, mit or other"),
    "export.language": (r"[a-z]{2,3}(-\w+)*|code|multilingual", "language codes with commas between, such as en,de"),
    "export.datasets": (HUB_NAME, "names of the hub's datasets with commas between, OWNER/NAME"),
    "export.base_model": (HUB_NAME, "a model's name on the hub, OWNER/NAME"),
}


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

    if (f.strategy, f.body, f.average) not in ARRANGEMENTS:
        raise ConfigError(
            f"config keys federated.strategy={f.strategy!r}, federated.body={f.body!r}, federated.average={f.average!r}: "
            f"accepted: {rows()}, or a name given to fedbert_jax.register in this process; body='pooled' and "
            "average='parameters' where nothing else is said."
        )
    how = f.arrangement
    flat = flatten(to_dict(config))
    for key, value in flat.items():
        need(not isinstance(value, float) or math.isfinite(value), key, value, "a finite number")
    at_least_1 = (
        "federated.local_steps", "federated.rounds", "federated.schedule_rounds", "federated.batch_size",
        "federated.num_clients", "federated.clients_per_round", "federated.clients_at_once",
        "checkpoint.every_rounds", "checkpoint.keep", "eval.every_rounds", "eval.batch_size", "eval.max_clients",
        "eval.max_blocks", "model.hidden_size",
        "model.num_layers", "model.num_heads", "model.intermediate_size", "model.vocab_size", "model.type_vocab_size",
        "client_optimizer.decay_steps", "server_optimizer.decay_steps", "mesh.model", "model.logits_at_once",
        "federated.max_clients_per_round", "checkpoint.times", "eval.times",
    )  # fmt: skip
    for key in at_least_1:
        need(flat[key] is None or flat[key] >= 1, key, flat[key], "an integer of at least 1")
    span = re.fullmatch(r"(\d+):(\d+)", config.profile)
    need(
        config.profile == "" or (span is not None and 1 <= int(span[1]) <= int(span[2])), "profile", config.profile,
        "'' or 'START:STOP', rounds counted from 1, such as '3:5'",
    )  # fmt: skip
    need(
        span is None or f.epochs is not None or int(span[1]) <= f.rounds, "profile", config.profile,
        f"rounds up to federated.rounds={f.rounds}",
    )  # fmt: skip
    need(config.profile == "" or config.task == "pretrain", "profile", config.profile, "'' with task='finetune'")
    need(1 <= config.finetune.seeds <= 2**20, "finetune.seeds", config.finetune.seeds, f"an integer from 1 to {2**20}")
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
    need(0 < d.partition.alpha <= 1e6, "data.partition.alpha", d.partition.alpha, "a number above 0, up to 1e6 (near iid)")
    need(0.0 < config.mlm.mask_prob < 1.0, "mlm.mask_prob", config.mlm.mask_prob, "a number between 0 and 1")
    need(0 < m.layer_norm_eps < 1, "model.layer_norm_eps", m.layer_norm_eps, "a number between 0 and 1")
    need(m.initializer_range > 0, "model.initializer_range", m.initializer_range, "a number above 0")
    for key in ("model.hidden_dropout", "model.attention_dropout", "export.hidden_dropout", "export.attention_dropout"):
        need(flat[key] is None or 0.0 <= flat[key] < 1.0, key, flat[key], "a number from 0 to below 1")
    for key in ("data.client_pattern", "data.document_start"):
        groups = _groups(flat[key])
        need(groups is not None, key, flat[key], "'' or a regular expression")
        need(flat[key] == "" or groups != 0 or key != "data.client_pattern", key, flat[key],
             "a regular expression with a (group), which is the client's name")  # fmt: skip
    for sentence in config.fill_mask:
        need("[MASK]" in sentence, "fill_mask", sentence, "sentences with [MASK], whatever the tokenizer calls its mask")
    for key, (pattern, accepted) in CARD.items():
        names = listed(flat[key]) if key in ("export.language", "export.datasets") else [flat[key]] if flat[key] else []
        need(all(re.fullmatch(pattern, name) for name in names), key, flat[key], accepted)

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
            size.isascii() and size.isdecimal() and 64 <= int(size) <= 2**24, "data.tokenizer", d.tokenizer,
            f"a Hugging Face directory or hub name, or train:SIZE with a SIZE from 64 to {2**24}",
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
        m.client_layers >= 0 and (not known or m.client_layers < sizes.num_layers), "model.client_layers", m.client_layers,  # type: ignore[operator]
        f"an integer from 0 to below model.num_layers={sizes.num_layers}",
    )  # fmt: skip
    need(
        m.attention != "cudnn" or (how.body == "one" and not m.attention_dropout and not tuning), "model.attention",
        m.attention, "'auto' or 'xla' with task='finetune', model.attention_dropout, or where each client has a body",
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
    named = f"with federated.strategy={f.strategy!r}" + f", federated.average={f.average!r}" * how.averages_gradients
    need(
        f.clients_at_once is None or (how.abreast and not f.own_state), "federated.clients_at_once", f.clients_at_once,
        "None, unless clients train side by side and none keeps a model or an optimizer state of its own",
    )  # fmt: skip
    fixed = f.clients_per_round is None or f.clients_per_round == f.num_clients
    need(
        fixed or not f.own_state, "federated.clients_per_round", f.clients_per_round,
        "all clients, since this strategy, body or client_optimizer_state='keep' has state of its own for each client",
    )  # fmt: skip
    need(
        f.client_optimizer_state == "average" or how.averages or how.clients == "in turn",
        "federated.client_optimizer_state", f.client_optimizer_state, f"'average' {named}, which averages no copies",
    )  # fmt: skip
    w = config.wire
    for section, made, ok, why in (("aggregator", AggregatorConfig, how.averages, "averages no copies"),
                                   ("wire", WireConfig, how.cut, "has no cut")):  # fmt: skip
        for key, default in dataclasses.asdict(made()).items():
            value = flat[f"{section}.{key}"]
            need(ok or value == default, f"{section}.{key}", value, f"its default, {default!r}, {named}, which {why}")
    for key in ("wire.clip", "wire.gradient_clip"):
        need(flat[key] is None or flat[key] > 0, key, flat[key], "None or above 0")
    for key in ("wire.noise", "wire.gradient_noise"):
        need(flat[key] >= 0, key, flat[key], "a number of at least 0")
    need(
        w.gradient_codec == "float32" or how.averages_gradients, "wire.gradient_codec", w.gradient_codec,
        "'float32', unless federated.average='gradients'",
    )  # fmt: skip
    need(
        config.privacy.averaging == "plain" or how.averages, "privacy.averaging", config.privacy.averaging,
        f"'plain' {named}, which averages no copies",
    )  # fmt: skip
    need(
        f.batch_by == "client"
        or (how.averages_gradients and f.clients_per_round in (None, f.num_clients) and f.max_clients_per_round is None
            and f.clients_at_once is None and w.gradient_codec == "float32" and not tuning),
        "federated.batch_by", f.batch_by,
        "'client', unless federated.average='gradients', federated.clients_per_round, max_clients_per_round and "
        "clients_at_once are None, and wire.gradient_codec='float32'",
    )  # fmt: skip
    need(f.epochs is None or f.epochs > 0, "federated.epochs", f.epochs, "a number above 0, or None where rounds decides")
    need(f.schedule_from >= 0, "federated.schedule_from", f.schedule_from, "an integer of at least 0")
    need(config.aggregator.learning_rate > 0, "aggregator.learning_rate", config.aggregator.learning_rate, "above 0")
    for section, opt in (("client_optimizer", config.client_optimizer), ("server_optimizer", config.server_optimizer)):
        need(opt.learning_rate >= 0, f"{section}.learning_rate", opt.learning_rate, "a number of at least 0")
        need(opt.warmup_steps >= 0, f"{section}.warmup_steps", opt.warmup_steps, "an integer of at least 0")
        share = opt.warmup
        need(share is None or 0 <= share < 1, f"{section}.warmup", share, "None, or a number from 0 to below 1")
        need(
            opt.decay_steps is None or share is not None or opt.decay_steps > opt.warmup_steps, f"{section}.decay_steps",
            opt.decay_steps, f"more than {section}.warmup_steps={opt.warmup_steps}",
        )  # fmt: skip
        need(opt.clip_norm is None or opt.clip_norm > 0, f"{section}.clip_norm", opt.clip_norm, "None or above 0")
    for section in ("client_optimizer", "server_optimizer", "aggregator"):
        for name in ("b1", "b2", "momentum"):
            value = flat[f"{section}.{name}"]
            need(value is None or 0 <= value < 1, f"{section}.{name}", value, "None, or a number from 0 to below 1")
        for name in ("eps", "weight_decay", "power", "end_learning_rate"):
            value = flat.get(f"{section}.{name}")
            need(value is None or value >= 0, f"{section}.{name}", value, "a number of at least 0")
    most = (2**31 - 1) // f.steps_per_round(f.clients_per_round or f.num_clients or 1)
    need(f.rounds <= most, "federated.rounds", f.rounds, f"at most {most}: a step's number is a 32-bit integer")


def _groups(pattern: str) -> int | None:
    """Returns how many groups a regular expression has, None if it is none."""
    try:
        return re.compile(pattern).groups
    except (re.error, RecursionError, OverflowError):
        return None


def _validate_finetune(config: Config, need: Callable[[bool, str, Any, str], None]) -> None:
    f, t = config.federated, config.finetune
    need(f.clients_at_once is None or (f.num_clients or 1) % f.clients_at_once == 0, "federated.clients_at_once",
         f.clients_at_once, f"a divisor of federated.num_clients={f.num_clients} with task='finetune'")  # fmt: skip
    need(config.wire.gradient_codec != "int8", "wire.gradient_codec", config.wire.gradient_codec,
         "'float32' or 'bfloat16' with task='finetune'")  # fmt: skip
    need(not f.arrangement.keeps_own, "federated.strategy", f.strategy,
         "with task='finetune' a strategy, and a federated.body, that end in one model for all")  # fmt: skip
    need(
        f.arrangement.pools_text or (config.data.partition.kind != "natural" and f.num_clients is not None),
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
    defaults, given = flatten(to_dict(Config())), flatten(to_dict(config))
    for instead, keys in UNUSED_IN_FINETUNING.items():
        for key in keys:
            need(given[key] == defaults[key], key, given[key],
                 f"its default, {defaults[key]!r}, with task='finetune', which {instead}")  # fmt: skip
    need(t.seeds_at_once >= 0, "finetune.seeds_at_once", t.seeds_at_once, "an integer of at least 0")
    for key, share in (("finetune.warmup", t.warmup), ("finetune.holdout", t.holdout)):
        need(0.0 <= share < 1.0, key, share, "a number from 0 to below 1")
