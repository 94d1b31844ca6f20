#!/usr/bin/env bash
# What launch/tpu_vm.sh runs on each worker of a TPU: the installation, and the run, detached from the connection, so that a lost
# connection loses the view of a run and not the run.
#
#   tpu_worker.sh install                 packages into venv/, once for each requirements-tpu.txt and constraints.txt
#   tpu_worker.sh run ATTEMPT COMMAND ... starts the command, or follows it if it is already there; its log, its exit code
#   tpu_worker.sh stop                    SIGTERM to the command
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
home=$(dirname -- "$ROOT") # ~/.fedbert_jax: tree/ (the code), venv/, and the files below

install() {
    local base
    if cmp -s "$ROOT/requirements-tpu.txt" "$home/venv/requirements" && cmp -s "$ROOT/constraints.txt" "$home/venv/constraints"; then
        return
    fi
    if ! "$home/venv/bin/python" -m pip --version >/dev/null 2>&1; then
        if base=$(find_base_python); then
            "$base" -m venv --clear "$home/venv"
        else # the TPU images' own Python is 3.10: uv brings another, without root and without apt
            note "no Python 3.11 to 3.13 on $(hostname): uv fetches one"
            python3 -m pip install --quiet --user uv
            python3 -m uv venv --quiet --seed --clear --python 3.12 "$home/venv"
        fi
    fi
    "$home/venv/bin/python" -m pip install --quiet -c "$ROOT/constraints.txt" -r "$ROOT/requirements-tpu.txt"
    cp -- "$ROOT/requirements-tpu.txt" "$home/venv/requirements"
    cp -- "$ROOT/constraints.txt" "$home/venv/constraints"
}

# Whoever supervises a command holds the lock as long as the command runs, and no longer, however it ends.
under_way() { ! flock -n "$home/lock" true; }

# start_or_follow ATTEMPT COMMAND ...
start_or_follow() {
    local attempt=$1 command lines=+1
    shift
    command=$(quote "$@")
    cd -- "$ROOT"
    if under_way; then
        [[ $command == "$(cat "$home/command")" ]] ||
            mistake "$(hostname): another run is under way ($(cat "$home/command")); end it with launch/tpu_vm.sh stop."
        echo "$attempt" >"$home/attempt"
        note "$(hostname): the run is under way; this follows it"
        lines=20
    elif [[ $attempt == "$(cat "$home/attempt" 2>/dev/null)" ]]; then
        exit "$(cat "$home/exit_code" 2>/dev/null || echo 1)" # it ended while the connection was lost
    else
        rm -f "$home/exit_code" "$home/pid"
        echo "$attempt" >"$home/attempt"
        echo "$command" >"$home/command"
        [[ ! -f $home/log ]] || mv -- "$home/log" "$home/log.previous"
        : >"$home/log"
        setsid bash "$ROOT/launch/tpu_worker.sh" supervise "$@" </dev/null >>"$home/log" 2>&1 &
        until [[ -s $home/pid ]] || ! kill -0 $! 2>/dev/null; do sleep 0.05; done
    fi
    # --pid: until the supervisor has ended, and with it everything it will write.
    tail -n "$lines" -s 0.1 -f --pid="$(cut -d ' ' -f 1 "$home/pid")" "$home/log"
    exit "$(cat "$home/exit_code" 2>/dev/null || echo 1)"
}

supervise() {
    local code=0 child
    exec 9>>"$home/lock"
    flock -w 10 9
    PYTHONUNBUFFERED=1 "$@" 9>&- &
    child=$!
    echo "$$ $child" >"$home/pid.new"
    mv -- "$home/pid.new" "$home/pid"
    wait "$child" || code=$?
    echo "$code" >"$home/exit_code.new"
    mv -- "$home/exit_code.new" "$home/exit_code"
}

stop() {
    if under_way; then
        kill -s TERM "$(cut -d ' ' -f 2 "$home/pid")"
    else
        note "$(hostname): no run is under way"
    fi
}

case $1 in
install) install ;;
run) shift && start_or_follow "$@" ;;
supervise) shift && supervise "$@" ;;
stop) stop ;;
*) mistake "tpu_worker.sh has no '$1'." ;;
esac
