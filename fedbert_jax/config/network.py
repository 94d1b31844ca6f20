"""What cannot run over a network: settings that task=serve and task=join don't have, and addresses that are none."""

from __future__ import annotations

import re

from fedbert_jax.config.finetuning import UNUSED_WITH_LABELS
from fedbert_jax.config.keys import flatten, to_dict
from fedbert_jax.config.ranges import Need
from fedbert_jax.config.schema import Config, NetworkConfig

CLIENT_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}"
# By what stands in its place.
UNUSED = {
    "goes by federated.rounds: nobody knows how much text all have": ("federated.epochs",),
    "has one party a process": ("federated.clients_at_once", "mesh.model", "data.store"),
    "has each client prepare its own text": ("data.prepared",),
    "fills in no sentences": ("fill_mask", "profile"),
    "judges by held-out text alone, and trains to its last round": ("eval.extra", "eval.extra_blocks", "eval.patience"),
    "gives every client batch_size rows": ("federated.batch_by",),
}
UNUSED_WITH_LABELS_HERE = {
    "goes by federated.rounds and eval.every_rounds, and the rates by *_optimizer.warmup, as in pre-training": (
        "finetune.epochs",
        "finetune.warmup",
    ),
    "trains one model and predicts no test files": ("finetune.seeds", "finetune.seeds_at_once", "finetune.predict"),
} | UNUSED_WITH_LABELS


def check_network(config: Config, need: Need) -> None:
    """Checks `network`, and what a config with task='serve' or 'join' needs."""
    n, f, w = config.network, config.federated, config.wire
    need(0 <= n.port < 65536, "network.port", n.port, "an integer from 0 to 65535")
    need(0 <= n.metrics_port < 65536, "network.metrics_port", n.metrics_port, "an integer from 0 to 65535")
    need(n.host.strip() == n.host != "", "network.host", n.host, "an address or a name of this machine, or the server's")
    need(
        n.name == "" or re.fullmatch(CLIENT_NAME, n.name) is not None, "network.name", n.name, "letters, digits, ., - and _"
    )
    for key, value in (("deadline", n.deadline), ("patience", n.patience)):
        need(value > 0, f"network.{key}", value, "seconds, above 0")
    need(n.join_grace >= 0, "network.join_grace", n.join_grace, "seconds, at least 0")
    need(n.quorum is None or n.quorum >= 1, "network.quorum", n.quorum, "None or at least 1")
    need(
        w.microbatches >= 1 and f.batch_size % w.microbatches == 0,
        "wire.microbatches",
        w.microbatches,
        f"a divisor of federated.batch_size={f.batch_size}",
    )
    need(
        not config.audit.record or config.task == "serve",
        "audit.record",
        config.audit.record,
        f"False with task={config.task!r}: only a server (task='serve') receives messages",
    )
    if config.task not in ("serve", "join"):
        given, defaults = flatten(to_dict(config)), flatten(to_dict(Config()))
        for key in ("wire.microbatches", *(f"network.{name}" for name in vars(NetworkConfig()))):
            need(given[key] == defaults[key], key, given[key], f"its default, {defaults[key]!r}, with task={config.task!r}")
        return
    how, task = f.arrangement, f"with task={config.task!r}"
    need(
        how.cut and not how.keeps_own,
        "federated.strategy",
        f.strategy,
        f"{task} a strategy with a cut that ends in one model",
    )
    need(
        how.body != "copies" or f.client_optimizer_state != "keep",
        "federated.client_optimizer_state",
        f.client_optimizer_state,
        f"'average' or 'reset' {task} and federated.body={f.body!r}: the server keeps no optimizer state a client",
    )
    need(config.data.partition.kind == "natural", "data.partition.kind", config.data.partition.kind, f"'natural' {task}")
    need(
        not config.data.tokenizer.startswith("train:"),
        "data.tokenizer",
        config.data.tokenizer,
        f"{task} a Hugging Face directory or hub name that all parties have",
    )
    need(
        (w.noise == 0 and w.gradient_noise == 0) or w.microbatches == 1,
        "wire.microbatches",
        w.microbatches,
        "1 with wire.noise",
    )
    need(
        w.microbatches == 1 or not (config.model.hidden_dropout or config.model.attention_dropout),
        "wire.microbatches",
        w.microbatches,
        "1 with dropout, whose draws depend on how many rows there are",
    )
    need(
        config.privacy.client_seed is None or config.task == "join",
        "privacy.client_seed",
        config.privacy.client_seed,
        "None with task='serve': the server doesn't know the clients' secret",
    )
    secret, blinded = config.privacy.client_seed, config.privacy.averaging == "blinded" and config.task == "join"
    need(
        not blinded or (bool(n.credentials) if secret is None else secret >= 2**64),
        "privacy.client_seed",
        secret,
        f"a random integer of at least 2**64 that the server doesn't know, or network.credentials, {task} and "
        "privacy.averaging='blinded': the pads are worth what it takes to guess it",
    )
    need(
        bool(n.credentials) or config.task == "join" or (f.num_clients or 0) > 0,
        "federated.num_clients",
        f.num_clients,
        "an integer, with task='serve' and no network.credentials: how many clients to wait for",
    )
    need(
        not config.labelled or config.task == "serve" or "@" in config.data.source,
        "data.source",
        config.data.source,
        f"'glue:TASK@DIR' {task}, with the folder of the client's own examples: what is on the hub, everybody has",
    )
    given, defaults = flatten(to_dict(config)), flatten(to_dict(Config()))
    for instead, keys in (UNUSED | (UNUSED_WITH_LABELS_HERE if config.labelled else {})).items():
        for key in keys:
            need(given[key] == defaults[key], key, given[key], f"its default, {defaults[key]!r}, {task}, which {instead}")
