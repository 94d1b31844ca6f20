"""What each key accepts by itself: ranges and patterns of single values."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from fedbert_jax.config.keys import listed
from fedbert_jax.config.schema import Config

Need = Callable[[bool, str, Any, str], None]  # (whether it is accepted, key, value, what is accepted); raises ConfigError

AT_LEAST_1 = (
    "federated.local_steps",
    "federated.rounds",
    "federated.schedule_rounds",
    "federated.batch_size",
    "federated.num_clients",
    "federated.clients_per_round",
    "federated.clients_at_once",
    "checkpoint.every_rounds",
    "checkpoint.keep",
    "eval.every_rounds",
    "eval.batch_size",
    "eval.max_clients",
    "eval.max_blocks",
    "eval.extra_blocks",
    "eval.patience",
    "model.hidden_size",
    "model.num_layers",
    "model.num_heads",
    "model.intermediate_size",
    "model.vocab_size",
    "model.type_vocab_size",
    "client_optimizer.decay_steps",
    "server_optimizer.decay_steps",
    "mesh.model",
    "model.logits_at_once",
    "federated.max_clients_per_round",
    "checkpoint.times",
    "eval.times",
)

HUB_NAME = r"\w[\w.-]*(/\w[\w.-]*)?"  # what a model or a dataset may be called on the hub

# What an exported model's card may say, and what each field accepts.
CARD = {
    "export.license": (r"[a-z0-9][a-z0-9.-]*", "a license as the hub names it, such as apache-2.0, mit or other"),
    "export.language": (r"[a-z]{2,3}(-\w+)*|code|multilingual", "language codes with commas between, such as en,de"),
    "export.datasets": (HUB_NAME, "names of the hub's datasets with commas between, OWNER/NAME"),
    "export.base_model": (HUB_NAME, "a model's name on the hub, OWNER/NAME"),
}


def check_each(config: Config, flat: dict[str, Any], need: Need) -> None:
    """Checks what can be checked of each value by itself; `flat` is the config by dotted key."""
    m, d, f = config.model, config.data, config.federated
    for key, value in flat.items():
        need(not isinstance(value, float) or math.isfinite(value), key, value, "a finite number")
    for key in AT_LEAST_1:
        need(flat[key] is None or flat[key] >= 1, key, flat[key], "an integer of at least 1")
    span = re.fullmatch(r"(\d+):(\d+)", config.profile)
    need(
        config.profile == "" or (span is not None and 1 <= int(span[1]) <= int(span[2])),
        "profile",
        config.profile,
        "'' or 'START:STOP', rounds counted from 1, such as '3:5'",
    )
    need(
        span is None or f.epochs is not None or int(span[1]) <= f.rounds,
        "profile",
        config.profile,
        f"rounds up to federated.rounds={f.rounds}",
    )
    need(config.profile == "" or config.task == "pretrain", "profile", config.profile, "'' with task='finetune'")
    need(1 <= config.finetune.seeds <= 2**20, "finetune.seeds", config.finetune.seeds, f"an integer from 1 to {2**20}")
    share = config.finetune.holdout
    need(0.0 <= share < 1.0, "finetune.holdout", share, "a number from 0 to below 1")
    most = 2**31 - 1 - config.finetune.seeds
    need(0 <= config.seed <= most, "seed", config.seed, f"an integer from 0 to {most}")
    need(config.mesh.data == -1 or config.mesh.data >= 1, "mesh.data", config.mesh.data, "-1 or at least 1")
    need(8 <= d.seq_len < 2**16, "data.seq_len", d.seq_len, "from 8 to 65535")  # places cross as uint16
    known = m.init_from == "" or m.vocab_size is not None  # a checkpoint's sizes are filled in later, and checked again
    need(
        not known or d.seq_len <= m.max_position_embeddings,
        "data.seq_len",
        d.seq_len,
        f"at most model.max_position_embeddings={m.max_position_embeddings}, the size of the position table",
    )
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
        need(
            flat[key] == "" or groups != 0 or key != "data.client_pattern",
            key,
            flat[key],
            "a regular expression with a (group), which is the client's name",
        )
    for sentence in config.fill_mask:
        need("[MASK]" in sentence, "fill_mask", sentence, "sentences with [MASK], whatever the tokenizer calls its mask")
    for key, (pattern, accepted) in CARD.items():
        names = listed(flat[key]) if key in ("export.language", "export.datasets") else [flat[key]] if flat[key] else []
        need(all(re.fullmatch(pattern, name) for name in names), key, flat[key], accepted)


def _groups(pattern: str) -> int | None:
    """Returns how many groups a regular expression has; None if it is not one."""
    try:
        return re.compile(pattern).groups
    except (re.error, RecursionError, OverflowError):
        return None
