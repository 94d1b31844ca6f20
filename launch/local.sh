#!/usr/bin/env bash
# Fake devices on this machine's CPU, in one process or in several that talk over the loopback.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'HELP'
launch/local.sh --config FILE --workdir DIR [flags] [--config.KEY=VALUE ...] [-- ARGS FOR main ...]

Runs fedbert_jax.main on this machine's CPU as if it had several devices, to try a mesh, or a run of several hosts, without one.

  --config FILE     a config, found from here or from the repository
  --workdir DIR     the run's directory
  --devices N       devices in each process (default 1)
  --processes P     processes (default 1); each line of their output begins with the process's number
  --port PORT       where they meet, on 127.0.0.1; by default one that is free
  --dry-run         print the commands, run none
  --help

If one process fails, its exit code is this script's; the others have FEDBERT_GRACE seconds (10) to end by themselves, as many
after a SIGTERM, and then get SIGKILL. Ctrl-C ends the run after the round under way, with a checkpoint; a second one ends it at once.
FEDBERT_PYTHON: the Python to use, instead of .venv's.
HELP
}

devices=1 processes=1 port=
while [[ $# -gt 0 ]]; do
    split_flag "$@" && set -- "${WORDS[@]}"
    take_common "$@"
    if ((TAKEN)); then
        shift "$TAKEN"
        continue
    fi
    case $1 in
    --devices) value_of "$@" && devices=$2 && shift 2 ;;
    --processes) value_of "$@" && processes=$2 && shift 2 ;;
    --port) value_of "$@" && port=$2 && shift 2 ;;
    --help | -h) usage && exit 0 ;;
    --) shift && EXTRA+=("$@") && break ;;
    *) unknown_argument "$1" ;;
    esac
done
[[ $devices =~ ^[1-9][0-9]*$ ]] || mistake "--devices $devices is not a number of devices."
[[ $processes =~ ^[1-9][0-9]*$ ]] || mistake "--processes $processes is not a number of processes."
[[ $port =~ ^[0-9]*$ ]] || mistake "--port $port is not a port."
find_config
find_workdir
find_venv_python

# Flags that are set already stay; of two that say the same, XLA takes the last.
environment=("${WITH_PACKAGE[@]}" JAX_PLATFORMS=cpu "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices")
main=("$PYTHON" -m fedbert_jax.main --config "$CONFIG" --workdir "$WORKDIR")

# Sets `port` to one where nobody listens, below the range that systems hand out by themselves.
choose_port() {
    while :; do
        port=$((20000 + RANDOM % 10000))
        (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || return 0
    done
}

if ((processes == 1)); then
    main=("${environment[@]}" "${main[@]}" "${EXTRA[@]}")
    if [[ $DRY_RUN ]]; then run "${main[@]}" && exit; fi
    exec "${main[@]}"
fi
[[ $port ]] || choose_port

# one PROCESS: runs it, each line of its output with its number in front. The shell between and the reader outlive the signals
# that their process group gets, so that what the process says last is read, and its exit code is.
one() {
    trap : INT TERM
    "${environment[@]}" "${main[@]}" --distributed --coordinator "127.0.0.1:$port" --processes "$processes" --process "$1" \
        "${EXTRA[@]}" 2>&1 | {
        trap '' INT TERM
        while IFS= read -r line || [[ $line ]]; do printf '[%s] %s\n' "$1" "$line"; done
    }
}

if [[ $DRY_RUN ]]; then
    for ((i = 0; i < processes; i++)); do
        printf '%s &\n' "$(run "${environment[@]}" "${main[@]}" --distributed --coordinator "127.0.0.1:$port" \
            --processes "$processes" --process "$i" "${EXTRA[@]}")"
    done
    echo wait
    exit 0
fi

pids=() status=0 stopping='' killer=''

# Sends a signal to every process group that is left.
signal_all() {
    local pid
    for pid in "${pids[@]}"; do kill -s "$1" -- "-$pid" 2>/dev/null || true; done
}
trap 'SIGNALLED=1 stopping=130; signal_all INT' INT
trap 'SIGNALLED=1 stopping=143; signal_all TERM' TERM

for ((i = 0; i < processes; i++)); do
    set -m # a process group each: Ctrl-C reaches this shell alone, which passes it on
    one "$i" </dev/null &
    pids+=($!)
    set +m
done
note "$processes processes of $devices devices each, on 127.0.0.1:$port"

while ((${#pids[@]})); do
    rest
    running=()
    for pid in "${pids[@]}"; do
        if kill -0 "$pid" 2>/dev/null; then
            running+=("$pid")
            continue
        fi
        exit_code_of "$pid"
        code=$STATUS
        ((code == 0 || status != 0)) || status=$code
        # 130 and 143: it was asked to stop, and the others stop after the same round.
        if ((code != 0 && code != 130 && code != 143)) && [[ ! $killer && ! $stopping ]]; then
            note "a process ended with exit code $code; the others have to end, too"
            killer=begun
        fi
    done
    pids=("${running[@]}")
    if [[ $killer == begun ]] && ((${#pids[@]})); then
        (
            sleep "${FEDBERT_GRACE:-10}"
            signal_all TERM
            sleep "${FEDBERT_GRACE:-10}"
            signal_all KILL
        ) >/dev/null 2>&1 &
        killer=$!
    fi
done
[[ ! $killer || $killer == begun ]] || kill "$killer" 2>/dev/null || true
exit "$status"
