# shellcheck shell=bash
# What the launch scripts share: errors, quoting, --dry-run, the flags they all have, and a child that gets its signals.
# Sourced, never run.
# shellcheck disable=SC2034  # what is set here is read in the scripts that source it

# Empty arrays under `set -u` are right from here on; macOS ships 3.2.
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
    echo "error: bash 4.4 or newer is needed, and this is $BASH_VERSION." >&2
    exit 2
fi

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
DRY_RUN=
CONFIG=
WORKDIR=
EXTRA=() # passed on to fedbert_jax.main

# A user's mistake: one sentence, exit code 2, as fedbert_jax.main has it.
mistake() {
    echo "error: $*" >&2
    exit 2
}

note() { echo "launch: $*" >&2; }

# Prints its arguments as a shell would read them back; readable where %q is not.
quote() {
    local LC_ALL=C word out=() escaped="'\\''"
    for word; do
        case $word in
        '' | *[!A-Za-z0-9_@%+=:,./-]*) out+=("'${word//\'/"$escaped"}'") ;;
        *) out+=("$word") ;;
        esac
    done
    printf '%s' "${out[*]}"
}

# Runs a command, which is shown first; with --dry-run it is only printed.
run() {
    if [[ $DRY_RUN ]]; then
        quote "$@" && echo
        return
    fi
    echo "+ $(quote "$@")" >&2
    "$@"
}

# take_common FLAG [VALUE ...]: takes one of the flags all scripts have off the front; TAKEN says how many words it was, 0 for
# a flag that isn't one of these.
take_common() {
    TAKEN=2
    case $1 in
    --config) value_of "$@" && CONFIG=$2 ;;
    --workdir) value_of "$@" && WORKDIR=$2 ;;
    --dry-run) DRY_RUN=1 TAKEN=1 ;;
    --config.*=*) EXTRA+=("$1") TAKEN=1 ;;
    --config.*) mistake "write $1=VALUE, with an equals sign, or put it after --." ;;
    *) TAKEN=0 ;;
    esac
}

value_of() { [[ $# -ge 2 && $2 != --* ]] || mistake "$1 needs a value; see --help."; }

# split_flag FLAG ...: makes WORDS of its arguments, with a first one --name=value made two.
split_flag() {
    case $1 in
    --config.*) WORDS=("$@") ;;
    --?*=*) WORDS=("${1%%=*}" "${1#*=}" "${@:2}") ;;
    *) WORDS=("$@") ;;
    esac
}

unknown_argument() {
    case $1 in
    -*) mistake "unknown flag $1; see --help. What is for fedbert_jax.main goes after --." ;;
    *) mistake "unexpected argument '$1'; see --help." ;;
    esac
}

# Makes CONFIG an absolute path. One that isn't found from here is looked for in the repository.
find_config() {
    [[ $CONFIG ]] || mistake "no config given; accepted: --config configs/NAME.py."
    if [[ $CONFIG != /* ]]; then
        if [[ ! -f $CONFIG && -f $ROOT/$CONFIG ]]; then CONFIG=$ROOT/$CONFIG; else CONFIG=$PWD/$CONFIG; fi
    fi
    [[ -f $CONFIG ]] || mistake "config file $CONFIG does not exist."
    CONFIG=$(cd -- "$(dirname -- "$CONFIG")" && pwd -P)/$(basename -- "$CONFIG")
}

# Makes WORKDIR an absolute path.
find_workdir() {
    [[ $WORKDIR ]] || mistake "no workdir given; accepted: --workdir DIR."
    [[ $WORKDIR == /* ]] || WORKDIR=$PWD/$WORKDIR
}

# Sets PYTHON to the one that runs fedbert_jax: FEDBERT_PYTHON, or the repository's .venv.
find_venv_python() {
    PYTHON=${FEDBERT_PYTHON:-$ROOT/.venv/bin/python}
    [[ $DRY_RUN || -x $PYTHON ]] || command -v -- "$PYTHON" >/dev/null 2>&1 ||
        mistake "there is no $PYTHON: make one with 'make -C $(quote "$ROOT") .venv/.runtime', or name a Python that has the packages in FEDBERT_PYTHON."
}

# Prints a Python that fedbert_jax runs on, 3.11 to 3.13; fails if there is none.
find_base_python() {
    local name
    for name in ${PYTHON_BASE:+"$PYTHON_BASE"} python3.13 python3.12 python3.11 python3; do
        if "$name" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    return 1
}

# Makes the package importable wherever the script was called from, also by a Python it isn't installed in.
WITH_PACKAGE=(env "PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1)

SIGNALLED= # by whatever trap has run
# A rest between two looks at a child. Who expects signals looks and rests until the child has ended, and only then calls `wait`:
# bash loses the exit code, and says 255, if a trapped signal ends a `wait` in the moment in which the child ends.
rest() { (trap '' INT TERM && exec sleep 0.1) || true; } # one ended by its group's signal would be spoken of

# exit_code_of PID: sets STATUS to the exit code of a child that has ended. Traps must set SIGNALLED.
exit_code_of() {
    while :; do
        SIGNALLED=
        STATUS=0
        wait "$1" 2>/dev/null || STATUS=$?
        [[ $SIGNALLED ]] || break # otherwise it was the trap that ended the wait
    done
}

# run_child COMMAND ...: runs it in a process group of its own, so that Ctrl-C reaches this shell alone, whose traps decide what
# the child is sent; waits until it has really ended, through any number of signals. Sets STATUS. CHILD is its process id
# meanwhile. Traps must set SIGNALLED.
CHILD=
run_child() {
    set -m # gives the child its own process group, and its SIGINT back, which background jobs of scripts ignore
    "$@" </dev/null &
    CHILD=$!
    set +m
    while kill -0 "$CHILD" 2>/dev/null; do rest; done
    exit_code_of "$CHILD"
    CHILD=
}
