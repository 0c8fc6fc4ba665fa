#!/usr/bin/env bash
# Starts or resumes a run. One file, two readers:
#
#   deepspeed [launcher flags] launch/train.sh --config launch/recipes/X.yaml [section.key=value …]
#   bash launch/train.sh [--dry-run] [--max-restarts N] [launcher flags] --config launch/recipes/X.yaml [section.key=value …]
#
# The second asks all hosts of a hostfile first and gives them the variables that ssh does not bring; it starts again
# after a crash, up to N times, and on SIGTERM or SIGUSR1 lets the run save itself. See README.
#
# The launcher hands this file to Python on every rank; Python takes everything up to the closing quotes for a string.
# Bash reads the next line as the command `:` and leaves at `exec`.
''':'
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# For the last words of a run that fails.
export DISTILL_COMMAND="${DISTILL_COMMAND:-"bash$(printf ' %q' "$0" "$@")"}"
launcher=()
run=()
while (($#)); do
  case "$1" in
    --config) run+=("$1" "${2:-}"); shift ;;
    --config=*) run+=("$1") ;;
    [a-z]*=*) run+=("$1") ;;
    *) launcher+=("$1") ;;
  esac
  (($#)) && shift
done
# A checkout with an environment of its own needs no activation.
[ -x "$root/.venv/bin/deepspeed" ] && PATH="$root/.venv/bin:$PATH"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec python -m distill.launching ${launcher[@]+"${launcher[@]}"} "$root/launch/train.sh" ${run[@]+"${run[@]}"}
'''
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from distill.cli import main
from distill.console import leave

if __name__ == "__main__":
    # The launcher's own --local_rank comes first; the verb follows it.
    flags = [argument for argument in sys.argv[1:] if argument.startswith("--local_rank")]
    rest = [argument for argument in sys.argv[1:] if argument not in flags]
    leave(main([*flags, "train", *rest]))
