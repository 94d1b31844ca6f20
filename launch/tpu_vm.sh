#!/usr/bin/env bash
# A Cloud TPU VM, or a slice of several: made or reused, installed, run, and made again when it is preempted.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'HELP'
launch/tpu_vm.sh [run]  --name NAME --zone ZONE --type TYPE --version VERSION --config FILE --workdir DIR [flags]
                        [--config.KEY=VALUE ...] [-- ARGS FOR main ...]
launch/tpu_vm.sh stop   --name NAME --zone ZONE [flags]
launch/tpu_vm.sh delete --name NAME --zone ZONE [flags]

run     makes the TPU unless it is there, installs on all its workers, copies this checkout to them (tracked and untracked
        files, none that git ignores), runs fedbert_jax.main on all, shows their output, and makes everything again if the TPU is
        preempted. The run is detached: if this script is killed or loses its connections, the same command finds the run again.
stop    ends the run after the round under way, with a checkpoint; Ctrl-C during a run does the same
delete  deletes the TPU, and its disks

  --name NAME       the TPU's name
  --zone ZONE       where it is
  --project ID      by default gcloud's
  --type TYPE       accelerator type, such as v5litepod-16 (gcloud compute tpus accelerator-types list)
  --version VERSION runtime version, such as v2-alpha-tpuv5-lite (gcloud compute tpus tpu-vm versions list)
  --spot            cheaper, and may be preempted at any time
  --queued          asks for a queued resource, and waits for its turn
  --config FILE     a config in this checkout
  --workdir DIR     an absolute path on the workers. On a slice of several hosts it must be a directory they all mount. A
                    preempted TPU's own disk is lost: only a workdir on storage that outlives it (NFS, say) resumes.
  --setup COMMAND   run on every worker before each run, to mount that storage, say; it must bear being repeated
  --env NAME=VALUE  for the run, on every worker; may be repeated
  --create-flag F   passed on to gcloud's create (--create-flag=--network=NAME); may be repeated
  --connect-flag F  passed on to gcloud's ssh and scp (--connect-flag=--internal-ip); may be repeated
  --restarts N      how often a run is started again that failed on a TPU in good health (default 3); preemptions don't count
  --delete-after    delete the TPU when the run has ended, well or not, but not after Ctrl-C; a workdir on its disk goes with it
  --dry-run         print the commands, run none
  --help

Exit code: the run's. One that ends with 0, with your mistake (2), because it diverged (3) or was stopped (130, 143) is not started again.
Seconds, from the environment: FEDBERT_POLL between two looks at the TPU's state (15), FEDBERT_SETTLE from a failure to such a look
(60: a preemption shows late), FEDBERT_PAUSE before a TPU that could not be made is asked for again (60).
HELP
}

verb=run
case ${1:-} in run | stop | delete) verb=$1 && shift ;; esac
name='' zone='' project='' type='' version='' spot='' queued='' setup='' delete_after='' restarts=3
environment=() create_flags=() connect_flags=()
while [[ $# -gt 0 ]]; do
    # The values of these two are flags themselves.
    case $1 in
    --create-flag=?*) create_flags+=("${1#*=}") && shift && continue ;;
    --connect-flag=?*) connect_flags+=("${1#*=}") && shift && continue ;;
    --create-flag | --connect-flag) mistake "write $1=--FLAG, with an equals sign." ;;
    esac
    split_flag "$@" && set -- "${WORDS[@]}"
    take_common "$@"
    if ((TAKEN)); then
        shift "$TAKEN"
        continue
    fi
    case $1 in
    --name) value_of "$@" && name=$2 && shift 2 ;;
    --zone) value_of "$@" && zone=$2 && shift 2 ;;
    --project) value_of "$@" && project=$2 && shift 2 ;;
    --type) value_of "$@" && type=$2 && shift 2 ;;
    --version) value_of "$@" && version=$2 && shift 2 ;;
    --setup) value_of "$@" && setup=$2 && shift 2 ;;
    --env) value_of "$@" && environment+=("$2") && shift 2 ;;
    --restarts) value_of "$@" && restarts=$2 && shift 2 ;;
    --spot) spot=1 && shift ;;
    --queued) queued=1 && shift ;;
    --delete-after) delete_after=1 && shift ;;
    --help | -h) usage && exit 0 ;;
    --) shift && EXTRA+=("$@") && break ;;
    *) unknown_argument "$1" ;;
    esac
done
[[ $name ]] || mistake "no name given; accepted: --name NAME."
[[ $zone ]] || mistake "no zone given; accepted: --zone ZONE."
[[ $restarts =~ ^[0-9]+$ ]] || mistake "--restarts $restarts is not a number."
for pair in "${environment[@]}"; do
    [[ $pair =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || mistake "--env $pair is not NAME=VALUE."
done
if [[ $verb == run ]]; then
    [[ $type ]] || mistake "no accelerator type given; accepted: --type TYPE, such as v5litepod-16."
    [[ $version ]] || mistake "no runtime version given; accepted: --version VERSION, such as v2-alpha-tpuv5-lite."
    find_config
    [[ $CONFIG == "$ROOT"/* ]] || mistake "config file $CONFIG is not in $ROOT, which is what the workers get."
    ! git -C "$ROOT" check-ignore --quiet -- "$CONFIG" 2>/dev/null || mistake "git ignores $CONFIG, so the workers would not get it."
    [[ $WORKDIR ]] || mistake "no workdir given; accepted: --workdir DIR, an absolute path on the workers."
    [[ $WORKDIR == /* ]] || mistake "the workdir $WORKDIR is not an absolute path on the workers."
fi
[[ $DRY_RUN ]] || command -v gcloud >/dev/null || mistake "there is no gcloud on PATH: install the Google Cloud CLI."

where=("--zone=$zone")
[[ ! $project ]] || where+=("--project=$project")
tpu=(gcloud compute tpus tpu-vm)
queue=(gcloud compute tpus queued-resources)
# gcloud tries a lost connection again ten times: these make it notice the loss, and each try short.
keepalive=(--ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oServerAliveCountMax=4 --ssh-flag=-oConnectTimeout=20)

# --- the TPU ---

# Prints what `describe` says of one field; nothing if there is no such thing, "?" if nobody could be asked.
ask() {
    if "$@" 2>"$scratch/stderr"; then
        return
    elif ! grep -q NOT_FOUND "$scratch/stderr"; then
        cat "$scratch/stderr" >&2
        echo '?'
    fi
}

# Prints the TPU's state, READY among them; nothing if there is no TPU, "?" if nobody could be asked.
state() {
    local found
    if [[ $queued ]]; then
        found=$(ask "${queue[@]}" describe "$name" "${where[@]}" '--format=value(state.state)')
        if [[ $found == ACTIVE ]]; then
            found=$(ask "${tpu[@]}" describe "$name" "${where[@]}" '--format=value(state)')
            found=${found:-SUSPENDED} # its TPU is gone; it takes a moment to say so
        fi
    else
        found=$(ask "${tpu[@]}" describe "$name" "${where[@]}" '--format=value(state)')
    fi
    echo "$found"
}

create() {
    if [[ $queued ]]; then
        run "${queue[@]}" create "$name" "--node-id=$name" "${where[@]}" "--accelerator-type=$type" "--runtime-version=$version" \
            ${spot:+--spot} "${create_flags[@]}"
    else
        run "${tpu[@]}" create "$name" "${where[@]}" "--accelerator-type=$type" "--version=$version" ${spot:+--spot} "${create_flags[@]}"
    fi
}

delete() {
    if [[ $queued ]]; then
        run "${queue[@]}" delete "$name" "${where[@]}" --force --quiet
    else
        run "${tpu[@]}" delete "$name" "${where[@]}" --quiet
    fi
}

# Makes the TPU READY, whatever it is now. `proven` is set once one was made from these flags, or was there: until then a creation
# that fails is taken for a mistake in them, from then on for a lack of capacity, which passes.
proven=''
make_ready() {
    local now before=none code
    while :; do
        now=$(state)
        [[ $now == "$before" ]] || note "$name: ${now:-does not exist}"
        before=$now
        case $now in
        READY)
            proven=1
            return
            ;;
        '')
            code=0
            create || code=$?
            if ((code == 0)); then
                [[ $queued ]] || proven=1
            elif [[ $proven ]]; then
                note "$name could not be made; asked for again in ${FEDBERT_PAUSE:-60} s"
                sleep "${FEDBERT_PAUSE:-60}"
            else
                note "$name could not be made (above: why); if it is for lack of capacity, --queued waits for its turn."
                exit "$code"
            fi
            ;;
        STOPPED) run "${tpu[@]}" start "$name" "${where[@]}" || sleep "${FEDBERT_POLL:-15}" ;;
        PREEMPTED | TERMINATED | SUSPENDED | FAILED)
            if [[ $now == FAILED && ! $proven ]]; then
                note "$name could not be provided; why: $(quote "${queue[@]}" describe "$name" "${where[@]}")"
                exit 1
            fi
            delete || sleep "${FEDBERT_POLL:-15}"
            ;;
        HIDING | HIDDEN | UNHIDING)
            note "$name is $now: delete it, or take another name."
            exit 1
            ;;
        '?') # the network here is down, say, which passes, unless nothing has worked yet
            [[ $proven ]] || { note "gcloud can't say how $name is (above: why)."; exit 1; }
            sleep "${FEDBERT_POLL:-15}"
            ;;
        *) sleep "${FEDBERT_POLL:-15}" ;; # CREATING, WAITING_FOR_RESOURCES, REPAIRING, DELETING and the like
        esac
    done
}

# --- the workers ---

# on_all COMMAND: runs a shell command on all workers.
on_all() { run "${tpu[@]}" ssh "$name" "${where[@]}" --worker=all "${keepalive[@]}" "${connect_flags[@]}" "--command=$1"; }

worker='bash .fedbert_jax/tree/launch/tpu_worker.sh'

# Packs the checkout, once: a run that is started again next week has the code that it began with.
pack() {
    local files='git ls-files -z --cached --others --exclude-standard' existing command
    git -C "$ROOT" rev-parse --git-dir >/dev/null 2>&1 || # a downloaded archive
        files='find . \( -name .venv -o -name __pycache__ -o -path ./runs \) -prune -o -type f -print0'
    # What was deleted without telling git is still in git's list.
    # shellcheck disable=SC2016
    existing='xargs -0 sh -c '\''for f; do if [ -e "$f" ] || [ -L "$f" ]; then printf "%s\0" "$f"; fi; done'\'' sh'
    command="cd $(quote "$ROOT") && $files | $existing | COPYFILE_DISABLE=1 tar --null -T - -czf $(quote "$scratch/fedbert_jax.tar.gz")"
    if [[ $DRY_RUN ]]; then
        echo "($command)"
    else
        echo "+ ($command)" >&2
        bash -o pipefail -c "$command"
    fi
}

# Copies the checkout to all workers, and installs. A run that is under way keeps the code it has.
install() {
    on_all 'mkdir -p .fedbert_jax' || return
    run "${tpu[@]}" scp "$scratch/fedbert_jax.tar.gz" "$name:.fedbert_jax/tree.tar.gz" "${where[@]}" --worker=all "${connect_flags[@]}" || return
    on_all "cd .fedbert_jax && if flock -n lock true; then rm -rf tree && mkdir tree && tar -xzf tree.tar.gz -C tree; else echo 'A run is under way: its code stays as it is.'; fi && cd && $worker install"
}

# Sets `distributed` if the TPU has several hosts.
count_hosts() {
    local query=("${tpu[@]}" describe "$name" "${where[@]}" '--format=value(networkEndpoints.len())')
    local hosts
    distributed=(--distributed)
    if [[ $DRY_RUN ]]; then
        run "${query[@]}"
        return
    fi
    hosts=$(ask "${query[@]}")
    [[ $hosts =~ ^[1-9][0-9]*$ ]] || return 1
    ((hosts > 1)) || distributed=()
}

# Everything between a TPU that is READY and the run; fails if it went away in between.
prepare() {
    count_hosts || return
    if [[ $setup ]]; then on_all "$setup" || return; fi
    install
}

# Sets STATUS to how the run ended.
train() {
    local command=()
    ((${#environment[@]} == 0)) || command=(env "${environment[@]}")
    command+=(../venv/bin/python -m fedbert_jax.main "${distributed[@]}" --config "${CONFIG#"$ROOT"/}" --workdir "$WORKDIR" "${EXTRA[@]}")
    # The attempt: gcloud runs a command again whose connection was lost, which must not start the run again.
    command=(on_all "$worker run $$-$(date +%s)-$attempt $(quote "${command[@]}")")
    if [[ $DRY_RUN ]]; then
        echo '# a TPU of one host: without --distributed'
        "${command[@]}"
        return
    fi
    training=1
    run_child "${command[@]}"
    training=
}

stop() { on_all "$worker stop"; }

# --- signals ---

stopped='' training=''
on_signal() {
    SIGNALLED=1
    if [[ ! $training ]]; then
        note "interrupted; if $name exists, it costs money until '$(quote launch/tpu_vm.sh delete --name "$name" "${where[@]}" ${queued:+--queued})'."
        exit "$1"
    elif [[ ! $stopped ]]; then
        stopped=$1
        note 'the run ends after the round under way, with a checkpoint; once more leaves at once, and the run to itself'
        stop </dev/null >/dev/null || note 'the workers could not be told'
    else
        kill -s TERM -- "-$CHILD" 2>/dev/null || true
        exit "$1"
    fi
}
trap 'on_signal 130' INT
trap 'on_signal 143' TERM

# --- the verbs ---

case $verb in
stop) stop && exit ;;
delete) delete && exit ;;
esac

attempt=0 distributed=()
scratch=${TMPDIR:-/tmp}
if [[ ! $DRY_RUN ]]; then
    scratch=$(mktemp -d)
    trap 'rm -rf -- "$scratch"' EXIT
fi

pack
if [[ $DRY_RUN ]]; then
    [[ ! $queued ]] || run "${queue[@]}" describe "$name" "${where[@]}" '--format=value(state.state)'
    run "${tpu[@]}" describe "$name" "${where[@]}" '--format=value(state)'
    echo '# if it does not exist:'
    create
    echo '# if it has been preempted, this first; if that happens during the run, this, and then all but the first line again:'
    delete
    echo '# once it is READY:'
    prepare
    train
    if [[ $delete_after ]]; then delete; fi
    exit
fi

finish() {
    if [[ $delete_after && ! $stopped ]]; then
        delete || note "$name could not be deleted: it costs money until it is."
    else
        note "$name still exists, and costs money until '$(quote launch/tpu_vm.sh delete --name "$name" "${where[@]}" ${queued:+--queued})'."
    fi
    exit "$1"
}

failures=0
while :; do
    make_ready
    attempt=$((attempt + 1)) STATUS=0
    prepare || STATUS=$?
    if ((STATUS == 0)); then train; else note "preparing $name failed"; fi
    case $STATUS in
    0 | 2 | 3) finish "$STATUS" ;; # 3: it diverged, and would again
    esac
    [[ ! $stopped ]] || finish "$stopped"
    note "it ended with exit code $STATUS"
    sleep "${FEDBERT_SETTLE:-60}"
    now=$(state)
    if [[ $now == READY ]]; then # it, or the connection, failed; not the TPU
        # 130 and 143: it was asked to stop, from elsewhere.
        ((STATUS != 130 && STATUS != 143 && failures < restarts)) || finish "$STATUS"
        failures=$((failures + 1))
        note "started again on the same TPU ($failures of $restarts)"
    else
        note "$name: ${now:-does not exist}; it is made ready again, and the run goes on from its last checkpoint if $WORKDIR is still there"
    fi
done
