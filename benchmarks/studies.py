"""The studies that `python -m benchmarks.study` knows, as data: which configs, with which changes, over how many seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Changes = Mapping[str, Any]  # to a config, by dotted key; "{model}", "{text}": the command's; "{baseline}": its run


@dataclass(frozen=True)
class Arm:
    """One of the configurations compared."""

    config: str  # a file of configs/
    changes: Changes = field(default_factory=dict)


@dataclass(frozen=True)
class Tasks:
    """GLUE tasks that are fine-tuned with the same settings."""

    names: tuple[str, ...]
    epochs: float
    rate: float
    metric: str | None = None  # None: the mean of the task's metrics


@dataclass(frozen=True)
class Study:
    """What is run, and the arm with which the others are compared."""

    about: str
    arms: Mapping[str, Arm]
    baseline: str  # an arm
    changes: Changes = field(default_factory=dict)  # to every arm
    seeds: int = 3
    needs: tuple[str, ...] = ()  # which of --model, --text, --glue and --public
    # What the first seed's models are fine-tuned on, beside a random start (and the checkpoint).
    tasks: tuple[Tasks, ...] = ()
    audited: bool = False  # whether every run is audited, too


QUIET = {"fill_mask": "()"}

# The learning rates tried, each with seed 0 and at full length: shorter runs order rates differently.
RATES = {
    f"{name}-{rate}": Arm(f"configs/{name}.py", {f"{side}_optimizer.learning_rate": float(rate) for side in sides})
    for name, sides, rates in (
        ("demo", ("client", "server"), ("2e-3", "3e-3")),
        ("parallel", ("client",), ("4e-3", "6e-3", "8e-3")),
        ("centralized", ("client", "server"), ("2e-3", "3e-3")),
        ("sequential", ("client", "server"), ("1e-3", "2e-3")),
        ("fedavg", ("client", "server"), ("2e-3", "4e-3")),
        ("local", ("client", "server"), ("1e-3", "2e-3")),
    )
    for rate in rates
}

# BERT-tiny's GLUE. 3e-4 was chosen for the checkpoint of the study `continued`, on a tenth of the training examples.
SMALL_GLUE = (
    Tasks(("SST-2",), 1.0, 3e-4),
    Tasks(("CoLA", "RTE"), 3.0, 3e-4),
    Tasks(("STS-B",), 3.0, 3e-4, "pearson"),
)

# 64 clients, each with the reviews of one film; 16 take part in a round, so each trains a quarter of the rounds on average.
FILMS = {
    "data.source": "text:{text}",
    "data.text_field": "text",
    "data.client_field": "movie",
    "federated.num_clients": 64,
}

STRATEGIES = {
    "demo": Arm("configs/demo.py"),
    "size": Arm("configs/demo.py", {"federated.batch_by": "size"}),
    **{name: Arm(f"configs/{name}.py") for name in ("parallel", "sequential", "centralized", "local", "fedavg")},
}

CONTINUED = {
    "model.init_from": "{model}",
    "federated.local_steps": 4,
    "federated.batch_size": 4,
    "client_optimizer.warmup_steps": 20,
    "server_optimizer.warmup_steps": 20,
}
SIXTEEN = {"federated.clients_per_round": 16, "federated.rounds": 100}  # x 16 x 4 x 4 x 128 tokens: 3.28 million
ALL = {"federated.rounds": 25, "eval.every_rounds": 5}  # `local` keeps a model per client, so all 64 take part each round

# From nothing: the clients are the 706 films with the most text. 16 of them take part in a round, and 916 rounds of
# 16 x 8 x 4 x 128 tokens make 60 million. `local` keeps a model per client, so only the 64 largest films share its tokens.
SCRATCH = FILMS | {
    "data.tokenizer": "train:8192",
    "federated.num_clients": 706,
    "federated.clients_per_round": 16,
    "federated.batch_size": 4,
    "federated.rounds": 916,
    "federated.weighting": "uniform",
    "client_optimizer.warmup_steps": 500,
    "server_optimizer.warmup_steps": 500,
    "eval.every_rounds": 100,
}
ALONE = {
    "federated.num_clients": 64,
    "federated.clients_per_round": 64,
    "federated.rounds": 229,
    "eval.every_rounds": 25,
    "client_optimizer.warmup_steps": 125,  # the same share of the steps as elsewhere
    "server_optimizer.warmup_steps": 125,
    "data.tokenizer": "{baseline}/data/tokenizer",  # one trained on 64 films' text would have other words
}

# Sixteen times the steps, each smaller. With 1e-3 the loss rises from 7M tokens on and stays above the plateau.
TURNS = {
    f"{side}_optimizer.{key}": value
    for side in ("client", "server")
    for key, value in (("warmup_steps", 8000), ("learning_rate", 3e-4))
}

# What may keep text from whoever receives activations: each alone and in combinations, on the demo's data and tokens. The
# clients' secret is the same number in all these: what it hides is what the server can't compute, whatever the number is.
SECRETS = (271828, 314159, 161803, 141421)
SECRET = {"privacy.client_seed": SECRETS[0]}
NOISE = {sigma: {"wire.noise": sigma, "wire.clip": 12.0} for sigma in (0.5, 1.0, 2.0)}
DEEP = {"model.client_layers": 1}
# The same steps in a quarter of the rounds: evaluated and kept as often by steps.
LONG = {"federated.local_steps": 32, "federated.rounds": 70, "eval.every_rounds": 5, "checkpoint.every_rounds": 10}
DEFENCES = {
    "demo": Arm("configs/demo.py"),
    "secret": Arm("configs/demo.py", SECRET),
    **{f"noise-{sigma:g}": Arm("configs/demo.py", SECRET | changes) for sigma, changes in NOISE.items()},
    "dropout": Arm("configs/demo.py", SECRET | {"model.hidden_dropout": 0.1}),
    "deep": Arm("configs/demo.py", SECRET | DEEP),
    "deep-noise-0.5": Arm("configs/demo.py", SECRET | DEEP | NOISE[0.5]),
    "deep-noise-1": Arm("configs/demo.py", SECRET | DEEP | NOISE[1.0]),
    "eight-steps": Arm("configs/parallel.py", SECRET),
    "eight-steps-keep": Arm("configs/parallel.py", SECRET | {"federated.client_optimizer_state": "keep"}),
    "thirty-two-steps": Arm("configs/parallel.py", SECRET | LONG),
    "turns": Arm("configs/sequential.py", SECRET),
    "blinded": Arm("configs/demo.py", SECRET | {"privacy.averaging": "blinded"}),
}

# Noise on averages grows with how many numbers there are, and falls with how many clients are in a round.
HUNDRED = {
    "data.tokenizer": "train:1024",
    "data.seq_len": 32,
    "data.partition.kind": "iid",
    "federated.num_clients": 100,
    "federated.clients_per_round": 25,
    "federated.client_optimizer_state": "reset",
    "federated.rounds": 40,
    "client_optimizer.learning_rate": 2e-3,
}
DP = {"privacy.dp": "client", "privacy.dp_clip": 1.0}

# How much of the body stands at the client: a body of four layers, since the demo's two leave one to move at most.
FOUR = SECRET | {"model.num_layers": 4}
DEPTHS = {f"client-{layers}": Arm("configs/demo.py", FOUR | {"model.client_layers": layers}) for layers in range(4)}

STUDIES = {
    "strategies": Study(
        about="Every strategy on the demo's data and tokens.", arms=STRATEGIES, baseline="centralized", changes=QUIET
    ),
    "bf16": Study(
        about="Whether bfloat16 arithmetic trains as well as float32. A seed decides the tokenizer and what is held out, "
        "too, so runs of one seed are pairs.",
        arms={
            "float32": Arm("configs/demo.py", {"precision.compute_dtype": "float32"}),
            "bfloat16": Arm("configs/demo.py", {"precision.compute_dtype": "bfloat16"}),
        },
        baseline="float32",
        changes=QUIET | {"federated.rounds": 200},
    ),
    "rates": Study(
        about="Learning rates for every strategy, on the demo's data and tokens.",
        arms=RATES,
        baseline="demo-2e-3",
        changes=QUIET,
        seeds=1,
    ),
    "defences": Study(
        about="What may keep text from whoever receives activations, and what it costs, on the demo's data and tokens.",
        arms=DEFENCES,
        baseline="demo",
        changes=QUIET,
        audited=True,
    ),
    "secrets": Study(
        about="Whether a secret of the clients' changes what is learnt, on the demo's data and tokens: several secrets, "
        "since each is another draw of initial values, masks and order.",
        arms={"demo": Arm("configs/demo.py")}
        | {f"secret-{n}": Arm("configs/demo.py", {"privacy.client_seed": secret}) for n, secret in enumerate(SECRETS)},
        baseline="demo",
        changes=QUIET,
    ),
    "codecs": Study(
        about="What a codec of averaged gradients costs in learning, on the demo's data and tokens.",
        arms={name: Arm("configs/demo.py", {"wire.gradient_codec": name}) for name in ("float32", "bfloat16", "int8")},
        baseline="float32",
        changes=QUIET,
    ),
    "depths": Study(
        about="What layers at the client keep from whoever receives activations, on the demo's data and tokens.",
        arms=DEPTHS,
        baseline="client-0",
        changes=QUIET,
        audited=True,
    ),
    "labels": Study(
        about="What noise on the gradients that clients send back hides of labels, on the demo's data and tokens.",
        arms={"clear": Arm("configs/demo.py", SECRET)}
        | {
            f"noise-{sigma:g}": Arm("configs/demo.py", SECRET | {"wire.gradient_noise": sigma, "wire.gradient_clip": 0.05})
            for sigma in (0.0005, 0.0015, 0.005)
        },
        baseline="clear",
        changes=QUIET,
        audited=True,
    ),
    "averages": Study(
        about="What differential privacy of averages costs: the demo's text dealt to 100 clients, 25 a round.",
        arms={
            "plain": Arm("configs/parallel.py"),
            "clipped": Arm("configs/parallel.py", DP | {"privacy.dp_noise": 1e-6}),
            "noise-0.1": Arm("configs/parallel.py", DP | {"privacy.dp_noise": 0.1}),
            "noise-1": Arm("configs/parallel.py", DP | {"privacy.dp_noise": 1.0}),
        },
        baseline="plain",
        changes=QUIET | HUNDRED,
    ),
    "checkpoint": Study(
        about="What can be read off a model that is trained on from a public checkpoint, on film reviews, with none of its "
        "layers at the client and with one.",
        arms={
            f"client-{layers}": Arm("configs/continue.py", {"federated.strategy": "parallel", "model.client_layers": layers})
            for layers in range(2)
        },
        baseline="client-0",
        changes=QUIET | FILMS | CONTINUED | SIXTEEN | {"federated.rounds": 40},
        seeds=1,
        needs=("model", "text", "public"),
        audited=True,
    ),
    "continued": Study(
        about="A checkpoint, pre-trained further on film reviews by several strategies with equal tokens, and fine-tuned "
        "on GLUE beside itself and a random start.",
        arms={
            "centralized": Arm("configs/continue.py", SIXTEEN | {"federated.strategy": "centralized"}),
            "parallel": Arm("configs/continue.py", SIXTEEN | {"federated.strategy": "parallel"}),
            "sequential": Arm("configs/continue.py", SIXTEEN | {"federated.strategy": "sequential"}),
            "local": Arm("configs/continue.py", ALL | {"federated.strategy": "local"}),
        },
        baseline="centralized",
        changes=QUIET | FILMS | CONTINUED,
        seeds=1,
        needs=("model", "text", "glue"),
        tasks=SMALL_GLUE,
    ),
    "scratch": Study(
        about="BERT-tiny from nothing on film reviews by several strategies, 60 million tokens each, and fine-tuned on GLUE "
        "beside a random start.",
        arms={
            "centralized": Arm("configs/centralized.py"),
            "gradients": Arm("configs/demo.py"),
            "parallel": Arm("configs/parallel.py"),
            "sequential": Arm("configs/sequential.py", TURNS),
            "local": Arm("configs/local.py", ALONE),
        },
        baseline="centralized",
        changes=QUIET | SCRATCH,
        seeds=1,
        needs=("text", "glue"),
        tasks=SMALL_GLUE,
    ),
}
