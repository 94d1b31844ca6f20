"""Refuses values, and combinations of them, that cannot run, before anything is read."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from fedbert_jax.config.arrangement import ARRANGEMENTS, rows
from fedbert_jax.config.codecs import CODECS
from fedbert_jax.config.dp import check_dp
from fedbert_jax.config.finetuning import check_finetuning
from fedbert_jax.config.keys import flatten, kind_of, listed, to_dict
from fedbert_jax.config.network import check_network
from fedbert_jax.config.ranges import Need, check_each
from fedbert_jax.config.schema import PRESETS, AggregatorConfig, Config, FederatedConfig, ModelConfig, WireConfig
from fedbert_jax.config.telling import SINKS
from fedbert_jax.errors import ConfigError


def resolve_model(model: ModelConfig, vocab_size: int) -> ModelConfig:
    """Fills in the preset's sizes and the tokenizer's vocabulary size."""
    sizes = dict(PRESETS[model.preset])
    for name in ("num_layers", "hidden_size", "num_heads"):
        sizes[name] = getattr(model, name) or sizes[name]
    sizes["intermediate_size"] = model.intermediate_size or 4 * sizes["hidden_size"]
    sizes["vocab_size"] = model.vocab_size or vocab_size
    return dataclasses.replace(model, **sizes)  # type: ignore[arg-type]


def validate(config: Config) -> None:
    """Raises `ConfigError` for the first value or combination that cannot run; reads no file."""
    f = config.federated

    def need(ok: bool, key: str, value: Any, accepted: str) -> None:
        if not ok:
            raise ConfigError(f"config key {key}={value!r}: accepted: {accepted}.")

    if (f.strategy, f.body, f.average) not in ARRANGEMENTS:
        raise ConfigError(
            f"config keys federated.strategy={f.strategy!r}, federated.body={f.body!r}, federated.average={f.average!r}: "
            f"accepted: {rows()}, or a name given to fedbert_jax.register in this process; body='pooled' and "
            "average='parameters' where nothing else is said."
        )
    check_each(config, flatten(to_dict(config)), need)
    _check_text(config, need)
    _check_model(config, need)
    if config.task == "finetune":
        check_finetuning(config, need)
    check_network(config, need)
    _check_cohort(config, need)
    _check_wire(config, need)
    check_dp(config, need)
    sinks = listed(config.metrics.sinks)
    known = set(sinks) <= set(SINKS) and len(sinks) == len(set(sinks))
    need(known, "metrics.sinks", config.metrics.sinks, f"'' or {' and '.join(SINKS)}, with a comma between")
    alone = config.task != "finetune" or not sinks
    need(alone, "metrics.sinks", config.metrics.sinks, "'' with task='finetune', whose numbers are of many runs")
    _check_schedules(config, need)
    known = config.eval.extra == "" or re.fullmatch(r"(docs|text|hf):.+", config.eval.extra) is not None
    need(known, "eval.extra", config.eval.extra, "'', or 'text:GLOB', 'hf:NAME[/CONFIG]' or 'docs:PACKAGE,...'")


def _check_text(config: Config, need: Need) -> None:
    """Checks where text and tokenizer come from."""
    m, d = config.model, config.data
    kind, _, rest = d.source.partition(":")
    text, examples = "'docs:[PACKAGE,...]', 'text:GLOB' or 'hf:NAME[/CONFIG]'", "'glue:TASK' or 'glue:TASK@DIR'"
    accepted = {"finetune": (("glue",), examples), "pretrain": (("docs", "text", "hf"), text)}
    kinds, shown = accepted.get(config.task, (("docs", "text", "hf", "glue"), f"{text}; or {examples}"))
    need(kind in kinds and ":" in d.source, "data.source", d.source, f"{shown} with task={config.task!r}")
    need(
        kind == "docs" or rest != "" or config.task == "serve",
        "data.source",
        d.source,
        f"'{kind}:' followed by what to read, such as a folder of text in 'text:FOLDER'",
    )
    need(kind == "hf" or not d.streaming, "data.streaming", d.streaming, "False, or data.source='hf:NAME'")
    if d.tokenizer.startswith("train:"):
        size = d.tokenizer.removeprefix("train:")
        need(
            size.isascii() and size.isdecimal() and 64 <= int(size) <= 2**24,
            "data.tokenizer",
            d.tokenizer,
            f"a Hugging Face directory or hub name, or train:SIZE with a SIZE from 64 to {2**24}",
        )
    need(
        d.tokenizer != "" or m.init_from != "",
        "data.tokenizer",
        d.tokenizer,
        "a Hugging Face directory or hub name, or train:SIZE",
    )

    need(
        m.init_from == "" or not d.tokenizer.startswith("train:"),
        "data.tokenizer",
        d.tokenizer,
        "'' with model.init_from (the checkpoint's own), or a Hugging Face directory or hub name",
    )


def _check_model(config: Config, need: Need) -> None:
    """Checks that sizes fit one another, and that the round can use the attention."""
    m, how = config.model, config.federated.arrangement
    known = m.init_from == "" or m.vocab_size is not None  # a checkpoint's sizes are filled in later, and checked again
    sizes = resolve_model(m, vocab_size=1)
    need(
        sizes.hidden_size % sizes.num_heads == 0,  # type: ignore[operator]
        "model.hidden_size",
        sizes.hidden_size,
        f"a multiple of model.num_heads={sizes.num_heads}",
    )

    need(
        m.client_layers >= 0 and (not known or m.client_layers < sizes.num_layers),  # type: ignore[operator]
        "model.client_layers",
        m.client_layers,
        f"an integer from 0 to below model.num_layers={sizes.num_layers}",
    )
    need(
        m.attention != "cudnn" or (how.body == "one" and not m.attention_dropout and not config.labelled),
        "model.attention",
        m.attention,
        "'auto' or 'xla' in fine-tuning, with model.attention_dropout, or where each client has a body",
    )


def _check_cohort(config: Config, need: Need) -> None:
    """Checks who takes part, and what each client keeps."""
    d, f, how = config.data, config.federated, config.federated.arrangement
    need(
        d.partition.kind == "natural" or f.num_clients is not None,
        "federated.num_clients",
        f.num_clients,
        f"an integer, which data.partition.kind={d.partition.kind!r} needs",
    )
    if f.num_clients is not None and f.clients_per_round is not None:
        need(
            f.clients_per_round <= f.num_clients,
            "federated.clients_per_round",
            f.clients_per_round,
            f"at most federated.num_clients={f.num_clients}",
        )
    need(
        f.clients_at_once is None or (how.abreast and not f.own_state),
        "federated.clients_at_once",
        f.clients_at_once,
        "None, unless clients train side by side and none keeps a model or an optimizer state of its own",
    )
    fixed = f.clients_per_round is None or f.clients_per_round == f.num_clients
    need(
        fixed or not f.own_state,
        "federated.clients_per_round",
        f.clients_per_round,
        "all clients, since this strategy, body or client_optimizer_state='keep' has state of its own for each client",
    )
    need(
        f.client_optimizer_state == "average" or how.averages or (how.clients == "in turn" and how.client == "one"),
        "federated.client_optimizer_state",
        f.client_optimizer_state,
        f"'average' {_named(f)}, which averages no copies and hands none on",
    )
    need(
        f.order == "shuffled" or how.clients == "in turn",
        "federated.order",
        f.order,
        f"'shuffled' {_named(f)}, where clients don't take turns",
    )
    by_size = (
        how.averages_gradients
        and f.clients_per_round in (None, f.num_clients)
        and f.max_clients_per_round is None
        and f.clients_at_once is None
        and config.wire.gradient_codec == "float32"
        and config.wire.gradient_clip is None  # a client's own dL/dz would be clipped, or blurred, and there are none
        and config.wire.gradient_noise == 0
        and config.privacy.averaging == "plain"  # of one pooled gradient there is no sum
        and config.task == "pretrain"
    )
    need(
        f.batch_by == "client" or by_size,
        "federated.batch_by",
        f.batch_by,
        "'client', unless task='pretrain', federated.average='gradients', clients_per_round, max_clients_per_round and "
        "clients_at_once are None, wire.gradient_codec='float32', gradient_clip=None and gradient_noise=0.0, and "
        "privacy.averaging='plain'",
    )


def _named(f: FederatedConfig) -> str:
    return f"with federated.strategy={f.strategy!r}" + f", federated.average={f.average!r}" * (
        f.average != FederatedConfig().average
    )


def _check_wire(config: Config, need: Need) -> None:
    """Checks what crosses the cut, if there is one, and what is averaged, if there are copies or gradients to average."""
    f, w, how = config.federated, config.wire, config.federated.arrangement
    named, flat = _named(f), flatten(to_dict(config))
    for section, made, ok, why in (
        ("aggregator", AggregatorConfig, how.averages, "averages no copies"),
        ("wire", WireConfig, how.cut, "has no cut"),
    ):
        for key, default in dataclasses.asdict(made()).items():
            value = flat[f"{section}.{key}"]
            need(ok or value == default, f"{section}.{key}", value, f"its default, {default!r}, {named}, which {why}")
    need(w.codec in CODECS, "wire.codec", w.codec, kind_of("wire.codec"))
    for key in ("wire.clip", "wire.gradient_clip"):
        need(flat[key] is None or flat[key] > 0, key, flat[key], "None or above 0")
    for key in ("wire.noise", "wire.gradient_noise"):
        need(flat[key] >= 0, key, flat[key], "a number of at least 0")
    need(
        w.gradient_codec == "float32" or how.averages_gradients,
        "wire.gradient_codec",
        w.gradient_codec,
        "'float32', unless gradients are averaged, as with federated.average='gradients'",
    )
    _check_blinding(config, need)


def _check_blinding(config: Config, need: Need) -> None:
    """Checks that what is to be blinded is averaged, and travels as numbers that add up."""
    f, how = config.federated, config.federated.arrangement
    key, value = "privacy.averaging", config.privacy.averaging
    plain = value == "plain"
    sent = how.averages_gradients or how.client == "copies" or (how.body == "copies" and not how.cut)
    need(plain or sent, key, value, f"'plain' {_named(f)}, where clients send nothing that is averaged")
    need(
        plain or f.client_optimizer_state != "average" or not how.averages,
        "federated.client_optimizer_state",
        f.client_optimizer_state,
        f"'reset' or 'keep' with {key}={value!r}: Adam's second moments are too small for whole numbers",
    )
    codec = config.wire.gradient_codec
    need(plain or codec == "float32", "wire.gradient_codec", codec, f"'float32' with {key}={value!r}")


def _check_schedules(config: Config, need: Need) -> None:
    """Checks how long training takes, and how learning rates change meanwhile."""
    f, flat = config.federated, flatten(to_dict(config))
    need(f.epochs is None or f.epochs > 0, "federated.epochs", f.epochs, "a number above 0, or None where rounds decides")
    need(f.schedule_from >= 0, "federated.schedule_from", f.schedule_from, "an integer of at least 0")
    need(config.aggregator.learning_rate > 0, "aggregator.learning_rate", config.aggregator.learning_rate, "above 0")
    for section, opt in (("client_optimizer", config.client_optimizer), ("server_optimizer", config.server_optimizer)):
        need(opt.learning_rate >= 0, f"{section}.learning_rate", opt.learning_rate, "a number of at least 0")
        need(opt.warmup_steps >= 0, f"{section}.warmup_steps", opt.warmup_steps, "an integer of at least 0")
        share = opt.warmup
        need(share is None or 0 <= share < 1, f"{section}.warmup", share, "None, or a number from 0 to below 1")
        need(
            opt.decay_steps is None or share is not None or opt.decay_steps > opt.warmup_steps,
            f"{section}.decay_steps",
            opt.decay_steps,
            f"more than {section}.warmup_steps={opt.warmup_steps}",
        )
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
