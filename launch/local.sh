#!/usr/bin/env bash
# N processes of one run on this machine, joined by jax.distributed, as on a pod.
set -euo pipefail

usage="usage: launch/local.sh [--dry-run] [--restart=TIMES] N TRAIN_FLAG…

  launch/local.sh 2 --config=configs/quickstart.py --workdir=runs/quickstart

Runs \`jax-entropy train --distributed TRAIN_FLAG…\` N times. Process 0 writes to the terminal, the others to log
files, which are named when something fails. Ctrl-C and SIGTERM reach every process: the run saves and stops. If one process
fails, the others are killed, and its exit code is the script's.

  --dry-run         print the commands, run nothing
  --restart=TIMES   start all processes again when one dies, up to so many times in a row, with pauses that double; not
                    after code 0 or 2, Ctrl-C or SIGTERM (jax_entropy/supervise.py)

The environment is passed on: JAX_NUM_CPU_DEVICES=4 gives each process four devices, JAX_COORDINATOR_ADDRESS=HOST:PORT
takes the place of a free port of this machine, JAX_PLATFORMS is cpu unless it is set, and no_proxy keeps a proxy out of
what the processes say to each other."

refuse() {
  echo "launch/local.sh: $1" >&2
  exit 2
}

dry_run='' restart=''
while [[ ${1-} == -* ]]; do
  case $1 in
    -h | --help) echo "$usage" && exit ;;
    --dry-run) dry_run=1 ;;
    --restart=*)
      restart=${1#*=}
      [[ $restart =~ ^[0-9]{1,6}$ ]] || refuse "'$1' must be a whole number of restarts"
      ;;
    *) refuse "there is no option '$1' before the number of processes; the flags of the run come after it" ;;
  esac
  shift
done
[[ $# -gt 0 ]] || refuse "the number of processes is missing: launch/local.sh [--dry-run] N TRAIN_FLAG…"
[[ $1 =~ ^[1-9][0-9]{0,3}$ ]] || refuse "'$1' processes: N must be a whole number of at least 1"
count=$1
shift
train=(jax-entropy train --distributed "$@")
[[ $dry_run ]] || command -v jax-entropy >/dev/null ||
  refuse "jax-entropy is not on the PATH; activate the environment that has it"

if [[ $restart ]]; then
  here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
  supervise=(python3 -I "$(dirname "$here")/jax_entropy/supervise.py" "--restart=$restart" --)
  supervise+=("$here/local.sh" "$count" "$@")
  if [[ $dry_run ]]; then
    printf '%q ' "${supervise[@]:0:${#supervise[@]}-1}"
    printf '%q\n' "${supervise[-1]}"
    exit
  fi
  command -v python3 >/dev/null || refuse "python3 is not on the PATH; --restart needs it"
  exec "${supervise[@]}"
fi

free_port() {
  python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])' 2>/dev/null ||
    refuse "python3 is needed to find a free port; set JAX_COORDINATOR_ADDRESS=127.0.0.1:PORT instead"
}
address=${JAX_COORDINATOR_ADDRESS:-127.0.0.1:$(free_port)}
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" JAX_COORDINATOR_ADDRESS="$address" JAX_NUM_PROCESSES="$count"
# the processes talk to each other, not through the proxy that http_proxy may name; gRPC reads the lower case
export no_proxy="${address%:*},127.0.0.1,localhost${no_proxy:+,$no_proxy}"

if [[ $dry_run ]]; then
  printf 'export JAX_PLATFORMS=%q JAX_COORDINATOR_ADDRESS=%q ' "$JAX_PLATFORMS" "$address"
  printf 'JAX_NUM_PROCESSES=%d no_proxy=%q\n' "$count" "$no_proxy"
  echo "logs=\$(mktemp -d)"
  for ((i = 0; i < count; i++)); do
    printf 'JAX_PROCESS_ID=%d' "$i"
    printf ' %q' "${train[@]}"
    if ((i)); then printf " >\"\$logs/%d.log\" 2>&1" "$i"; fi
    echo ' &'
  done
  echo wait
  exit
fi

wanted=
pids=()
signal_all() {
  for pid in ${pids[@]+"${pids[@]}"}; do kill -s "$1" -- "-$pid" 2>/dev/null || true; done
}
trap 'signal_all KILL' EXIT
trap 'wanted=INT' INT
trap 'wanted=TERM' TERM HUP

logs=$(mktemp -d)
set -m # each process leads a group of its own: a signal reaches it once, and from here
for ((i = 0; i < count; i++)); do
  if ((i)); then
    JAX_PROCESS_ID=$i "${train[@]}" </dev/null >"$logs/$i.log" 2>&1 &
  else
    JAX_PROCESS_ID=$i "${train[@]}" </dev/null &
  fi
  pids[i]=$!
done
set +m

while ((${#pids[@]})); do
  sleep 0.2 || true # Ctrl-C ends it
  if [[ $wanted ]]; then
    signal_all "$wanted"
    wanted=
  fi
  for i in "${!pids[@]}"; do
    kill -0 "${pids[i]}" 2>/dev/null && continue
    code=0
    wait "${pids[i]}" || code=$?
    unset "pids[i]"
    ((code)) || continue
    signal_all KILL
    { wait || true; } 2>/dev/null # without bash's own word on each of them
    ((i == 0)) || tail -n 5 "$logs/$i.log" >&2
    echo "launch/local.sh: process $i of $count ended with code $code; what all but process 0 wrote is in $logs" >&2
    exit "$code"
  done
done
rm -r "$logs"
