"""A classifier trained over a network is the simulation's; its scores are those of all clients' examples together."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from corpus import ROOT
from federation import NAMES, Federation
from ml_collections import ConfigDict
from processes import finish, free_port, start_alone, wait_until
from rich.console import Console
from tiny import assert_trees_close
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertTokenizerFast

from fedbert_jax import config as config_lib
from fedbert_jax.config import Config
from fedbert_jax.config.files import read_config
from fedbert_jax.data.sampling import draw_cohort, turn_order
from fedbert_jax.data.streams import seeds_of
from fedbert_jax.errors import ConfigError, UserError
from fedbert_jax.federated.setting import Setting
from fedbert_jax.federated.wire import MESSAGES
from fedbert_jax.glue import finetune as ft
from fedbert_jax.glue import tallies
from fedbert_jax.glue.files import load
from fedbert_jax.glue.simulation import Finetuning
from fedbert_jax.glue.tasks import TASKS, Examples, Task
from fedbert_jax.jobs import open_job
from fedbert_jax.jobs.job import Shard, settled
from fedbert_jax.models import huggingface
from fedbert_jax.models.bert import make_segments
from fedbert_jax.runtime import frames
from fedbert_jax.runtime.engine import ServerState
from fedbert_jax.runtime.frames import Schema
from fedbert_jax.runtime.grpc import Client, Server
from fedbert_jax.workdir.checkpoint import Checkpoints
from fedbert_jax.workdir.paths import Workdir

WORDS = "the a film play song was is good bad dull bright long short very not never always".split()
QUIET = Console(quiet=True)
ROUNDS, STEPS, BATCH = 2, 2, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of whole words, and SST-2 and STS-B with sentences of very different lengths."""
    root, rng = tmp_path_factory.mktemp("examples"), np.random.default_rng(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    BertTokenizerFast(vocab={w: n for n, w in enumerate(words)}, do_lower_case=True).save_pretrained(root / "tokenizer")
    sentences = [" ".join(rng.choice(WORDS, rng.integers(2, 26))) for _ in range(126)]
    for name, part in (("train", sentences[:96]), ("dev", sentences[96:])):
        write(root, TASKS["SST-2"], name, Examples(part, None, np.array([int("good" in s) for s in part]), []))
        halves = [s.split() for s in part]
        first, second = (
            [" ".join(side) for side in sides] for sides in zip(*((w[::2], w[1::2]) for w in halves), strict=True)
        )
        scores = np.array([min(len({*a.split()} & {*b.split()}), 5) for a, b in zip(first, second, strict=True)])
        write(root, TASKS["STS-B"], name, Examples(first, second, scores, []))
    return root


def write(root: Path, task: Task, split: str, examples: Examples) -> None:
    """Writes a task's official file."""
    columns = [*task.columns, task.label_column]
    sides = [examples.first] + ([examples.second] if examples.second is not None else [])
    rows = [[*row, str(label)] for *row, label in zip(*sides, examples.labels, strict=True)]
    (root / task.name).mkdir(exist_ok=True, parents=True)
    (root / task.name / f"{split}.tsv").write_text("\n".join("\t".join(row) for row in [columns, *rows]) + "\n")


def take(examples: Examples, places: np.ndarray) -> Examples:
    second = None if examples.second is None else [examples.second[n] for n in places]
    return Examples([examples.first[n] for n in places], second, examples.labels[places], [])


def make_config(folder: Path, task: str, source: str, federated: dict[str, Any] | None = None, **others: Any) -> Config:
    """A config of the simulation, or of a party of the same training."""
    adamw: dict[str, Any] = dict(learning_rate=1e-2, eps=1e-3, weight_decay=0.01, clip_norm=1.0)
    values: dict[str, Any] = dict(
        task=task,
        data=dict(source=f"glue:{source}", tokenizer=str(folder / "tokenizer"), seq_len=32),
        model=dict(hidden_size=16, num_layers=1, num_heads=2, max_position_embeddings=32),
        federated=dict(num_clients=3, local_steps=STEPS, batch_size=BATCH) | (federated or {}),
        eval=dict(batch_size=8),
    )
    if task == "finetune":  # 96 examples, 12 a step: half an epoch is two rounds of two steps
        values["data"]["partition"] = dict(kind="dirichlet", alpha=1.0)
        values["finetune"] = dict(epochs=0.5, warmup=0.25)
    else:
        values["federated"]["rounds"] = ROUNDS
        adamw["warmup"] = 0.25
    values["client_optimizer"] = values["server_optimizer"] = adamw
    for section, keys in others.items():
        values[section] = values.get(section, {}) | keys
    return config_lib.from_dict(values)


def simulation_of(folder: Path, task: str, **settings: Any) -> Finetuning:
    config = make_config(folder, "finetune", f"{task}@{folder}", **settings)
    tokenizer = ft.tokenizer_of(config)
    config, start = ft.resolve(config, tokenizer)
    return Finetuning(config, ft.read_task(config, tokenizer), start, (0,))


def deal(simulation: Finetuning, folder: Path, into: Path) -> None:
    """Writes each client's own folder: the examples that the simulation deals to it, and its part of the dev set."""
    task = simulation.data.task
    for split, examples in load(task, folder, ("train", "dev")).items():
        for n, name in enumerate(NAMES):
            places = simulation.clients[n] if split == "train" else np.arange(n, len(examples.first), 3)
            write(into / name, task, split, take(examples, places))


class Classifiers(Federation):
    """A federation that trains a classifier, with the parties' own jobs and each client's own files."""

    def __init__(
        self, folder: Path, into: Path, task: str, parts: int = 1, state: Any = None, done: int = 0, **settings: Any
    ):
        self.simulation, self.seen = simulation_of(folder, task, **settings), set[tuple[str, int]]()
        self.states: list[ServerState] = []
        deal(self.simulation, folder, into)
        settings = settings | {"wire": settings.get("wire", {}) | {"microbatches": parts}}
        self.of = lambda party, source: make_config(folder, party, source, **settings)
        self.into, self.task = into, task
        self.job = open_job(self.of("serve", task))
        self.lengths, self.sums = self.job.lengths, self.job.sums
        super().__init__(settled(self.job.config, 3), parts, evaluates=True, state=state, done=done)

    def make(self) -> tuple[Setting, Any, Schema, Callable[[int], Any]]:
        seeds, how = seeds_of(self.job.config), self.job.config.federated.arrangement
        self.job.config = settled(self.job.config, 3)

        def cohort_of(round: int) -> np.ndarray:
            drawn = draw_cohort(seeds, round, 3, 3)
            return drawn[turn_order(seeds, round, 3)] if how.clients == "in turn" else drawn

        return self.job.setting(3, 3), self.job.batch(), self.job.questions(), cohort_of

    def _on_round(self, round: int, members: tuple[str, ...]) -> None:
        super()._on_round(round, members)
        self.states.append(self.engine.state)

    def shard(self, name: str) -> Shard:
        job, index = open_job(self.of("join", f"{self.task}@{self.into / name}")), NAMES.index(name)
        job.read(index, name, Workdir(self.into / name), QUIET)
        job.config = settled(job.config, 3)
        shard = job.shard(index)

        def rows(round: int) -> Any:
            found = shard.rows(round)
            self.seen.add((name, found.tokens.shape[-1]))
            return found

        return shard._replace(rows=rows)


def check_equal(federation: Classifiers, clients: dict[str, Any]) -> None:
    """Requires what the federation trained, lost and scored to be the simulation's, up to rounding."""
    simulation, work = federation.simulation, federation.engine.state
    (state, _), losses = simulation.init_state(), []
    assert simulation.rounds == ROUNDS and simulation.steps == ROUNDS * STEPS
    for n in range(ROUNDS):
        state, metrics = simulation.step(state, n)
        losses.append(float(metrics.loss[0]))
    model = jax.device_get(jax.tree.map(lambda x: x[0], state.model))
    assert_trees_close(jax.device_get(work.body), model.server, rtol=1e-4, atol=2e-6)
    assert_trees_close(jax.device_get(work.segment), model.client, rtol=1e-4, atol=2e-6)
    if not federation.engine.in_turn:
        for client in clients.values():
            assert_trees_close(jax.device_get(client.held.segment), model.client, rtol=1e-4, atol=2e-6)
    np.testing.assert_allclose([numbers["train_loss"] for _, numbers in federation.rounds], losses, rtol=1e-5)
    expected, found = (
        simulation.scores(state)[0]["dev"],
        federation.job.judge(scores_of(federation), dict.fromkeys(NAMES, 1)),
    )
    expected.pop("spearman", None)  # which needs all answers in one order
    if "pearson" in expected:  # a correlation divides by the answers' spread: were they all alike, it would be of rounding
        answers = simulation.logits(state.model, simulation.data.dev["dev"])[0]
        assert answers.std() > 0.01 * np.abs(answers).max()
    assert found.fields["scores"] == {"dev": pytest.approx(expected, rel=1e-4, abs=1e-5)} and expected
    assert found.fields["eval_clients"].keys() == set(NAMES) and found.fields["eval_clients_scored"] == 3


def scores_of(federation: Classifiers) -> dict[str, np.ndarray]:
    return federation.rounds[-1][1]["scores"]


CASES = [
    ("SST-2", dict(average="gradients"), {}, 2),
    ("SST-2", dict(strategy="sequential"), {}, 1),
    (
        "STS-B",
        {},
        dict(
            wire=dict(downlink="all"),
            model=dict(num_layers=2, hidden_dropout=0.1, attention_dropout=0.1, initializer_range=0.3),
        ),
        1,
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("task, federated, others, parts", CASES)
def test_a_federation_trains_the_simulations_classifier(task, federated, others, parts, folder, tmp_path):
    federation = Classifiers(folder, tmp_path, task, parts, federated=federated, **others)
    check_equal(federation, federation.run())


@pytest.fixture(scope="module")
def local(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Classifiers, dict[str, Any]]:
    """A federation by function calls, trained."""
    federation = Classifiers(folder, tmp_path_factory.mktemp("local"), "SST-2")
    return federation, federation.run()


def test_clients_pad_to_lengths_of_their_own(local):
    """So what crosses is as long as a client's own sentences are, and the sums are the simulation's all the same."""
    federation, clients = local
    check_equal(federation, clients)
    assert {length for _, length in federation.seen} == {16, 32}


def same(a: Any, b: Any) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(np.array_equal(x, y) for x, y in pairs)


def test_over_grpc_it_ends_with_the_same_bits(local, folder, tmp_path):
    federation = Classifiers(folder, tmp_path, "SST-2")
    server = Server(federation.service, "127.0.0.1", 0)
    try:
        federation.run(transport=lambda name: Client("127.0.0.1", server.port, name, None, 1 << 24))
    finally:
        server.stop(0)
    assert same(federation.engine.state, local[0].engine.state)
    assert same(scores_of(federation), scores_of(local[0]))


def test_nothing_crosses_that_holds_a_token_or_a_label(local, folder, tmp_path):
    """Whatever a client sends has one of these names; none has anything to do with tokens or labels but their lengths."""
    federation, crossed = Classifiers(folder, tmp_path, "SST-2"), set[str]()

    class Watched:
        def __init__(self, name: str):
            self.name = name

        def call(self, method: str, data: bytes, timeout: float) -> bytes:
            crossed.update(frames.decode(data, 1 << 24)[1])
            return federation.service.call(method, self.name, data)

    federation.run(transport=Watched)
    named = {name.partition("/")[0] for name in crossed}
    step = {"activations", "positions", "lengths", "head_gradient", "loss"}
    assert named == step | {"first_segment", "trained_segment", "trained_segment_optimizer", "norm", "sums"}
    assert all(MESSAGES[name] == "up" for name in named)
    assert same(federation.engine.state, local[0].engine.state)


def test_a_server_that_comes_back_goes_on_and_ends_with_the_same_bits(local, folder, tmp_path):
    """As `serve` does it: the newest checkpoint's state, and clients who know of nothing."""
    saved = Checkpoints(tmp_path / "checkpoints", 1)
    saved.save(1, local[0].states[0], {})
    shape = local[0].engine.state_shape()
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state, _ = saved.restore(1, shape, jax.tree.map(lambda _: here, shape))
    saved.close()
    federation = Classifiers(folder, tmp_path, "SST-2", state=state, done=1)
    federation.run()
    assert same(federation.engine.state, local[0].engine.state)
    assert [round for round, _ in federation.rounds] == [1] and same(scores_of(federation), scores_of(local[0]))


def flags(config: Config, path: Path, workdir: Path, **more: Any) -> list[str]:
    """The command line that makes a config of a file."""
    given = config_lib.flatten(ConfigDict(read_config(path)).to_dict())
    wanted = config_lib.flatten(config_lib.to_dict(config)) | {key.replace("__", "."): value for key, value in more.items()}
    changed = [f"--config.{key}={value}" for key, value in wanted.items() if key in given and given[key] != value]
    return [sys.executable, "-m", "fedbert_jax.main", "--config", str(path), "--workdir", str(workdir), *changed]


@pytest.fixture(scope="module")
def checkpoint(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pre-trained model: it has a head for words, and no classifier."""
    place = tmp_path_factory.mktemp("checkpoint") / "hf"
    config = open_job(make_config(folder, "serve", "SST-2")).config
    client, server = make_segments(config.model).init(jax.random.key(7), jax.random.key(8))
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    huggingface.save(place, *jax.device_get((client, server)), config.model, tokenizer, "")
    return place


@pytest.mark.slow
def test_four_processes_two_of_which_are_killed_end_in_the_simulations_classifier(checkpoint, folder, tmp_path):
    """By the commands of the docs: the server's and the clients' own, which are given again."""
    start = dict(model=dict(init_from=str(checkpoint)))
    simulation, port = simulation_of(folder, "SST-2", **start), free_port()
    often = dict(network__port=port, checkpoint__every_rounds=1, eval__every_rounds=1)
    deal(simulation, folder, tmp_path / "own")
    server = flags(
        make_config(folder, "serve", "SST-2", **start), ROOT / "configs/serve_classifier.py", tmp_path / "server", **often
    )

    def client(name: str) -> list[str]:
        config = make_config(folder, "join", f"SST-2@{tmp_path / 'own' / name}", dict(num_clients=None), **start)
        return flags(config, ROOT / "configs/join_classifier.py", tmp_path / name, **often)

    parties = {name: start_alone(client(name))[0] for name in NAMES} | {"server": start_alone(server)[0]}
    saved = tmp_path / "server" / "checkpoints" / "1"
    wait_until(saved.is_dir, list(parties.values()), timeout=400)
    for name, command in {"server": server, "adams": client("adams")}.items():
        parties[name].kill()
        parties[name].communicate()
        parties[name] = start_alone(command)[0]
    codes, said, errors = finish(list(parties.values()), timeout=400)
    assert codes == [0, 0, 0, 0], "\n".join(said + errors)
    assert "resuming after round" in said[-1]

    (state, _) = simulation.init_state()
    for n in range(ROUNDS):
        state, _ = simulation.step(state, n)
    records = [json.loads(line) for line in (tmp_path / "server" / "metrics.jsonl").read_text().splitlines()]
    assert [r["round"] for r in records] == [1, 2] and records[-1]["examples"] == ROUNDS * STEPS * BATCH * 3
    assert records[-1]["scores"] == {"dev": pytest.approx(simulation.scores(state)[0]["dev"])}
    own = json.loads((tmp_path / "adams" / "metrics.jsonl").read_text().splitlines()[-1])
    assert own["scores"]["dev"]["accuracy"] == pytest.approx(records[-1]["eval_clients"]["adams"]["dev"]["accuracy"])

    model = jax.device_get(jax.tree.map(lambda x: x[0], state.model))
    expected = huggingface.to_tensors(model.client, model.server, huggingface.CLASSIFIER_CLIENT)
    for name in NAMES:
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / name / "hf")
        assert loaded.config.id2label == {0: "negative", 1: "positive"}
        found = loaded.state_dict()
        for key, value in expected.items():
            np.testing.assert_allclose(found[key].numpy(), value, rtol=1e-4, atol=2e-6, err_msg=key)
        card = (tmp_path / name / "hf" / "README.md").read_text()
        assert "as one client scored it" in card and "3, each with its own examples, over a network" in card
        assert "nyu-mll/glue" not in card  # whose examples these are not
        assert AutoTokenizer.from_pretrained(tmp_path / name / "hf").vocab_size == 5 + len(WORDS)


@pytest.mark.parametrize(
    "party, settings, words",
    [
        (
            "join",
            dict(data=dict(source="glue:SST-2")),
            r"data\.source='glue:SST-2': accepted: 'glue:TASK@DIR' with task='join'",
        ),
        (
            "serve",
            dict(finetune=dict(epochs=1.0)),
            r"finetune\.epochs=1\.0: accepted: its default, 3\.0, .* goes by federated\.rounds",
        ),
        ("serve", dict(finetune=dict(seeds=2)), r"finetune\.seeds=2: .* trains one model"),
        ("join", dict(finetune=dict(predict=True)), r"finetune\.predict=True: .* predicts no test files"),
        ("serve", dict(mlm=dict(mask_prob=0.2)), r"mlm\.mask_prob=0\.2: .* reads labelled examples"),
        ("join", dict(eval=dict(max_blocks=8)), r"eval\.max_blocks=8: "),
        (
            "serve",
            dict(model=dict(attention="cudnn")),
            r"model\.attention='cudnn': accepted: 'auto' or 'xla' in fine-tuning",
        ),
        ("serve", dict(federated=dict(strategy="fedavg")), r"federated\.strategy='fedavg': .* a strategy with a cut"),
        (
            "serve",
            dict(wire=dict(microbatches=2), model=dict(attention_dropout=0.1)),
            r"wire\.microbatches=2: accepted: 1 with dropout",
        ),
        ("join", dict(finetune=dict(holdout=1.5)), r"finetune\.holdout=1\.5: accepted: a number from 0 to below 1"),
    ],
)
def test_what_a_classifier_over_a_network_does_not_take_is_refused(party, settings, words, folder):
    settings = {"data": {"source": "glue:SST-2@somewhere"}} | settings
    with pytest.raises(ConfigError, match=words):
        make_config(
            folder,
            party,
            "SST-2",
            **{k: v for k, v in settings.items() if k != "federated"},
            federated=settings.get("federated"),
        )


def test_parties_with_other_tasks_or_other_examples_are_refused(local, folder, tmp_path):
    job = open_job(make_config(folder, "join", f"STS-B@{tmp_path}"))
    assert job.agreed == {"data.source": "glue:STS-B"} != local[0].job.agreed
    workdir = Workdir(local[0].into / "adams")
    (folder_ := tmp_path / "other").mkdir()
    write(folder_, TASKS["SST-2"], "train", Examples(["good"], None, np.array([1]), []))
    write(folder_, TASKS["SST-2"], "dev", Examples(["bad"], None, np.array([0]), []))
    job = open_job(make_config(folder, "join", f"SST-2@{folder_}"))
    with pytest.raises(ConfigError, match=r"what config key data\.source names, or the tokenizer, has changed"):
        job.read(0, "adams", workdir, QUIET)


def test_a_client_without_a_dev_set_is_told_what_else_there_is(folder, tmp_path):
    write(tmp_path, TASKS["SST-2"], "train", Examples(["good film"] * 20, None, np.ones(20, int), []))
    with pytest.raises(UserError, match=r"holds train\.tsv, but no dev\.tsv, so there is nothing to judge by"):
        open_job(make_config(folder, "join", f"SST-2@{tmp_path}")).read(0, "adams", Workdir(tmp_path), QUIET)
    job = open_job(make_config(folder, "join", f"SST-2@{tmp_path}", finetune=dict(holdout=0.25)))
    job.read(0, "adams", Workdir(tmp_path), QUIET)
    job.config = settled(job.config, 3)
    shard = job.shard(0)
    assert shard.size == 15 and sum(int((beside >= 0).sum()) for _, beside in shard.exam.questions()) == 5
    # What was kept back is no dev set, in its line and in its model's card.
    verdict = job.judge_own(np.stack([tallies.tally(job.task, np.tile([0.0, 1.0], (5, 1)), np.ones(5))]))
    assert verdict is not None and verdict.fields["scores"] == {"holdout": {"accuracy": 1.0}}
    client, server = jax.jit(job.setting(3, 3).fresh)()
    job.save(tmp_path / "hf", client, server, 2, verdict)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "accuracy on training examples that were kept back" in card and "on the dev set" not in card
