"""Refuses settings that fine-tuning doesn't have, and combinations that it can't run."""

from __future__ import annotations

from fedbert_jax.config.keys import flatten, to_dict
from fedbert_jax.config.ranges import Need
from fedbert_jax.config.schema import Config

# Settings that fine-tuning doesn't have, by what it has or does instead. They are refused rather than ignored.
UNUSED_IN_FINETUNING = {
    "goes by finetune.epochs and finetune.warmup, and judges and saves once an epoch": (
        "federated.rounds",
        "federated.epochs",
        "federated.schedule_rounds",
        "federated.schedule_from",
        "client_optimizer.warmup",
        "server_optimizer.warmup",
        "checkpoint.times",
        "eval.times",
        "client_optimizer.warmup_steps",
        "client_optimizer.decay_steps",
        "server_optimizer.warmup_steps",
        "server_optimizer.decay_steps",
        "checkpoint.every_rounds",
        "checkpoint.keep",
        "eval.every_rounds",
        "eval.extra",
        "eval.extra_blocks",
        "eval.patience",
        "fill_mask",
    ),
}
# The same of whatever trains a classifier, in one process or over a network.
UNUSED_WITH_LABELS = {
    "reads labelled examples, and masks nothing": (
        "mlm.mask_prob",
        "mlm.whole_word",
        "model.logits_at_once",
        "data.lowercase",
        "data.eval_fraction",
        "data.documents",
        "data.document_start",
        "data.text_field",
        "data.client_field",
        "data.client_pattern",
        "data.missing_client",
        "data.split",
        "data.streaming",
        "data.deduplicate",
        "data.deduplicate_across",
        "data.small_clients",
        "data.store",
        "data.cache_dir",
        "data.prepared",
        "eval.max_clients",
        "eval.max_blocks",
    ),
}


def check_finetuning(config: Config, need: Need) -> None:
    """Checks what a config with task='finetune' needs."""
    f, t = config.federated, config.finetune
    need(
        f.clients_at_once is None or (f.num_clients or 1) % f.clients_at_once == 0,
        "federated.clients_at_once",
        f.clients_at_once,
        f"a divisor of federated.num_clients={f.num_clients} with task='finetune'",
    )
    need(
        config.wire.gradient_codec != "int8",
        "wire.gradient_codec",
        config.wire.gradient_codec,
        "'float32' or 'bfloat16' with task='finetune'",
    )
    need(
        not f.arrangement.keeps_own,
        "federated.strategy",
        f.strategy,
        "with task='finetune' a strategy, and a federated.body, that end in one model for all",
    )
    need(
        f.arrangement.pools_text or (config.data.partition.kind != "natural" and f.num_clients is not None),
        "federated.num_clients",
        f.num_clients,
        "an integer, with data.partition.kind 'iid' or 'dirichlet' (over the labels): GLUE has no clients of its own",
    )
    need(
        f.clients_per_round in (None, f.num_clients),
        "federated.clients_per_round",
        f.clients_per_round,
        "all clients with task='finetune'",
    )
    need(
        not config.data.tokenizer.startswith("train:"),
        "data.tokenizer",
        config.data.tokenizer,
        "'' with model.init_from (the checkpoint's own), or a Hugging Face directory or hub name",
    )
    need(
        f.client_optimizer_state != "keep",
        "federated.client_optimizer_state",
        f.client_optimizer_state,
        "'average' or 'reset' with task='finetune'",
    )
    need(0 < t.epochs < float("inf"), "finetune.epochs", t.epochs, "a number above 0")
    defaults, given = flatten(to_dict(Config())), flatten(to_dict(config))
    for instead, keys in (UNUSED_IN_FINETUNING | UNUSED_WITH_LABELS).items():
        for key in keys:
            need(
                given[key] == defaults[key],
                key,
                given[key],
                f"its default, {defaults[key]!r}, with task='finetune', which {instead}",
            )
    need(t.seeds_at_once >= 0, "finetune.seeds_at_once", t.seeds_at_once, "an integer of at least 0")
    need(0.0 <= t.warmup < 1.0, "finetune.warmup", t.warmup, "a number from 0 to below 1")
