"""Whole parties under blinded averaging: the model is that of plain averaging; who comes back goes on from a snapshot."""

from __future__ import annotations

import copy
from pathlib import Path

import jax
import numpy as np
import pytest
from parties import NAMES, Hall, Place, all_end_well
from safetensors.numpy import load_file

from fedbert_jax import export as export_command
from fedbert_jax.errors import ConfigError, UserError
from fedbert_jax.finished import find_checkpoint
from fedbert_jax.jobs import open_job
from fedbert_jax.jobs.engine import engine_of, restored
from fedbert_jax.workdir.log import read_metrics
from fedbert_jax.workdir.paths import Workdir

SECRET = 2**80 + 23
SETTINGS = dict(federated__client_optimizer_state="reset", federated__rounds=4)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A folder where a federation has run without a break, in "whole"."""
    place = Place(tmp_path_factory.mktemp("parties"), SECRET, privacy__averaging="blinded", **SETTINGS)
    run(place, "whole")
    assert place.model("whole", NAMES[0]) == place.model("whole", NAMES[1])
    return place


def run(place: Place, where: str) -> None:
    hall = Hall()
    server = place.serve(where, hall.listen)
    clients = [place.join(where, name, hall.connect(name)) for name in NAMES]
    all_end_well(*clients, server)


@pytest.mark.slow
def test_the_model_is_that_of_plain_averaging(place):
    plain = copy.copy(place)
    plain.changes = SETTINGS
    run(plain, "plain")
    found, wanted = (load_file(place.root / where / NAMES[0] / "hf" / "model.safetensors") for where in ("whole", "plain"))
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-3, atol=1e-5, err_msg=name)
    lines = [read_metrics(place.root / where / "server" / "metrics.jsonl") for where in ("whole", "plain")]
    for blinded, other in zip(*lines, strict=True):
        np.testing.assert_allclose(blinded["train_loss"], other["train_loss"], rtol=1e-5)
    # No file of any party's says the clients' secret, but the configs in which it was given.
    for path in (p for p in (place.root / "whole").rglob("*") if p.is_file() and p.name != "config.json"):
        assert str(SECRET).encode() not in path.read_bytes(), path
    # What the server has saved (compressed: it is restored here) holds the body alone; of plain averaging, the table, too.
    table = found["bert.embeddings.word_embeddings.weight"]
    body = found["bert.encoder.layer.0.attention.output.dense.weight"].T
    blinded, other = (saved(place.root / where / "server") for where in ("whole", "plain"))
    assert np.ascontiguousarray(body[3]).tobytes() in blinded
    wanted_table = wanted["bert.embeddings.word_embeddings.weight"]
    assert all(row.tobytes() in other for row in wanted_table[::16])
    assert not any(row.tobytes() in blinded for row in (*table[::16], *wanted_table[::16]))


def saved(root: Path) -> bytes:
    """All numbers of a server's newest checkpoint."""
    checkpoints, round = find_checkpoint(root, None)
    config = Workdir(root).read_config()
    state = restored(engine_of(open_job(config), NAMES, len(NAMES)), checkpoints, round, config)
    return b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(state))


@pytest.mark.slow
def test_a_client_that_stops_and_starts_again_goes_on(place):
    place.leave_and_return("left")
    assert place.model("left", NAMES[0]) == place.model("left", NAMES[1]) == place.model("whole", NAMES[0])


@pytest.mark.slow
def test_a_server_that_crashes_goes_on_after_its_checkpoint(place, monkeypatch):
    """The clients, who are further, go back to the segment that one of them has sealed for that round."""
    assert "resuming after round 2 of 4" in place.crash_and_return("crash", 2, monkeypatch)
    assert place.model("crash", NAMES[0]) == place.model("crash", NAMES[1]) == place.model("whole", NAMES[0])


def test_clients_with_different_secrets_do_not_train_together(place):
    """Whoever joins second is refused."""
    hall = Hall()
    server = place.serve("other", hall.listen)
    seeds = zip(NAMES, (SECRET, SECRET + 1), strict=True)
    clients = [place.join("other", name, hall.connect(name), privacy__client_seed=seed) for name, seed in seeds]
    while all(client.is_alive() for client in clients):
        clients[0].join(0.05)
    for party in (server, *clients):
        party.interrupt()
    ended = [str(client.wait()) for client in clients]
    assert sum("privacy.client_seed differs from the other clients'" in said for said in ended) == 1, ended
    server.wait()
    assert read_metrics(place.root / "other" / "server" / "metrics.jsonl") == []


def test_a_client_needs_a_secret_that_the_server_lacks(place):
    for seed in (None, 0, 2**64 - 1):
        with pytest.raises(
            ConfigError, match=rf"privacy.client_seed={seed}: accepted: a random integer of at least 2\*\*64"
        ):
            place.config(task="join", data__source="text:x", privacy__client_seed=seed)
    with pytest.raises(ConfigError, match="client_optimizer_state='average': accepted: 'reset' or 'keep'"):
        place.config(
            task="join", data__source="text:x", privacy__client_seed=SECRET, federated__client_optimizer_state="average"
        )


def test_a_server_that_never_had_the_segment_has_no_model_to_export(place, tmp_path, monkeypatch):
    run = ["export", "--workdir", str(place.root / "whole" / "server"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", run)
    with pytest.raises(UserError, match="never had the clients' segment"):
        export_command.main()
    assert not (tmp_path / "out").exists()
