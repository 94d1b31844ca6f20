#!/usr/bin/env bash
# One machine, all its GPUs, one process; started again if it crashes.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'HELP'
launch/gpu.sh --config FILE --workdir DIR [flags] [--config.KEY=VALUE ...] [-- ARGS FOR main ...]

Runs fedbert_jax.main on all GPUs of this machine. Makes .venv with JAX's CUDA build if there is none. A run that crashes is
started again and resumes from its last checkpoint; one that ends with 0, with your mistake (2), because it diverged (3) or
because of Ctrl-C or SIGTERM is not.

  --config FILE     a config, found from here or from the repository
  --workdir DIR     the run's directory
  --cuda 12|13      which of JAX's CUDA builds; by default 13 if driver (580) and GPUs (compute capability 7.5) allow it, else 12
  --restarts N      how often a run that crashed is started again (default 5)
  --dry-run         print the commands, run none
  --help

Ctrl-C ends the run after the round under way, with a checkpoint; a second one ends it at once. CUDA_VISIBLE_DEVICES chooses
among the GPUs. FEDBERT_PAUSE: seconds before a restart (10). PYTHON_BASE: the Python that .venv is made with.
FEDBERT_PYTHON: a Python that has everything installed, used as it is.
HELP
}

cuda='' restarts=5
while [[ $# -gt 0 ]]; do
    split_flag "$@" && set -- "${WORDS[@]}"
    take_common "$@"
    if ((TAKEN)); then
        shift "$TAKEN"
        continue
    fi
    case $1 in
    --cuda) value_of "$@" && cuda=$2 && shift 2 ;;
    --restarts) value_of "$@" && restarts=$2 && shift 2 ;;
    --help | -h) usage && exit 0 ;;
    --) shift && EXTRA+=("$@") && break ;;
    *) unknown_argument "$1" ;;
    esac
done
[[ $cuda =~ ^(12|13)?$ ]] || mistake "--cuda $cuda is not accepted: 12 or 13."
[[ $restarts =~ ^[0-9]+$ ]] || mistake "--restarts $restarts is not a number."
find_config
find_workdir

# Sets `cuda`, unless it was given, to what the driver and the oldest GPU allow.
choose_cuda() {
    local gpus driver capability
    local query=(nvidia-smi "--query-gpu=driver_version,compute_cap" "--format=csv,noheader")
    if [[ $DRY_RUN ]]; then
        run "${query[@]}"
        [[ $cuda ]] || echo '# cuda13 here if the driver and the GPUs are new enough'
        cuda=${cuda:-12}
        return
    fi
    command -v nvidia-smi >/dev/null || mistake "there is no nvidia-smi on PATH, so no NVIDIA driver: install one, or use launch/local.sh on a CPU."
    gpus=$("${query[@]}") || mistake "nvidia-smi fails (${gpus:-no output}): is the driver loaded?"
    [[ $gpus ]] || mistake "nvidia-smi lists no GPU."
    note "$(wc -l <<<"$gpus" | tr -d ' ') GPUs (driver, compute capability): $(sort <<<"$gpus" | uniq -c | tr -s ' ' | paste -sd ';' -)"
    [[ ! $cuda ]] || return 0
    if [[ -f $ROOT/.venv/.cuda12 || -f $ROOT/.venv/.cuda13 ]]; then # what was installed, stays
        cuda=12 && [[ ! -f $ROOT/.venv/.cuda13 ]] || cuda=13
        return
    fi
    cuda=13
    while IFS=', ' read -r driver capability; do
        [[ ${driver%%.*} =~ ^[0-9]+$ && ${capability/./} =~ ^[0-9]+$ ]] || mistake "nvidia-smi's answer '$driver, $capability' can't be read: give --cuda 12 or --cuda 13."
        ((${driver%%.*} >= 580 && ${capability/./} >= 75)) || cuda=12
    done <<<"$gpus"
}

# Makes .venv, and installs JAX's CUDA build into it unless it is there and up to date.
install() {
    local base stamp=$ROOT/.venv/.cuda$cuda other=$ROOT/.venv/.cuda$((25 - cuda))
    if [[ $DRY_RUN ]]; then
        echo '# unless .venv is there, with this in it'
    else
        [[ ! -f $other ]] || mistake "$ROOT/.venv has the other CUDA build, and the two don't go together: remove .venv first."
        [[ ! -f $stamp || $ROOT/pyproject.toml -nt $stamp || $ROOT/constraints.txt -nt $stamp ]] || return 0
    fi
    if [[ $DRY_RUN ]] || ! "$PYTHON" -m pip --version >/dev/null 2>&1; then
        base=${PYTHON_BASE:-python3}
        [[ $DRY_RUN ]] || base=$(find_base_python) ||
            mistake "no Python 3.11, 3.12 or 3.13 with a venv module is here: install one, or name it in PYTHON_BASE."
        run "$base" -m venv --clear "$ROOT/.venv"
    fi
    run "$PYTHON" -m pip install --quiet -c "$ROOT/constraints.txt" -e "${ROOT}[cuda$cuda]"
    run touch "$stamp"
}

find_python() {
    if [[ ${FEDBERT_PYTHON:-} ]]; then
        find_venv_python
    else
        PYTHON=$ROOT/.venv/bin/python
        install
    fi
}

choose_cuda
find_python
# Without this JAX, finding no GPU, would train on the CPU, which nobody wants to notice after a day. The CPU stays usable.
environment=("${WITH_PACKAGE[@]}" "JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}")
run "${environment[@]}" "$PYTHON" -c 'import jax; print(*jax.devices())' ||
    mistake "JAX finds no GPU (above: why); on a machine without one, launch/local.sh runs on the CPU."
command=("${environment[@]}" "$PYTHON" -m fedbert_jax.main --config "$CONFIG" --workdir "$WORKDIR" "${EXTRA[@]}")
if [[ $DRY_RUN ]]; then
    run "${command[@]}"
    echo "# again, at most $restarts times, unless it ends with 0, 2, 3, 130 or 143"
    exit 0
fi

stopped=
on_signal() {
    SIGNALLED=1 stopped=$2
    [[ ! $CHILD ]] || kill -s "$1" "$CHILD" 2>/dev/null || true
}
trap 'on_signal INT 130' INT
trap 'on_signal TERM 143' TERM

for ((tries = 0; ; tries++)); do
    echo "+ $(quote "${command[@]}")" >&2
    run_child "${command[@]}"
    case $STATUS in
    0 | 2 | 3 | 130 | 143) exit "$STATUS" ;; # 3: it diverged, and would again
    esac
    [[ ! $stopped ]] || exit "$stopped"
    ((tries < restarts)) || { note "the run ended with exit code $STATUS, and has been started again $restarts times already."; exit "$STATUS"; }
    note "the run ended with exit code $STATUS; started again in ${FEDBERT_PAUSE:-10} s ($((tries + 1)) of $restarts)"
    run_child sleep "${FEDBERT_PAUSE:-10}"
    [[ ! $stopped ]] || exit "$stopped"
done
