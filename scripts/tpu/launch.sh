#!/usr/bin/env bash
# Trains on a Cloud TPU: creates the slice (or several), installs, starts every worker, follows, resumes, tears down.
#   bash scripts/tpu/launch.sh COMMAND --name=NAME --zone=ZONE --accelerator=v5p-128 [options] [-- arguments of t5x_like train]
# COMMAND: create | wait | install | start | logs | status | stop | delete | babysit (all of it, and again after preemption).
# docs/launch.md explains each. --dry_run prints the gcloud commands and runs none.
set -euo pipefail

usage() { sed -n '2,5p' "${BASH_SOURCE[0]}" | cut -c 3-; }
fail() { echo "error: $*" >&2; exit 2; }

command=${1:-help}
[ $# -gt 0 ] && shift
name='' zone='' project='' accelerator='' runtime='' num_slices=1 capacity=on-demand max_retries=20 poll_seconds=60 max_unreachable=10 dry_run=
while [ $# -gt 0 ]; do
    case $1 in
        --name=*) name=${1#*=} ;;
        --zone=*) zone=${1#*=} ;;
        --project=*) project=${1#*=} ;;
        --accelerator=*) accelerator=${1#*=} ;;
        --runtime=*) runtime=${1#*=} ;;
        --num_slices=*) num_slices=${1#*=} ;;
        --capacity=*) capacity=${1#*=} ;;
        --max_retries=*) max_retries=${1#*=} ;;
        --poll_seconds=*) poll_seconds=${1#*=} ;;
        --dry_run) dry_run=1 ;;
        --) shift; break ;;
        *) fail "there is no option $1; arguments of t5x_like train come after --" ;;
    esac
    shift
done
train_arguments=("$@")

# Prints a command as it could be typed, and runs it unless only asked to show it.
run() {
    if [ -n "$dry_run" ]; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

where() { location=(--zone="$zone"); if [ -n "$project" ]; then location+=(--project="$project"); fi; }

# One slice is called like the request; several have numbers.
nodes() {
    if [ "$num_slices" -eq 1 ]; then echo "$name"; return; fi
    local i
    for ((i = 0; i < num_slices; i++)); do echo "$name-$i"; done
}

on_workers() {  # on_workers NODE WORKER COMMAND
    run gcloud compute tpus tpu-vm ssh "$1" --worker="$2" "${location[@]}" --command="$3"
}

on_all() {
    local node
    for node in $(nodes); do on_workers "$node" all "$1" || return; done
}

default_runtime() {
    case $accelerator in
        v4-*) echo tpu-ubuntu2204-base ;;
        v5litepod-*) echo v2-alpha-tpuv5-lite ;;
        v5p-*) echo v2-alpha-tpuv5 ;;
        v6e-*) echo v2-alpha-tpuv6e ;;
        *) fail "--runtime is needed for $accelerator (gcloud compute tpus tpu-vm versions list)" ;;
    esac
}

create() {
    local version options=()
    [ -n "$accelerator" ] || fail "create needs --accelerator, e.g. --accelerator=v5p-128"
    version=${runtime:-$(default_runtime)}
    case $capacity in
        on-demand) ;;
        spot) options+=(--spot) ;;
        reserved) options+=(--reserved) ;;
        *) fail "--capacity=$capacity: on-demand, spot or reserved" ;;
    esac
    if [ "$num_slices" -eq 1 ]; then options+=(--node-id="$name"); else options+=(--node-count="$num_slices" --node-prefix="$name"); fi
    run gcloud compute tpus queued-resources create "$name" "${location[@]}" \
        --accelerator-type="$accelerator" --runtime-version="$version" "${options[@]}"
}

# MISSING only if Google Cloud says so; UNKNOWN if it could not be asked, which says nothing about the slice.
state() {
    local said problem
    if [ -n "$dry_run" ]; then
        run gcloud compute tpus queued-resources describe "$name" "${location[@]}" --format='value(state.state)' >&2
        echo ACTIVE
        return
    fi
    problem=$(mktemp)
    if said=$(gcloud compute tpus queued-resources describe "$name" "${location[@]}" --format='value(state.state)' 2>"$problem"); then
        echo "$said"
    elif grep -qi 'not[_ ]found' "$problem"; then
        echo MISSING
    else
        echo "cannot ask for the state of $name: $(tail -n 1 "$problem")" >&2
        echo UNKNOWN
    fi
    rm -f "$problem"
}

wait_until_active() {
    local now
    while :; do
        now=$(state)
        case $now in
            ACTIVE) return 0 ;;
            FAILED | SUSPENDED | SUSPENDING | MISSING) echo "$name is $now" >&2; return 1 ;;
        esac
        echo "$name is $now; looking again in $poll_seconds s" >&2
        sleep "$poll_seconds"
    done
}

install() {
    local top node
    top=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
    run git -C "$top" archive --format=tar.gz --output=/tmp/t5x_like.tar.gz HEAD || return
    for node in $(nodes); do
        run gcloud compute tpus tpu-vm scp /tmp/t5x_like.tar.gz "$node:t5x_like.tar.gz" --worker=all "${location[@]}" || return
    done
    # The image's own Python is too old; uv brings one.
    on_all 'mkdir -p t5x_like && tar -xzf t5x_like.tar.gz -C t5x_like && python3 -m pip install --quiet --user uv && PATH=$HOME/.local/bin:$PATH && cd t5x_like && uv venv --quiet --allow-existing --python 3.12 .venv && uv pip install --quiet --python .venv/bin/python -e ".[tpu]"'
}

# The same arguments resume the run. The exit code is left in a file, which tells babysit that the run is over.
start() {
    [ ${#train_arguments[@]} -gt 0 ] || fail "$command needs the arguments of t5x_like train after --"
    local quoted
    quoted=$(printf '%q ' "${train_arguments[@]}")
    on_all "cd t5x_like && rm -f ~/train.exit && { nohup sh -c '.venv/bin/t5x_like train \"\$@\"; echo \$? > ~/train.exit' train $quoted > ~/train.log 2>&1 & echo \$! > ~/train.pid; }"
}

first_node() { nodes | sed -n 1p; }
finished() { on_workers "$(first_node)" 0 'cat ~/train.exit 2>/dev/null || echo running'; }

# Waits for the end of the run that was started. Returns 0 when it is complete, 2 when it was refused, 1 when it is lost.
follow() {
    local code now unreachable=0
    while :; do
        now=$(state)
        case $now in ACTIVE | UNKNOWN) ;; *) return 1 ;; esac
        # The first that fails when a slice is taken away is the connection to it.
        code=$(finished) || code=unreachable
        if [ -n "$dry_run" ]; then echo "$code"; return 0; fi
        case $code in
            0) echo "the run is complete; delete $name when you have what you need"; return 0 ;;
            2) echo "the run refused its configuration; see: logs" >&2; return 2 ;;
            running) unreachable=0 ;;
            unreachable)
                unreachable=$((unreachable + 1))
                echo "$name cannot be reached ($unreachable of $max_unreachable times in a row)" >&2
                [ "$unreachable" -lt "$max_unreachable" ] || return 1
                ;;
            *) echo "the run ended with exit code $code" >&2; return 1 ;;
        esac
        sleep "$poll_seconds"
    done
}

# Creates, installs and starts; when the slice is lost or the run fails, does it again, at most max_retries times.
# What gcloud fails at is told and tried again: `set -e` must not end the one command that outlives failures.
babysit() {
    local attempt ended
    for ((attempt = 0; attempt <= max_retries; attempt++)); do
        if [ "$(state)" = MISSING ] || [ -n "$dry_run" ]; then create || echo "$name could not be created" >&2; fi
        ended=1
        if wait_until_active && install && start; then
            follow && return 0
            ended=$?
        fi
        [ "$ended" -ne 2 ] || return 2
        echo "attempt $((attempt + 1)) of $((max_retries + 1)) ended; starting again in $poll_seconds s" >&2
        case $(state) in ACTIVE | UNKNOWN | MISSING) ;; *) delete || echo "$name could not be deleted" >&2 ;; esac
        sleep "$poll_seconds"
    done
    fail "gave up after $max_retries retries"
}

delete() { run gcloud compute tpus queued-resources delete "$name" "${location[@]}" --force --quiet; }

case $command in help | --help | -h) usage; exit 0 ;; esac
[ -n "$name" ] || fail "--name is needed"
[ -n "$zone" ] || fail "--zone is needed, e.g. --zone=us-east5-a"
[[ $num_slices =~ ^[1-9][0-9]*$ ]] || fail "--num_slices=$num_slices: a number from 1"
where
case $command in
    create | install | start | delete | babysit) "$command" ;;
    wait) wait_until_active ;;
    status) state ;;
    logs) on_workers "$(first_node)" 0 'tail -n 100 -F ~/train.log' ;;
    stop) on_all 'kill -TERM -- -"$(ps -o pgid= -p "$(cat ~/train.pid)" | tr -d " ")"' ;;
    *) fail "there is no command $command: create, wait, install, start, logs, status, stop, delete or babysit" ;;
esac
