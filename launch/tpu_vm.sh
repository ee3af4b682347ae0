#!/usr/bin/env bash
# A run on a Google Cloud TPU VM slice: make the slice, install the code, train on all of its hosts, bring the run home.
set -euo pipefail

usage="usage: launch/tpu_vm.sh [--dry-run] COMMAND --name=SLICE --zone=ZONE [OPTION…] [-- TRAIN_FLAG…]

  launch/tpu_vm.sh all --name=ereg --zone=us-west4-a --type=v5litepod-8 --version=v2-alpha-tpuv5-lite \\
    --workdir=runs/ereg -- --config=configs/quickstart.py

commands
  create    make the slice (needs --type and --version), or use the one that has the name; with --queued, ask for it
            and wait until it is there
  install   copy the code of the last commit to every host and install it there with jax[tpu]
  start     start \`jax-entropy train --distributed\` with the train flags on every host (needs --workdir), under a
            supervisor that starts it again when a host's process dies
  follow    show the output of the first host until the run ends; Ctrl-C leaves the run alone
  fetch     copy the run from the first host to the same --workdir here
  delete    delete the slice with all that was not fetched; no other command does
  all       create, install, start, follow, fetch

options
  --type      accelerator type: v5litepod-8, v5p-8, v6e-8, …
  --version   software version of the TPU: v2-alpha-tpuv5-lite, v2-alpha-tpuv5, v2-alpha-tpuv6e, …
  --workdir   folder of the run, below the current folder here and below the home folder there; an absolute path is the
              same on both sides. The hosts of a slice must share the disk it is on
  --queued    a queued resource: for create, all and delete
  --spot      capacity that may be taken away again
  --restart   how often a run starts again, 10 unless given
  --dry-run   print the commands, run nothing

The Google Cloud project is gcloud's own, or the one in CLOUDSDK_CORE_PROJECT."

refuse() {
  echo "launch/tpu_vm.sh: $1" >&2
  exit 2
}

quote() { # the words as a shell reads them back, quoted only where they must be
  local word separator='' mark="'" escaped="'\\''"
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word="'${word//$mark/$escaped}'"
    printf '%s%s' "$separator" "$word"
    separator=' '
  done
}

run() {
  if [[ $dry_run ]]; then
    quote "$@"
    echo
  else
    "$@"
  fi
}

on_hosts() { # WORKER COMMAND
  run gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker="$1" --command="$2"
}
idle="if [ -s train.pid ] && kill -0 \$(cat train.pid) 2>/dev/null; \
then echo this slice is busy with a run >&2; exit 2; fi"

create() {
  local find=(gcloud compute tpus tpu-vm describe "$name" --zone="$zone" --format="value(state)")
  local make=(gcloud compute tpus tpu-vm create "$name" --zone="$zone" --accelerator-type="$type" --version="$version")
  [[ ! $queued ]] || make=(gcloud compute tpus queued-resources create "$name" --node-id="$name" --zone="$zone"
    --accelerator-type="$type" --runtime-version="$version")
  [[ ! $spot ]] || make+=(--spot)
  if [[ $dry_run ]]; then
    echo "$(quote "${find[@]}") 2>/dev/null || $(quote "${make[@]}")"
  else
    "${find[@]}" 2>/dev/null || "${make[@]}"
  fi
  local state
  state="gcloud compute tpus queued-resources describe $(quote "$name" --zone="$zone") '--format=value(state.state)'"
  [[ ! $queued ]] || run bash -c "while state=\$($state) || exit; [ \"\$state\" != ACTIVE ]; do \
case \$state in FAILED | SUSPENDED) echo \"the queued resource is \$state\" >&2; exit 1 ;; esac; sleep 30; done"
}

install() {
  local archive=$root/build/jax_entropy.tar.gz
  [[ $dry_run || -z $(git -C "$root" status --porcelain) ]] ||
    echo "launch/tpu_vm.sh: uncommitted changes stay here; the code of the last commit is installed" >&2
  run mkdir -p "$root/build"
  run git -C "$root" archive --format=tar.gz --output="$archive" HEAD
  run gcloud compute tpus tpu-vm scp "$archive" "$name:jax_entropy.tar.gz" --zone="$zone" --worker=all
  on_hosts all "$idle; rm -rf jax_entropy && mkdir jax_entropy && tar -xzf jax_entropy.tar.gz -C jax_entropy"
  # the image's Python may be 3.10, or closed to pip; uv brings one of its own
  on_hosts all "PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv && cd jax_entropy &&\
 python3 -m uv venv --quiet --allow-existing --python=3.12 ../venv &&\
 python3 -m uv pip install --quiet --python=../venv .[tpu]"
}

start() {
  local there=\$HOME/$workdir train
  [[ $workdir != /* ]] || there=$workdir
  train="../venv/bin/python -I jax_entropy/supervise.py --restart=$restart -- \
../venv/bin/jax-entropy train --distributed --workdir=$there $(quote ${flags[@]+"${flags[@]}"})"
  on_hosts all "$idle; rm -f train.pid train.code; cd jax_entropy || exit; \
setsid nohup bash -c '\"\$@\" & echo \$! >~/train.pid; wait \$!; echo \$? >~/train.code' train $train \
>~/train.log 2>&1 </dev/null & until [ -s ~/train.pid ]; do sleep 0.1; done"
}

follow() {
  on_hosts 0 "tail --pid=\$(cat train.pid) -n +1 -f train.log; sleep 2; exit \$(cat train.code || echo 1)"
}

fetch() {
  run mkdir -p "$(dirname "$workdir")"
  run gcloud compute tpus tpu-vm scp --recurse "$name:$workdir" "$(dirname "$workdir")" --zone="$zone" --worker=0
}

delete() {
  [[ ! $queued ]] || { run gcloud compute tpus queued-resources delete "$name" --zone="$zone" --force && return; }
  run gcloud compute tpus tpu-vm delete "$name" --zone="$zone"
}

all() {
  local code=0
  create
  install
  start
  follow || code=$?
  fetch
  [[ $dry_run ]] || echo "launch/tpu_vm.sh: the slice is still there and costs money; delete it with" \
    "launch/tpu_vm.sh delete --name=$name --zone=$zone" >&2
  return "$code"
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
command='' dry_run='' queued='' spot='' name='' zone='' type='' version='' workdir='' restart=10
flags=()
while [[ $# -gt 0 ]]; do
  case $1 in
    -h | --help) echo "$usage" && exit ;;
    --dry-run) dry_run=1 ;;
    --queued) queued=1 ;;
    --spot) spot=1 ;;
    --name=* | --zone=* | --type=* | --version=* | --workdir=* | --restart=*)
      printf -v "$(cut -d= -f1 <<<"${1#--}")" %s "${1#*=}"
      ;;
    --) flags=("${@:2}") && break ;;
    create | install | start | follow | fetch | delete | all)
      [[ -z $command ]] || refuse "both '$command' and '$1'; give one command"
      command=$1
      ;;
    *) refuse "'$1' is not understood; flags of the run come after --, and --help lists the rest" ;;
  esac
  shift
done

[[ $command ]] || refuse "the command is missing; choose create, install, start, follow, fetch, delete or all"
[[ $name && $zone ]] || refuse "'$command' needs --name=SLICE and --zone=ZONE"
[[ $command != create && $command != all ]] || [[ $type && $version ]] ||
  refuse "'$command' needs --type and --version, such as --type=v5litepod-8 --version=v2-alpha-tpuv5-lite"
[[ $command != start && $command != fetch && $command != all ]] || [[ $workdir =~ ^[A-Za-z0-9_./-]+$ ]] ||
  refuse "'$command' needs --workdir=FOLDER of letters, digits and _ . / -, but got '$workdir'"
[[ $restart =~ ^[0-9]{1,4}$ ]] || refuse "--restart='$restart' must be a whole number"
[[ " ${flags[*]-}" != *" --workdir"* ]] || refuse "--workdir belongs before the --"
[[ $dry_run ]] || command -v gcloud >/dev/null ||
  refuse "gcloud is not on the PATH; install the Google Cloud CLI, or add --dry-run to see the commands"
"$command"
