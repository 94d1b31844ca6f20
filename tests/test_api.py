"""What scripts and notebooks call: a run trained, stopped, gone on with, read, exported and audited from Python."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import threading
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import fedbert_jax as fb
from fedbert_jax.audit import attacks
from fedbert_jax.audit.attacks import Attack
from fedbert_jax.config import ARRANGEMENTS, CODECS, flatten, to_dict
from fedbert_jax.errors import ConfigError
from fedbert_jax.federated.wire import Channel, make_channels

CHANGES = {
    "data.tokenizer": "train:200",
    "data.seq_len": 16,
    "data.eval_fraction": 0.1,
    "model.hidden_size": 16,
    "model.num_layers": 1,
    "federated.rounds": 4,
    "federated.local_steps": 1,
    "federated.batch_size": 2,
    "eval.times": None,
    "eval.every_rounds": 2,
    "eval.max_blocks": 8,
    "checkpoint.times": None,
    "checkpoint.every_rounds": 1,
}


def documents(seed: int = 0) -> list[tuple[str, str]]:
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(list("abcdefgh"), 4)) for _ in range(120)]
    return [(client, " ".join(rng.choice(words, 40))) for client in ("north", "south") for _ in range(25)]


def begun(place: Path, **changes) -> fb.Run:
    given = CHANGES | {key.replace("__", "."): value for key, value in changes.items()}
    return fb.Run(place, "text", given, documents=iter(documents()))


@pytest.fixture(scope="module")
def heard() -> list[dict]:
    return []


@pytest.fixture(scope="module")
def run(tmp_path_factory, heard) -> fb.Run:
    """A run that a callback has ended after round 1, and that was then gone on with, to its end."""
    place = tmp_path_factory.mktemp("api") / "run"

    def stop(record: dict) -> object:
        heard.append(record)
        return fb.STOP if record["round"] == 1 else None

    first = begun(place)
    assert first.config.federated.rounds == 4 and first.round == 0 and not first.finished
    assert first.train(stop, progress=False) is False
    assert 1 <= first.round <= 2 and not first.finished  # a round more may have been under way
    again = fb.Run(place)
    assert again.train(heard.append, progress=False) is True
    return again


def test_a_callback_hears_every_round_once_as_it_is_in_the_log(run, heard):
    assert [record["round"] for record in heard] == [0, 1, 2, 3, 4]
    assert heard == [json.loads(line) for line in (run.workdir / "metrics.jsonl").read_text().splitlines()]
    assert run.finished and run.round == 4


def test_a_run_that_was_stopped_ends_as_one_that_was_not(run, tmp_path):
    whole = begun(tmp_path / "whole")
    assert whole.train(progress=False) is True
    models = [load_file(place / "hf/model.safetensors") for place in (run.workdir, whole.workdir)]
    assert models[0].keys() == models[1].keys()
    for name, values in models[0].items():
        np.testing.assert_array_equal(values, models[1][name], err_msg=name)


def test_metrics_are_tables(run, heard):
    table, clients = run.metrics(), run.clients()
    assert list(table.index) == [0, 1, 2, 3, 4] and table.index.name == "round"
    assert table["tokens"].tolist() == [n * 2 * 2 * 16 for n in range(5)]
    assert np.isnan(table["train_loss"][0]) and table["train_loss"][3] == heard[3]["train_loss"]
    assert np.isnan(table["eval_loss"][1]) and table["eval_loss"][4] == heard[4]["eval_loss"]
    assert set(clients["client"]) == {"north", "south"} and sorted(set(clients["round"])) == [0, 2, 4]
    last = clients[(clients["round"] == 4) & (clients["client"] == "south")].iloc[0]
    assert last["loss"] == heard[4]["eval_clients"]["south"]["loss"]


def test_a_checkpoint_is_evaluated_as_it_was(run, heard):
    for round in (None, 2):
        found = run.evaluate(round)
        wanted = next(r for r in heard if r["round"] == (round or 4))
        for key in ("eval_loss_by_text", "eval_loss_over_clients", "eval_accuracy"):
            assert found[key] == pytest.approx(wanted[key], rel=1e-6)
        assert found["eval_clients"].keys() == wanted["eval_clients"].keys()
    with pytest.raises(fb.UserError, match="there is no such checkpoint"):
        run.evaluate(99)
    for wrong, said in (
        (dict(blocks=0), "blocks=0: accepted: at least 1"),
        (dict(text="foo.txt"), "text='foo.txt': accepted: 'text"),
    ):
        with pytest.raises(fb.UserError, match=said):
            run.perplexity(**wrong)
    with pytest.raises(fb.UserError, match=r"^text='text:nothing"):
        run.perplexity("text:nothing.txt")


def test_parameters_are_those_of_the_export(run, tmp_path):
    found = run.parameters()
    assert all(isinstance(leaf, np.ndarray) and leaf.dtype == np.float32 for leaf in jax.tree.leaves(found))
    tensors = load_file(run.export(tmp_path / "model") / "model.safetensors")
    np.testing.assert_array_equal(
        found.client["embeddings"]["word"]["embedding"], tensors["bert.embeddings.word_embeddings.weight"]
    )
    assert jax.tree.leaves(found.server)[0].shape[0] == 1  # layers
    with pytest.raises(fb.UserError, match="there is no client of that name"):
        run.parameters(client="east")
    with pytest.raises(fb.UserError, match="is a run's workdir"):
        run.export(run.workdir)


def test_other_documents_or_no_run_are_refused(run, tmp_path):
    with pytest.raises(fb.UserError, match=r"not those that the run in .* was begun with"):
        fb.Run(run.workdir, documents=documents(1)).train(progress=False)
    with pytest.raises(fb.UserError, match="is no workdir of a run"):
        fb.Run(tmp_path / "nothing")
    with pytest.raises(fb.UserError, match="pairs of a client's name and a text"):
        fb.Run(tmp_path / "run", "text", CHANGES, documents=["text"]).train(progress=False)  # type: ignore[list-item]
    with pytest.raises(fb.UserError, match=r"documents: one of client 'north' can't be written as UTF-8"):
        fb.Run(tmp_path / "run", "text", CHANGES, documents=[("north", "\ud800")]).train(progress=False)
    with pytest.raises(fb.UserError, match="has no text"):
        fb.Run(tmp_path / "run", "text", CHANGES, documents=[("north", " ")]).train(progress=False)
    mended = fb.Run(tmp_path / "run", "text", CHANGES | {"federated.rounds": 1}, documents=documents())
    assert mended.train(progress=False) is True  # what was refused hasn't begun a run
    (tmp_path / "file").write_text("")
    with pytest.raises(fb.UserError, match="is no directory"):
        fb.Run(tmp_path / "file", "text", CHANGES, documents=documents()).train(progress=False)
    with pytest.raises(fb.UserError, match="is no workdir of a run"):
        fb.Run(tmp_path / "nothing", "demo").export(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"task='serve': accepted by Run.train: 'pretrain'"):
        fb.Run(tmp_path / "server", "serve").train(progress=False)


def test_a_run_that_was_moved_takes_its_documents_again(run, tmp_path):
    shutil.copytree(run.workdir, tmp_path / "moved")
    moved = fb.Run(tmp_path / "moved", "text", CHANGES, documents=documents())
    assert moved.train(progress=False) is True and moved.round == 4
    (tmp_path / "moved" / "documents.jsonl").unlink()
    with pytest.raises(fb.UserError, match=r"documents: accepted by the run in .*: none, as documents.jsonl is gone"):
        fb.Run(tmp_path / "moved", documents=documents()).train(progress=False)
    assert fb.Run(tmp_path / "moved").train(progress=False) is True


def test_ctrl_c_is_an_exception_once_the_round_is_saved(tmp_path):
    import signal

    run = begun(tmp_path / "run")

    def interrupt(record: dict) -> None:
        if record["round"] == 1:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run.train(interrupt, progress=False)
    assert 1 <= run.round <= 2


def test_a_thread_trains_too(tmp_path):
    """Signals are the main thread's; the callback ends it all the same, and a run that goes by epochs goes on."""
    ends: list[object] = []
    place, changes = tmp_path / "run", {key: value for key, value in CHANGES.items() if key != "federated.rounds"}
    run = fb.Run(place, "text", changes | {"federated.epochs": 0.3}, documents=documents())

    def train() -> None:
        ends.append(run.train(lambda record: fb.STOP if record["round"] == 1 else None, progress=False))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert ends == [False] and 1 <= run.round <= 2
    again = fb.Run(place)
    assert again.train(progress=False) is True and again.round == again.config.federated.rounds > 2


def test_a_config_is_read_by_name_and_changed():
    config = fb.load_config("demo", {"federated.rounds": 7, "data.partition.kind": "iid", "federated.num_clients": 3})
    assert (config.federated.rounds, config.data.partition.kind) == (7, "iid")
    others = {"federated.rounds", "data.partition.kind", "federated.num_clients"}
    demo = fb.load_config("demo")
    before, after = flatten(to_dict(demo)), flatten(to_dict(config))
    assert {key for key in before if before[key] != after[key]} == others
    epochs = fb.load_config("text", {"data.source": "text:x", "federated.rounds": 7}).federated
    assert (epochs.rounds, epochs.epochs) == (7, None)  # the last word counts, as on the command line
    with pytest.raises(ConfigError, match=r"did you mean federated\.rounds"):
        fb.load_config("demo", {"federated.roundz": 3})
    with pytest.raises(ConfigError, match=r"config file dmeo does not exist; accepted: .* one of bert_base, centralized, "):
        fb.load_config("dmeo")


def test_the_audit_is_the_commands(run):
    table = run.audit("--knows=segment", "--attacks=nearest", "--blocks=4", "--log=8")
    assert table[["knows", "attack", "of"]].values.tolist() == [["segment", "nearest", "tokens"]]
    written = run.workdir / "audit/knows=segment/attacks=nearest"
    assert table["top1"][0] == json.loads((written / "audit.json").read_text())[0]["top1"] > 0.9
    assert not (run.workdir / "audit/audit.json").exists()  # a part is not the run's audit
    with pytest.raises(fb.UserError, match=r"unrecognized arguments: --foo; `.* --help` lists the arguments"):
        run.audit("--foo")


def test_runs_side_by_side(run):
    table = fb.compare_runs([run.workdir])
    assert table["strategy"].tolist() == ["parallel"] and table["seeds"].tolist() == [[0]]
    assert fb.compare_runs(str(run.workdir)).equals(table)
    with pytest.raises(fb.UserError, match="workdirs is empty"):
        fb.compare_runs([])
    assert table["final_eval_loss"][0] == run.metrics()["eval_loss"][4] and table["final_eval_loss_sd"][0] is None


def test_a_registered_strategy_trains_resumes_and_is_compared(tmp_path):
    with mock.patch.dict(ARRANGEMENTS):
        fb.register("personal", clients="together", client="own", body="one")
        first = begun(tmp_path / "run", federated__strategy="personal", federated__max_clients_per_round=None)
        assert first.train(lambda record: fb.STOP if record["round"] == 1 else None, progress=False) is False
        assert fb.Run(tmp_path / "run").train(progress=False) is True
    table = fb.compare_runs([tmp_path / "run"])  # in a process that doesn't know it, too
    assert table["strategy"].tolist() == ["personal"]


def test_a_registered_channel_carries_activations(tmp_path):
    def halves(dtype):
        """Sends float16."""
        return Channel(
            lambda x, _: jax.tree.map(lambda a: a.astype(jnp.float16), x),
            lambda payload: jax.tree.map(lambda a: a.astype(dtype), payload),
        )

    with mock.patch.dict(CODECS):
        fb.register_channel("float16", halves)
        fb.register_channel("float16", halves)  # the same again changes nothing
        with pytest.raises(ValueError, match="there is a codec 'float16' already"):
            fb.register_channel("float16", lambda dtype: halves(dtype))
        with pytest.raises(ValueError, match="accepted: text that can be printed"):
            fb.register_channel("a\nb", halves)
        with pytest.raises(ValueError, match="accepted: a function of a dtype"):
            fb.register_channel("three", 3)
        fb.register_channel("none", lambda dtype: None)
        with pytest.raises(ConfigError, match="the codec 'none' has made None: accepted: a Channel"):
            begun(tmp_path / "none", wire__codec="none").train(progress=False)
        config = fb.load_config("demo", {"wire.codec": "float16"})
        crossed = make_channels(config.wire, jnp.float32).activations.send(jnp.float32([1.0001]), None)
        assert crossed.dtype == jnp.float16
        run = begun(tmp_path / "run", wire__codec="float16", federated__rounds=1)
        run.train(progress=False)
        facts = json.loads((run.workdir / "run.json").read_text())
        assert facts["bytes_per_round"]["up"]["activations"] == 2 * 2 * 16 * 16 * 2  # clients, rows, tokens, numbers, bytes
    with pytest.raises(ConfigError, match=r"wire.codec='float16': accepted: 'float32', 'bfloat16' or 'int8'"):
        fb.load_config("demo", {"wire.codec": "float16"})


def test_a_registered_attack_is_scored_like_the_others(run):
    def mask_everywhere(view):
        return np.full((*view.messages.h.shape[:2], 5), view.public.mask_id)

    own = list(attacks.ATTACKS)
    try:
        fb.register_attack(Attack("mask", ("known_text",), mask_everywhere))
        with pytest.raises(ValueError, match="there is an attack 'nearest' already"):
            fb.register_attack(Attack("nearest", ("segment",), mask_everywhere))
        with pytest.raises(ValueError, match="accepted: segment, old_segment"):
            fb.register_attack(Attack("other", ("everything",), mask_everywhere))
        for wrong in (3, Attack("a,b", ("seed",), mask_everywhere), Attack("x", ("seed",), mask_everywhere, of="foo")):
            with pytest.raises(ValueError, match="accepted"):
                fb.register_attack(wrong)
        out = f"--out={run.workdir.parent}/mask"
        for name, guess in (("none", lambda view: None), ("two", lambda view: mask_everywhere(view)[..., :2])):
            fb.register_attack(Attack(name, ("known_text",), guess))
            with pytest.raises(fb.UserError, match=rf"the attack '{name}' has guessed .*: accepted: .*, 5\]"):
                run.audit("--knows=known_text", f"--attacks={name}", "--blocks=4", "--log=8", out)
        table = run.audit("--knows=known_text", "--attacks=mask", "--blocks=4", "--log=8", out)
    finally:
        attacks.ATTACKS[:] = own
    assert table["attack"].tolist() == ["mask"] and table["top1"][0] < 0.05


def test_the_names_are_the_same_wherever_they_are_listed():
    from fedbert_jax import api

    stub = (Path(fb.__file__).parent / "__init__.pyi").read_text()
    assert set(fb.__all__) == {*api.__all__, "register"}
    assert set(re.findall(r"(\w+) as \1,", stub)) == set(api.__all__) and "def register(" in stub


def test_what_the_api_page_shows_says_what_its_fields_are():
    """The page shows docstrings, and no comments."""
    page = (Path(__file__).parents[1] / "docs/api.md").read_text()
    shown = re.findall(r"^::: ([\w.]+)$", page, re.MULTILINE)
    assert len(shown) > 15
    for path in shown:
        module, _, name = path.rpartition(".")
        thing = getattr(importlib.import_module(module), name)
        fields = getattr(thing, "_fields", None) or getattr(thing, "__dataclass_fields__", ())
        assert (thing.__doc__ or "").strip(), path
        for field in () if thing is fb.Config else fields:
            assert re.search(rf"\b{field}: ", thing.__doc__), f"{path}.{field}"


def test_every_public_name_is_documented():
    for name in fb.__all__:
        thing = getattr(fb, name)
        if callable(thing):
            assert thing.__doc__, name
    for name, method in vars(fb.Run).items():
        assert name.startswith("_") or (method.__doc__ or "").strip(), name
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        fb.trian  # noqa: B018
