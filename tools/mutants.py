"""Puts the mistakes of tests/mutants.yaml into copies of the code, one at a time, and says which the tests notice.

python -m tools.mutants                          # all; a second call goes on where the first was ended
python -m tools.mutants --room update --jobs 1   # or --only ID …, or --random 12 --seed 7
python -m tools.mutants --check                  # only see that each still fits the code

The results of a mutant hold for its file and for the test files that it names: after other changes give --fresh.
Exit code 1: a mistake went unnoticed without a reason given, fewer than 95 % were noticed, or a target ends in an error
though nothing is wrong; 2: an entry does not fit the code.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from distill.console import positive, tell
from distill.errors import EXIT_BAD_INPUT, EXIT_FAILED, BadInput, Problem
from tools.mutation.campaign import Campaign, Ledger
from tools.mutation.entries import ENTRIES, Mutant, check, read_entries
from tools.mutation.summary import in_words, sum_up, verdict
from tools.mutation.trials import preload

_RUNS = Path("runs")


def main() -> int:
    """Command line."""
    args = _parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_FAILED))  # copies are removed and tests ended on the way out
    try:
        return _try_mutants(args)
    except BadInput as error:
        tell(error)
        return EXIT_BAD_INPUT


def _try_mutants(args: argparse.Namespace) -> int:
    project: Path = args.project.resolve()
    entries = read_entries(project / ENTRIES)
    check(entries.mutants, project)
    if args.check:
        print(f"each of {len(entries.mutants)} mutants fits the code in one place")
        return 0
    chosen = _chosen(entries.mutants, args)
    tried = [mutant for mutant in chosen if mutant.equivalent is None]
    started = time.monotonic()
    ledger = Ledger(project / _RUNS / "mutants.jsonl", args.fresh)
    deadline = started + 60 * args.minutes if args.minutes else float("inf")
    say = lambda text: print(f"{time.monotonic() - started:6.0f} s  {text}", flush=True)  # noqa: E731
    campaign = Campaign(project, ledger, args.jobs, args.trusted, say, args.grace, deadline)
    preload(entries.preload)
    campaign.run(tried)
    summary = sum_up(chosen, campaign)
    (project / _RUNS / "mutants.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(f"\n{in_words(summary)}")
    if (left := len(tried) - len(campaign.mutants)) > 0:
        print(f"no time for {left} of {len(tried)}")
    if wrong := verdict(summary, is_all=not (args.only or args.room or args.random)):
        print(f"mutants: {wrong}", file=sys.stderr)
        return EXIT_FAILED
    return 0


def _chosen(mutants: Sequence[Mutant], args: argparse.Namespace) -> list[Mutant]:
    """Choose the mutants that the command line asks for.

    Raises:
        BadInput: it asks for what is not there.
    """
    known = {mutant.id for mutant in mutants}, {mutant.room for mutant in mutants}
    for flag, wanted, names in (("--only", args.only, known[0]), ("--room", args.room, known[1])):
        if missing := sorted(set(wanted) - names):
            raise BadInput(Problem(flag, missing[0], f"stands nowhere in {ENTRIES}", "correct the name"))
    found = [mutant for mutant in mutants if not args.only or mutant.id in args.only]
    found = [mutant for mutant in found if not args.room or mutant.room in args.room]
    if args.random is not None:
        found = [mutant for mutant in found if mutant.equivalent is None]
        print(f"{args.random} of {len(found)} mutants by --seed {args.seed}")
        found = random.Random(args.seed).sample(found, min(args.random, len(found)))
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, default=Path(), help=f"checkout that holds {ENTRIES}")
    parser.add_argument("--jobs", type=positive, default=len(os.sched_getaffinity(0)), help="mutants at a time")
    parser.add_argument("--fresh", action="store_true", help="forget the results of earlier calls")
    parser.add_argument("--check", action="store_true", help="only see that each mutant fits the code")
    parser.add_argument("--only", nargs="+", default=[], metavar="ID", help="these mutants")
    parser.add_argument("--room", nargs="+", default=[], help="the mutants of these rooms")
    parser.add_argument("--random", type=positive, metavar="N", help="so many of them")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--minutes", type=positive, help="begin no mutant later than that")
    grace = "seconds before a test with a mistake is ended, beyond five times as many as without"
    parser.add_argument("--grace", type=positive, default=30, help=grace)
    trusted = "the tests are known to pass: do not run them without a mistake first"
    parser.add_argument("--trusted", action="store_true", help=trusted)
    return parser


if __name__ == "__main__":
    sys.exit(main())
