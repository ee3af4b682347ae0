#!/usr/bin/env bash
# Fills launch/gke_jobset.yaml and gives it to kubectl: a run on a TPU slice of a GKE cluster.
set -euo pipefail

usage="usage: launch/gke_jobset.sh [--dry-run] --name=RUN --image=IMAGE --claim=CLAIM [OPTION…] -- TRAIN_FLAG…

  launch/gke_jobset.sh --name=ereg --image=europe-docker.pkg.dev/me/runs/jax_entropy --claim=runs \\
    --topology=4x4 -- --config=configs/codeparrot.py --workdir=/runs/ereg

  --image         container image in whose checkout \`pip install -e '.[tpu]'\` was done
  --claim         persistent volume claim that all hosts can write to, mounted at /runs
  --accelerator   node label, tpu-v5-lite-podslice unless given; tpu-v5p-slice, tpu-v6e-slice
  --topology      node label, 4x4 unless given
  --chips         chips of each host, 4 unless given
  --restart       how often the run starts again, 10 unless given
  --dry-run       print what kubectl would be given

Follow with \`kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=RUN\`, remove with \`kubectl delete jobset RUN\`."

refuse() {
  echo "launch/gke_jobset.sh: $1" >&2
  exit 2
}

json() { # the words as items of a list that YAML reads back as they are
  local word separator='' list=''
  for word; do
    [[ ! $word =~ [[:cntrl:]] ]] || refuse "a flag has a line break or another control character in it"
    word=${word//\\/\\\\}
    list+="$separator\"${word//\"/\\\"}\""
    separator=', '
  done
  echo "$list"
}

name='' image='' claim='' accelerator=tpu-v5-lite-podslice topology=4x4 chips=4 restart=10 dry_run=''
flags=()
while [[ $# -gt 0 ]]; do
  case $1 in
    -h | --help) echo "$usage" && exit ;;
    --dry-run) dry_run=1 ;;
    --name=* | --image=* | --claim=* | --accelerator=* | --topology=* | --chips=* | --restart=*)
      printf -v "$(cut -d= -f1 <<<"${1#--}")" %s "${1#*=}"
      ;;
    --) flags=("${@:2}") && break ;;
    *) refuse "'$1' is not understood; flags of the run come after --, and --help lists the rest" ;;
  esac
  shift
done
[[ $name =~ ^[a-z]([a-z0-9-]{0,40}[a-z0-9])?$ ]] || refuse "--name='$name' must be lower-case letters, digits and -"
[[ $image =~ ^[A-Za-z0-9._/:@-]+$ ]] || refuse "--image='$image' is not a container image"
[[ $claim =~ ^[a-z0-9.-]+$ ]] || refuse "--claim='$claim' is not the name of a persistent volume claim"
[[ $accelerator =~ ^[a-z0-9-]+$ ]] || refuse "--accelerator='$accelerator' is not a node label"
[[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || refuse "--topology='$topology' must look like 4x4 or 2x2x2"
[[ $chips =~ ^[1-9][0-9]?$ ]] || refuse "--chips='$chips' must be a whole number"
[[ $restart =~ ^[0-9]{1,4}$ ]] || refuse "--restart='$restart' must be a whole number"
[[ ${#flags[@]} -gt 0 ]] || refuse "the flags of the run are missing; they come after --"
total=$((${topology//x/*}))
((total % chips == 0)) || refuse "--chips=$chips does not divide the $total chips of --topology=$topology"

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
list=$(json "${flags[@]}") # refuses in a subshell, and ends the script through errexit
text=$(<"$here/gke_jobset.yaml")
for pair in NAME="$name" IMAGE="$image" CLAIM="$claim" ACCELERATOR="$accelerator" TOPOLOGY="$topology" CHIPS="$chips" \
  RESTART="$restart" HOSTS="$((total / chips))" FLAGS="$list"; do
  value=${pair#*=}
  text=${text//"@${pair%%=*}@"/"$value"}
done
if [[ $dry_run ]]; then
  echo "kubectl apply -f - <<'END'"
  echo "$text"
  echo END
  exit
fi
command -v kubectl >/dev/null || refuse "kubectl is not on the PATH; add --dry-run to see what it would be given"
kubectl apply -f - <<<"$text"
