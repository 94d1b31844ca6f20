"""A job of NVFlare: what make_job.py writes, what a site allows, and that its components train what serve and join do.

The components run over tests/flare.py, NVFlare's classes rebuilt as far as they are used.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flare
import pytest
from parties import NAMES, Hall, Place, all_end_well

from fedbert_jax import config as config_lib
from fedbert_jax.config import Config
from fedbert_jax.errors import ConfigError, UserError

ROOT = Path(__file__).parents[1]


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "launch" / "nvflare" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_job, allow = script("make_job"), script("allow")
TEXT = "text:{WORKSPACE}/local/text"


# --- the job's files -------------------------------------------------------------------------------------------------


def make(folder: Path, *flags: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Makes a job; returns its meta data, the server's component and the clients'."""
    config = ("--config", str(ROOT / "configs" / "join.py"), "--workdir", "run")
    text = f"--config.data.source={TEXT}"
    assert make_job.main([str(folder), "--clients", "north,south", *config, text, *flags]) == 0
    read = lambda name: json.loads((folder / name).read_text())  # noqa: E731
    (workflow,) = read("app/config/config_fed_server.json")["workflows"]
    (executor,) = read("app/config/config_fed_client.json")["executors"]
    assert executor["tasks"] == ["join"]
    return read("meta.json"), workflow, executor["executor"]


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The components' module, over tests/flare.py."""
    flare.install(monkeypatch)
    monkeypatch.delitem(sys.modules, "fedbert_jax.nvflare_job", raising=False)
    module = importlib.import_module("fedbert_jax.nvflare_job")
    monkeypatch.delitem(sys.modules, "fedbert_jax.nvflare_job")
    return module


def test_a_job_is_the_config_and_no_code(tmp_path, job):
    flags = ("--config.federated.rounds=7", "--config.network.deadline=20")
    meta, server, client = make(tmp_path / "fed", *flags)
    assert meta == {
        "name": "fed", "resource_spec": {}, "min_clients": 2, "deploy_map": {"app": ["server", "north", "south"]}
    }  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "fed").rglob("*") if p.is_file()) == [
        "config_fed_client.json", "config_fed_server.json", "meta.json"
    ]  # fmt: skip
    assert server["path"] == "fedbert_jax.nvflare_job.Serve" and client["path"] == "fedbert_jax.nvflare_job.Join"
    assert server["args"]["workdir"] == client["args"]["workdir"] == "{WORKSPACE}/run"
    assert client["args"]["config"]["data.source"] == TEXT and "data.source" not in server["args"]["config"]
    # What each makes of it is what main would: but for the task, and what a party knows better.
    from fedbert_jax.config.flags import load_config, parse

    wanted = load_config(parse(["--config", str(ROOT / "configs" / "join.py"), f"--config.data.source={TEXT}", *flags]))
    joined = job.read(client["args"]["config"], {"task": "join", "network.name": "north"})
    assert joined == config_lib.replace(wanted, {"network.name": "north"})
    served = job.read(server["args"]["config"], {"task": "serve", "federated.num_clients": 2})
    given = {"task": "serve", "federated.num_clients": 2, "data.source": Config().data.source}
    assert served == config_lib.replace(wanted, given)


def test_with_a_quorum_fewer_clients_are_enough(tmp_path):
    meta, _, _ = make(tmp_path / "fed", "--config.network.quorum=1")
    assert meta["min_clients"] == 1


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--config.privacy.client_seed=7"], "privacy.client_seed: accepted in a job: None"),
        (["--config.task=pretrain"], "task='pretrain': accepted in a job: 'join'"),
        (["--clients=north,north"], "different names"),
        (["--clients=north,"], "different names"),
        (["--config.federated.round=3"], "round"),
        (["--config.data.tokenizer=train:200"], "data.tokenizer"),
    ],
)
def test_what_can_be_no_job_is_refused_in_a_sentence(tmp_path, flags, said):
    with pytest.raises(ConfigError, match=said):
        make(tmp_path / "fed", *flags)
    assert not (tmp_path / "fed").exists()


def test_a_site_allows_the_two_classes_and_keeps_its_others(tmp_path):
    local = tmp_path / "north" / "local"
    local.mkdir(parents=True)
    (local / "resources.json.default").write_text(json.dumps({"format_version": 2, "class_allow_list": ["a.B"]}))
    for _ in range(2):  # twice is once
        assert allow.main([str(tmp_path / "north")]) == 0
    found = json.loads((local / "resources.json").read_text())
    assert found == {"format_version": 2, "class_allow_list": ["a.B", *allow.CLASSES]}
    assert set(allow.CLASSES) == {f"{make_job.COMPONENTS}.{name}" for name in ("Serve", "Join")}
    with pytest.raises(UserError, match="accepted: a site's folder of NVFlare"):
        allow.main([str(tmp_path)])


# --- the components ----------------------------------------------------------------------------------------------------


class Site:
    """A site's context and engine in one, as far as a component asks them."""

    def __init__(self, cell: Any, name: str, clients: list[Any], secure: bool = True):
        self.cell, self.name, self.clients, self.secure = cell, name, clients, secure

    get_cell = lambda self: self.cell  # noqa: E731
    get_engine = lambda self: self  # noqa: E731
    get_clients = lambda self: self.clients  # noqa: E731
    get_job_id = lambda self: "job"  # noqa: E731
    get_identity_name = lambda self: self.name  # noqa: E731

    def get_prop(self, key: str) -> bool:
        return self.secure


class Known:
    """A client as the server knows it."""

    def __init__(self, name: str):
        self.name = name

    def get_fqcn(self) -> str:
        return self.name


class Run:
    """A job's processes, as threads: the server's component, and the clients' once they are asked to join."""

    def __init__(
        self, job: Any, place: Place, where: str, secure: bool = True, starting: Sequence[str] = NAMES, **changes: Any
    ):
        self.net: dict[str, Any] = {}
        self.abort, self.panics, self.codes = flare.Signal(), list[str](), dict[str, str]()
        self._threads: list[threading.Thread] = []
        self.faults: list[BaseException] = []
        clients = [Known(name) for name in NAMES]
        values = place.values(**changes)
        server = job.Serve(dict(values), str(place.root / where / "server"))
        site = Site(flare.Cell("server.job", self.net), "server", clients, secure)
        server._engine = site
        server.system_panic = self._panic
        server.cancel_task = lambda task, fl_ctx: None

        def broadcast(task: Any, fl_ctx: Any, min_responses: int) -> None:
            assert task.name == "join" and min_responses == len(NAMES)
            for name in starting:
                self._start(self._join, job, place, where, values, name, task)

        server.broadcast = broadcast
        self.server = self._start(server.control_flow, self.abort, site)

    def _panic(self, reason: str, fl_ctx: Any) -> None:
        self.panics.append(reason)
        self.abort.trigger(True)  # as NVFlare does everywhere

    def _start(self, function: Any, *args: Any) -> threading.Thread:
        def run() -> None:
            try:
                function(*args)
            except BaseException as error:
                self.faults.append(error)
                self.abort.trigger(True)
                raise

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        self._threads.append(thread)  # the server's starts others
        return thread

    def _join(self, job: Any, place: Place, where: str, values: dict[str, Any], name: str, task: Any) -> None:
        source = {"data.source": f"text:{place.root / 'text' / name}"}
        component = job.Join(values | source, str(place.root / where / name))
        site = Site(flare.Cell(f"{name}.job", self.net), name, [])
        result = component.execute(task.name, task.data, site, self.abort)
        self.codes[name] = result.get_return_code()
        heard = type("Heard", (), {"result": result, "client": Known(name)})
        task.result_received_cb(heard, site)

    def wait(self) -> None:
        for thread in self._threads:  # more of them while the first is waited for
            thread.join(900)
            assert not thread.is_alive()
        assert self.faults == []


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("job"))


@pytest.mark.slow
def test_a_job_ends_with_the_models_of_serve_and_join(job, place):
    hall = Hall()
    server = place.serve("whole", hall.listen)
    clients = [place.join("whole", name, hall.connect(name)) for name in NAMES]
    all_end_well(*clients, server)
    run = Run(job, place, "job")
    run.wait()
    assert run.codes == dict.fromkeys(NAMES, "OK") and run.panics == []
    for name in NAMES:
        assert place.model("job", name) == place.model("whole", name)


def test_a_client_that_fails_ends_the_job_with_its_sentence(job, place):
    """It doesn't come back, and the other would wait for ever."""
    (place.root / "text" / NAMES[0]).rename(place.root / "elsewhere")
    try:
        run = Run(job, place, "failed")
        run.wait()
    finally:
        (place.root / "elsewhere").rename(place.root / "text" / NAMES[0])
    (said,) = run.panics
    assert said.startswith(f"{NAMES[0]} has ended: ") and "data.source" in said
    assert run.codes[NAMES[0]] == "EXECUTION_EXCEPTION"


def test_a_client_whose_process_is_never_heard_of_ends_the_job(job, place):
    """NVFlare doesn't start it again, and doesn't tell if the site itself was started anew."""
    run = Run(job, place, "silent", starting=NAMES[:1], network__patience=5.0)
    run.wait()
    (said,) = run.panics
    assert f"{NAMES[1]} was not heard of for 5 s" in said


def test_an_aborted_job_ends_at_once(job, place):
    run = Run(job, place, "aborted", federated__rounds=10_000)
    lines = place.root / "aborted" / "server" / "metrics.jsonl"
    while run.server.is_alive() and not lines.exists():
        run.server.join(0.05)
    run.abort.trigger(True)
    run.wait()
    assert lines.exists() and run.panics == []
    assert run.panics == [] and set(run.codes.values()) <= {"TASK_ABORTED", "EXECUTION_EXCEPTION"}


def test_without_certificates_there_is_no_job(job, place):
    """Anybody could call under a client's name."""
    run = Run(job, place, "clear", secure=False)
    run.wait()
    (said,) = run.panics
    assert "without certificates" in said and not run.codes
