#!/usr/bin/env bash
# Starts or resumes a run under Open MPI, where mpirun is the way onto the hosts; the ranks find each other by mpi4py.
#
#   bash launch/openmpi.sh [--dry-run] [mpirun flags] --config launch/recipes/X.yaml [section.key=value …]
#   bash launch/openmpi.sh --hostfile launch/hostfile.example --config my.yaml optim.lr=1e-5
#
# All from --config on is the run's. Without --hostfile mpirun asks the scheduler for the hosts. MASTER_ADDR, an address
# of the first host that the others reach, and MASTER_PORT are optional. mpirun carries the forwarded variables itself:
# its command line, which --dry-run prints, has their names only. It carries SIGUSR1 too, on which the run saves itself at
# its next step boundary and ends with exit code 75; on SIGTERM it kills the ranks.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# For the last words of a run that fails.
export DISTILL_COMMAND="${DISTILL_COMMAND:-"bash$(printf ' %q' "$0" "$@")"}"
dry=false
flags=()
while (($#)) && [[ "$1" != --config && "$1" != --config=* ]]; do
  if [[ "$1" == --dry-run ]]; then dry=true; else flags+=("$1"); fi
  shift
done
(($#)) || { echo "openmpi.sh: --config is missing, as in openmpi.sh --hostfile hosts --config my.yaml" >&2; exit 2; }

[[ -x "$root/.venv/bin/python" ]] && PATH="$root/.venv/bin:$PATH"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
forwarded="$(python -m distill.launching.variables)"
names=()
[[ -z "$forwarded" ]] || mapfile -t names <<<"$forwarded"
# mpirun would hold every rank to one core.
[[ " ${flags[*]-} " == *" --bind-to "* ]] || flags+=(--bind-to none)

command=(mpirun "${flags[@]}" ${names[@]+"${names[@]}"} "$(command -v python)" -u "$root/launch/train.sh" "$@")
if $dry; then
  printf '%q ' "${command[@]}"
  echo
  exit
fi
command -v mpirun >/dev/null || { echo "openmpi.sh: no mpirun (Debian: apt-get install openmpi-bin)" >&2; exit 2; }
exec "${command[@]}"
