"""A server and clients with their workdirs: who comes back goes on, and the models are those of a run without a break."""

from __future__ import annotations

import io
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from parties import NAMES, Hall, Place, all_end_well

from fedbert_jax import export as export_command
from fedbert_jax import serve as serve_lib
from fedbert_jax.console.output import make_console
from fedbert_jax.errors import UserError
from fedbert_jax.report.runs import load_run
from fedbert_jax.workdir.log import read_metrics


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A folder where a federation has run without a break, in "whole"."""
    place, hall = Place(tmp_path_factory.mktemp("parties")), Hall()
    server = place.serve("whole", hall.listen)
    clients = [place.join("whole", name, hall.connect(name)) for name in NAMES]
    all_end_well(*clients, server)
    assert place.model("whole", NAMES[0]) == place.model("whole", NAMES[1])
    assert not (place.root / "whole" / "server" / "recorded").exists()  # nothing is recorded unless it is asked for
    return place


@pytest.mark.slow
def test_a_client_that_stops_and_starts_again_goes_on(place):
    assert "the same command goes on" in place.leave_and_return("left")
    assert place.model("left", NAMES[0]) == place.model("left", NAMES[1]) == place.model("whole", NAMES[0])
    records = read_metrics(place.root / "left" / NAMES[0] / "metrics.jsonl")  # it goes on counting its bytes, too
    assert [r["round"] for r in records] == [1, 2, 3, 4, 5, 6]
    for key in ("uplink_bytes", "downlink_bytes"):
        assert all(later[key] > sooner[key] for sooner, later in pairwise(records))


@pytest.mark.slow
def test_a_server_that_crashes_and_starts_again_goes_on_after_its_checkpoint(place, monkeypatch):
    """Clients are in a round meanwhile: what they send of it is too early for a server that has just come back."""
    assert "resuming after round 4 of 6" in place.crash_and_return("crash", 4, monkeypatch)
    assert place.model("crash", NAMES[0]) == place.model("crash", NAMES[1]) == place.model("whole", NAMES[0])


def test_a_servers_checkpoint_is_exported_as_the_model_that_clients_have(place, tmp_path, monkeypatch, capsys):
    def export(who: str, out: str, *more: str) -> None:
        run = ["export", "--workdir", str(place.root / "whole" / who), "--out", str(tmp_path / out), *more]
        monkeypatch.setattr("sys.argv", run)
        export_command.main()

    export("server", "last")
    assert (tmp_path / "last" / "model.safetensors").read_bytes() == place.model("whole", NAMES[0])
    assert "| text | own text |" in (tmp_path / "last" / "README.md").read_text()
    export("server", "earlier", "--round", "4", "--license", "mit")
    assert (tmp_path / "earlier" / "model.safetensors").read_bytes() != place.model("whole", NAMES[0])
    card = (tmp_path / "earlier" / "README.md").read_text()
    assert "license: mit" in card and "| rounds | 4, each of" in card
    assert "round 4 is in" in capsys.readouterr().out
    with pytest.raises(UserError, match="is a client's in a federation, which writes the trained model itself"):
        export(NAMES[0], "none")


def test_a_client_that_was_refused_mends_its_config_in_the_same_workdir(place):
    hall = Hall()
    server = place.serve("mended", hall.listen)
    second = place.join("mended", NAMES[1], hall.connect(NAMES[1]))
    wrong = place.join("mended", NAMES[0], hall.connect(NAMES[0]), federated__local_steps=3)
    refused = wrong.wait()
    assert isinstance(refused, UserError) and "the configs differ: federated.local_steps=3" in str(refused)
    assert not (place.root / "mended" / NAMES[0] / "config.json").exists()
    right = place.join("mended", NAMES[0], hall.connect(NAMES[0]))
    all_end_well(server, right, second)
    assert place.model("mended", NAMES[0]) == place.model("whole", NAMES[0])


def test_a_federations_roster_is_that_of_its_beginning(tmp_path):
    """Who is revoked keeps its place, which decides the others' draws; who is approved later gets none."""
    said, folder = io.StringIO(), tmp_path / "checkpoints"
    roster = SimpleNamespace(clients=("north", "west"))
    own: Any = SimpleNamespace(
        facts={"roster": ["north", "south"]}, roster_of=lambda: roster, console=make_console(file=said),
        workdir=SimpleNamespace(checkpoints=folder),
    )  # fmt: skip
    assert serve_lib.Serving._names(own) == ("north", "west") and "clients, by the roster: north, west" in said.getvalue()
    (folder / "4").mkdir(parents=True)
    assert serve_lib.Serving._names(own) == ("north", "south")
    assert "approved since training began, so not in this one: west" in said.getvalue()


def test_the_runs_numbers_are_looked_for_at_the_server(place):
    with pytest.raises(UserError, match="is a client's in a federation: the run's numbers are in its server's workdir"):
        load_run(place.root / "whole" / NAMES[0])
    assert load_run(place.root / "whole" / "server").final("eval_loss_by_text") is not None
