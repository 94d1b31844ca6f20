"""Which keys may change in an old workdir, and which are worked out from others."""

from __future__ import annotations

# No round depends on these: an old workdir accepts any change to them.
FREE = frozenset(
    {
        "resume",
        "profile",
        "network.host",
        "network.port",
        "network.name",
        "network.credentials",
        "network.quorum",
        "network.deadline",
        "network.join_grace",
        "network.patience",
        "network.metrics_port",
        "network.release_body",
        "network.leave",
        "audit.record",
        "metrics.sinks",
        "data.prepared",
        "export.license",
        "export.language",
        "export.datasets",
        "export.base_model",
        "export.hidden_dropout",
        "export.attention_dropout",
    }
)
# A change to one of these leaves finished rounds as they were, so `resume=force` accepts it on an old workdir.
HARMLESS = FREE | frozenset(
    {
        "fill_mask",
        "federated.rounds",
        "federated.epochs",
        "federated.schedule_rounds",
        "federated.schedule_from",
        "federated.clients_at_once",
        "checkpoint.every_rounds",
        "checkpoint.times",
        "checkpoint.keep",
        "eval.every_rounds",
        "eval.times",
        "eval.patience",
        "mesh.data",
        "mesh.model",
        "data.store",
        "data.cache_dir",
        "data.streaming",
        "model.remat",
        "model.unroll_layers",
        "model.attention",
        "model.logits_at_once",
    }
)
# The key on the left is worked out from the amount of text (`config/extent.py`) if the one on the right is set.
WORKED_OUT = {
    "federated.rounds": "federated.epochs",
    "federated.clients_per_round": "federated.max_clients_per_round",
    "checkpoint.every_rounds": "checkpoint.times",
    "eval.every_rounds": "eval.times",
    "client_optimizer.warmup_steps": "client_optimizer.warmup",
    "server_optimizer.warmup_steps": "server_optimizer.warmup",
}
# These are as harmless if federated.schedule_from says that the schedules begin after the last finished round.
RESCHEDULED = frozenset(
    f"{side}_optimizer.{key}"
    for side in ("client", "server")
    for key in ("learning_rate", "schedule", "warmup", "warmup_steps", "decay_steps", "end_learning_rate", "power")
)
# A fine-tuning workdir accepts any change to these: finished seeds stay, and others are trained.
EXTENDABLE = frozenset({"finetune.seeds", "finetune.seeds_at_once", "finetune.predict"})
