"""The table of strategies: what it accepts, who asks it, and rows registered from outside the package."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from corpus import command, run, write_corpus
from tiny import assert_trees_close, make_simulation, tiny_config

import fedbert_jax
from fedbert_jax.config import ARRANGEMENTS, Arrangement, from_dict, strategy_title
from fedbert_jax.config.files import load_config
from fedbert_jax.data.streams import Seeds, seeds_of
from fedbert_jax.errors import ConfigError
from fedbert_jax.federated.holding import holding

PACKAGE = Path(fedbert_jax.__file__).parent


NAMES = {part for key in ARRANGEMENTS for part in key}
ROWS = ("how", "arrangement")  # what a row is called
WORDS = {"parameters", "gradients", "pooled"}  # of other things, too, as keys of tables


def compared_names(text: str) -> list[int]:
    """The lines of a program that compare, match or look up with the name of a strategy, a body or what is averaged."""

    def named(*nodes: ast.AST | None, words: frozenset[str] | set[str] = frozenset()) -> bool:
        inner = [x for node in nodes if node is not None for x in ast.walk(node)]
        return any(isinstance(x, ast.Constant) and x.value in NAMES - words for x in inner)

    def asks_a_row(x: ast.AST) -> bool:  # its `clients`, `client` or `body` has values of the table's
        of = getattr(x, "value", None)
        its = getattr(of, "attr", getattr(of, "id", ""))
        return isinstance(x, ast.Attribute) and (x.attr in ("clients", "client") or (x.attr == "body" and its in ROWS))

    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            fields = any(isinstance(x, ast.Attribute) and x.attr in ("strategy", "average") for x in sides)
            constant = any(isinstance(x, ast.Constant) for x in sides)
            if (named(*sides) or (fields and constant)) and not any(map(asks_a_row, sides)):
                found.append(node.lineno)
        elif isinstance(node, ast.MatchValue) and named(node.value):
            found.append(node.value.lineno)
        elif (isinstance(node, ast.Dict) and named(*node.keys, words=WORDS)) or (
            isinstance(node, ast.Subscript) and getattr(node.value, "id", "") != "Literal" and named(node.slice)
        ):
            found.append(node.lineno)
    return found


def test_no_strategy_is_compared_by_its_name():
    """A name appears only in the table, as a default, or in words: no code compares with one, or looks up by one."""
    found = [
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "arrangement.py"
        for line in compared_names(path.read_text())
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line, found",
    [
        ('f.strategy == "local" or x', True),
        ('f.strategy in ("mine", "parallel")', True),
        ('f.average == "gradients"', True),
        ('{"sequential": 1}.get(f.strategy)', True),
        ('table["sequential"]', True),
        ('f.strategy == "sequential" and how.clients == "in turn"', True),
        ('f.body != "pooled"', True),
        ('match f.strategy:\n    case "fedavg":\n        pass', True),
        ('how.clients == "pooled" and f.arrangement.body == "one"', False),
        ('{"together": a, "pooled": b}[how.clients]', False),
        ('body: Literal["pooled", "merged"] = "pooled"', False),
    ],
)
def test_what_compares_names_is_found(line, found):
    assert bool(compared_names(line)) == found


@pytest.mark.parametrize(
    "federated",
    [
        dict(strategy="paralel"),
        dict(strategy="fedavg", body="merged"),
        dict(strategy="sequential", average="gradients"),
        dict(body="private", average="gradients"),
    ],
)
def test_a_combination_without_a_row_is_refused_and_the_rows_are_listed(federated):
    with pytest.raises(ConfigError) as refused:
        tiny_config(federated=federated)
    said = str(refused.value)
    for key, value in federated.items():
        assert f"federated.{key}={value!r}" in said
    assert "'parallel' with average='gradients'" in said and "'parallel' with body='merged'" in said and "\n" not in said
    assert all(f"'{name}'" in said for name, *_ in ARRANGEMENTS)


@pytest.mark.parametrize(
    "changes, key",
    [
        (dict(federated=dict(strategy="local", clients_at_once=2)), "federated.clients_at_once"),
        (dict(federated=dict(strategy="centralized", clients_at_once=2)), "federated.clients_at_once"),
        (dict(federated=dict(strategy="sequential", clients_at_once=2)), "federated.clients_at_once"),
        (dict(federated=dict(strategy="centralized", client_optimizer_state="reset")), "client_optimizer_state"),
        (dict(federated=dict(average="gradients", client_optimizer_state="keep")), "client_optimizer_state"),
        (dict(federated=dict(average="gradients"), aggregator=dict(momentum=0.9)), "aggregator.momentum=0.9"),
        (dict(federated=dict(strategy="fedavg"), wire=dict(codec="bfloat16")), "wire.codec='bfloat16'"),
        (dict(wire=dict(gradient_codec="int8")), "wire.gradient_codec"),
        (dict(federated=dict(batch_by="size")), "federated.batch_by"),
        (dict(federated=dict(average="gradients", batch_by="size", clients_per_round=2)), "federated.batch_by"),
        (dict(federated=dict(average="gradients", batch_by="size", clients_at_once=2)), "federated.batch_by"),
        (dict(federated=dict(average="gradients", batch_by="size"), wire=dict(gradient_codec="int8")), "federated.batch_by"),
        (dict(federated=dict(average="gradients", batch_by="size"), wire=dict(gradient_clip=1.0)), "federated.batch_by"),
        (dict(federated=dict(average="gradients", batch_by="size"), wire=dict(gradient_noise=0.1)), "federated.batch_by"),
        (
            dict(federated=dict(average="gradients", batch_by="size"), privacy=dict(averaging="blinded")),
            "federated.batch_by",
        ),
        (dict(federated=dict(order="fixed")), "federated.order"),
        (dict(data=dict(seq_len=2**16), model=dict(max_position_embeddings=2**16)), "data.seq_len"),
        (dict(federated=dict(strategy="sequential"), privacy=dict(averaging="blinded")), "privacy.averaging"),
        (dict(federated=dict(strategy="local", clients_per_round=2)), "federated.clients_per_round"),
        (dict(model=dict(client_layers=2)), "model.client_layers"),
        (dict(wire=dict(noise=-1.0)), "wire.noise"),
        (dict(wire=dict(clip=0.0)), "wire.clip"),
    ],
)
def test_what_a_row_does_not_take_is_refused(changes, key):
    with pytest.raises(ConfigError, match=re.escape(key)) as refused:
        tiny_config(**changes)
    assert "accepted" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "row",
    [
        dict(clients="together", client="copies", body="copies"),
        dict(clients="pooled", client="own", body="one"),
        dict(clients="apart", client="one", body="own"),
        dict(clients="in turn", client="copies", body="one"),
        dict(clients="alone", client="own", body="own"),
        dict(clients="together", client="own", body="one", cut=False),
    ],
)
def test_a_row_that_no_round_goes_by_is_refused(row):
    with pytest.raises(ValueError, match="accepted"):
        Arrangement(**row)


@pytest.fixture
def registered():
    before = dict(ARRANGEMENTS)
    yield
    ARRANGEMENTS.clear()
    ARRANGEMENTS.update(before)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    "row",
    [
        dict(clients="together", client="own", body="one"),
        dict(clients="apart", client="own", body="copies"),
        dict(clients="in turn", client="own", body="one"),
    ],
    ids=str,
)
def test_a_registered_strategy_trains(row):
    """Segments that each client keeps for good, against a shared, an averaged and a handed-on body."""
    fedbert_jax.register("mine", **row)
    for nameless in ("", " x", "x\ny", 3):
        with pytest.raises(ValueError, match="accepted: text that can be printed"):
            fedbert_jax.register(nameless, **row)
    config = tiny_config(federated=dict(strategy="mine", local_steps=1))
    assert config.federated.arrangement.averages == ("copies" in row.values())
    with pytest.raises(ValueError, match="there is a strategy 'mine' already"):
        fedbert_jax.register("mine", clients="pooled", client="one", body="one")
    simulation = make_simulation(config)
    state = simulation.init_state()
    before = [simulation.model_of(state, c) for c in range(3)]
    losses = []
    for n in range(2):
        state, metrics = simulation.run_round(state, n)
        losses.append(float(metrics.loss))
    scores = simulation.evaluate(state)
    models = [simulation.model_of(state, c) for c in range(3)]
    simulation.close()
    assert np.isfinite(losses).all() and len(scores.clients) == 3
    bias = [np.asarray(m.client["head"]["bias"]) for m in models]
    assert not np.allclose(bias[0], bias[1]) and not np.allclose(bias[0], before[0].client["head"]["bias"])
    assert_trees_close(models[0].server, models[1].server)
    assert "segment" not in simulation.traffic() and "activations" in simulation.traffic()


@pytest.mark.usefixtures("registered")
def test_a_segment_of_ones_own_keeps_its_optimizer_whatever_happens_to_those_handed_on():
    fedbert_jax.register("mine", clients="in turn", client="own", body="one")
    how = ARRANGEMENTS["mine", "pooled", "parameters"]
    assert holding(how, "reset").opt.client == holding(how, "average").opt.client == "own"
    assert holding(ARRANGEMENTS["sequential", "pooled", "parameters"], "reset").opt.client == "none"
    with pytest.raises(ConfigError, match=r"client_optimizer_state='reset': accepted: 'average' with .* hands none on"):
        tiny_config(federated=dict(strategy="mine", client_optimizer_state="reset"))


def test_clients_that_take_turns_find_their_own_moments_whoever_takes_part():
    config = tiny_config(federated=dict(strategy="sequential", client_optimizer_state="keep", clients_per_round=2))
    simulation = make_simulation(config)
    state, cohorts = simulation.init_state(), [tuple(simulation.feed.cohort_of(n)) for n in range(6)]
    assert len({frozenset(cohort) for cohort in cohorts}) > 1 and {len(cohort) for cohort in cohorts} == {2}
    for n, cohort in enumerate(cohorts):
        before = np.array(jax.tree.leaves(state.opt.client)[-1])
        state, _ = simulation.run_round(state, n)
        moved = [not np.array_equal(a, b) for a, b in zip(before, jax.tree.leaves(state.opt.client)[-1], strict=True)]
        assert np.flatnonzero(moved).tolist() == sorted(cohort)


@pytest.mark.usefixtures("registered")
def test_a_server_with_a_body_a_client_keeps_no_optimizer_state_of_each():
    values = dict(task="serve", data=dict(source="text:x", tokenizer="x"))
    for state in ("average", "reset"):
        from_dict(values | dict(federated=dict(num_clients=3, body="merged", client_optimizer_state=state)))
    with pytest.raises(ConfigError, match=r"state='keep': accepted: 'average' or 'reset' with task='serve'"):
        from_dict(values | dict(federated=dict(num_clients=3, body="merged", client_optimizer_state="keep")))


def test_bodies_averaged_at_the_server_are_nothing_that_clients_send_under_pads():
    fedbert_jax.register("mine", clients="apart", client="own", body="copies")
    with pytest.raises(
        ConfigError, match=r"privacy\.averaging='blinded': accepted: 'plain' with federated\.strategy='mine'"
    ):
        tiny_config(federated=dict(strategy="mine", client_optimizer_state="reset"), privacy=dict(averaging="blinded"))


def test_numpy_scalars_are_the_numbers_that_they_hold():
    config = tiny_config(
        federated=dict(local_steps=np.int64(3)), wire=dict(clip=np.float32(2.0)), mlm=dict(whole_word=np.bool_(True))
    )
    values = (config.federated.local_steps, config.wire.clip, config.mlm.whole_word)
    assert values == (3, 2.0, True) and [*map(type, values)] == [int, float, bool]
    with pytest.raises(ConfigError, match=r"federated\.local_steps=2\.5 is float; accepted: an integer"):
        tiny_config(federated=dict(local_steps=np.float64(2.5)))
    with pytest.raises(ConfigError, match="config key 1 does not exist"):
        load_config("demo", {1: 2})  # type: ignore[dict-item]


def test_titles_say_which_row_where_a_strategy_has_several():
    assert strategy_title("parallel", "merged", "parameters") == "parallel (merged body)"
    assert strategy_title("parallel", "pooled", "gradients") == "parallel (gradients averaged)"
    assert strategy_title("sequential", "pooled", "parameters") == "sequential"


def test_rows_by_size_are_centralized_training_across_the_cut():
    """Both draw from one stream of all blocks: the same batches and so, up to rounding, the same run."""
    ends = []
    for federated in (dict(strategy="centralized"), dict(average="gradients", batch_by="size")):
        simulation = make_simulation(tiny_config(federated=federated, model=dict(hidden_dropout=0.1)))
        state = simulation.init_state()
        for n in range(3):
            state, metrics = simulation.run_round(state, n)
        ends.append((state.model, metrics[:3]))
        assert bool(simulation.traffic()) == (len(ends) == 2)
        simulation.close()
    assert_trees_close(*ends)


def test_a_checkpoints_depth_decides_how_deep_the_cut_may_be():
    """A checkpoint's sizes are known only later, and are not the preset's."""
    deep = dict(init_from="/a/checkpoint", client_layers=9)
    assert from_dict(dict(model=deep, data=dict(tokenizer=""))).model.client_layers == 9
    with pytest.raises(ConfigError, match=r"client_layers=9: accepted: an integer from 0 to below model\.num_layers=9"):
        from_dict(dict(model=dict(num_layers=9, vocab_size=99, **deep), data=dict(tokenizer="")))


@pytest.mark.parametrize(
    "federated, wire, key",
    [
        (dict(num_clients=3, clients_at_once=2), {}, "federated.clients_at_once"),
        (dict(num_clients=3, average="gradients"), dict(gradient_codec="int8"), "wire.gradient_codec"),
        (dict(num_clients=3, average="gradients", batch_by="size"), {}, "federated.batch_by"),
    ],
)
def test_what_fine_tuning_does_not_take_is_refused(federated, wire, key):
    data = dict(source="glue:SST-2@x", tokenizer="x", partition=dict(kind="iid"))
    with pytest.raises(ConfigError, match=re.escape(key)):
        from_dict(dict(task="finetune", data=data, federated=federated, wire=wire))


def test_each_party_draws_from_its_own_secret():
    """Invariant 10: the server's draws stay when the clients' secret changes, and the reverse."""
    config = lambda **changes: tiny_config(  # noqa: E731
        federated=dict(num_clients=8, clients_per_round=3), model=dict(hidden_dropout=0.5), **changes
    )
    assert seeds_of(config(seed=3)) == Seeds(3, 3)
    assert seeds_of(config(seed=3, privacy=dict(client_seed=7))) == Seeds(3, 7)
    seen = []
    for changes in (dict(seed=3), dict(seed=3, privacy=dict(client_seed=7)), dict(seed=4, privacy=dict(client_seed=3))):
        simulation = make_simulation(config(**changes), clients=8)
        state = simulation.init_state()
        rows = np.asarray(simulation.feed.draw(0).rows)
        _, keys = simulation.setting.draw(rows[0], 0, 0, np.arange(3))
        data = lambda key: np.asarray(jax.random.key_data(key))  # noqa: E731
        word = state.model.client["embeddings"]["word"]["embedding"]
        body = state.model.server["layers"]["up"]["kernel"]
        batch, _ = simulation.setting.draw(np.asarray(cohort_rows(simulation)), 0, 0, np.arange(3))
        cohorts = np.array([simulation.feed.cohort_of(n) for n in range(6)])
        seen.append(
            dict(
                server=[body, data(keys.server), cohorts],
                client=[word, data(keys.client), np.asarray(batch.positions)],
            )
        )
        simulation.close()
    base, other_client, other_server = seen
    for same, changed, other in (("server", "client", other_client), ("client", "server", other_server)):
        assert all(np.array_equal(a, b) for a, b in zip(base[same], other[same], strict=True))
        assert not any(np.array_equal(a, b) for a, b in zip(base[changed], other[changed], strict=True))


def cohort_rows(simulation):
    """The same rows whoever is drawn, so that what is masked depends on the secret alone."""
    return simulation.train.tokens[:6].reshape(3, 2, -1).astype(np.int32)


@pytest.mark.slow
def test_the_documented_strategy_runs_as_it_stands(tmp_path):
    """Runs the example of docs/strategies.md by the command, in a process of its own."""
    page = (PACKAGE.parent / "docs" / "strategies.md").read_text()
    example = page.split("```python\n")[1].split("```")[0]
    assert example.count("\n") < 30
    own = write_corpus(tmp_path)
    # The example's own settings, on the tests' text and at their size.
    small = own.read_text().replace("def get_config", "def small")
    (tmp_path / "personal.py").write_text(
        example.replace("config = default_config()", "config = small()") + small.split('"""', 2)[2]
    )
    done = run(*command(tmp_path / "personal.py", tmp_path / "w", "federated.rounds=2"))
    assert done.returncode == 0, done.stderr
    assert "personal: 3 of 3 clients a round" in done.stdout
    again = run(*command(own, tmp_path / "w2", "federated.strategy=personal"))
    assert again.returncode == 2 and "federated.strategy='personal'" in again.stderr
