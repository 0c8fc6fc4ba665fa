#!/usr/bin/env bash
# Starts or resumes the ranks of one host, where something else starts this script on every host: a container
# orchestrator (launch/kubernetes.yaml), a scheduler (launch/slurm.sbatch), or you, in a terminal on each.
#
#   bash launch/no_ssh.sh [--dry-run] --hosts A,B --slots 8 --node-rank 0 --master-addr A [launcher flags] --config my.yaml …
#
# --hosts        all hosts in the same order everywhere; the names are shown only, nothing connects to them
# --slots        ranks on each host
# --node-rank    this host's place in --hosts, from 0
# --master-addr  of the first host, as the others reach it
#
# All from --config on is the run's. --max-restarts N starts again after a crash; give it on all hosts. SIGTERM or SIGUSR1,
# on any of them, lets the run save itself and stop.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# For the last words of a run that fails.
export DISTILL_COMMAND="${DISTILL_COMMAND:-"bash$(printf ' %q' "$0" "$@")"}"
fail() { echo "no_ssh.sh: $1" >&2; exit 2; }
dry=false hosts="" slots="" node_rank="" master_addr=""
flags=()
while (($#)) && [[ "$1" != --config && "$1" != --config=* ]]; do
  case "$1" in
    --dry-run) dry=true; shift; continue ;;
    --hosts | --slots | --node-rank | --master-addr) (($# > 1)) || fail "$1 has no value" ;;
  esac
  case "$1" in
    --hosts) hosts="$2"; shift ;;
    --slots) slots="$2"; shift ;;
    --node-rank) node_rank="$2"; shift ;;
    --master-addr) master_addr="$2"; shift ;;
    *) flags+=("$1") ;;
  esac
  shift
done
(($#)) || fail "--config is missing"
[[ -n "$hosts" ]] || fail "--hosts is missing, as in --hosts worker-1,worker-2"
[[ "$slots" =~ ^[1-9][0-9]*$ ]] || fail "--slots = '$slots' is no number of ranks from 1"
[[ "$node_rank" =~ ^[0-9]+$ ]] || fail "--node-rank = '$node_rank' is no number from 0"
[[ -n "$master_addr" ]] || fail "--master-addr is missing: an address of the first host that the others reach"
IFS=, read -ra names <<<"$hosts"
((node_rank < ${#names[@]})) || fail "--node-rank = $node_rank, but --hosts has ${#names[@]} hosts, counted from 0"

[[ -x "$root/.venv/bin/deepspeed" ]] && PATH="$root/.venv/bin:$PATH"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
# DeepSpeed reads how many hosts there are from a file. This one has no name: nobody needs to clean it up.
file="$(mktemp)"
exec 9<>"$file"
rm -f "$file"
printf "%s slots=$slots\n" "${names[@]}" >&9
command=(python -m distill.launching --hostfile /dev/fd/9 --no_ssh --node_rank "$node_rank" --master_addr "$master_addr")
command+=(${flags[@]+"${flags[@]}"} "$root/launch/train.sh" "$@")
if $dry; then
  printf '%q ' "${command[@]}"
  echo
  sed 's/^/hostfile: /' /dev/fd/9 >&2
  exit
fi
exec "${command[@]}"
