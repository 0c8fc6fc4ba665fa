"""The verb `judge`: its flags → a judge, manners and responses; then the tables, and what is missing."""

import argparse
import sys

from distill.errors import BadInput, Ended, Problem
from distill.evaluation.judge.material import read_material
from distill.evaluation.judge.runner import Report, run
from distill.evaluation.judge.settings import Judge, Manners, Prices, check_url, read_key, read_options
from distill.evaluation.judge.table import terminal_tables
from distill.evaluation.judge.tasks import Pair


def judge(args: argparse.Namespace) -> None:
    """Ask, and print what was said.

    Raises:
        BadInput: a flag or the folder does not fit, or there is no such judge.
        Unreachable: the judge stopped answering.
        Ended: verdicts are missing; its code says whether the limit of costs is why.
    """
    pairs = _pairs(args)
    models = [model for pair in pairs for model in pair] or args.model
    options = read_options(args.option, args.judge_max_tokens, args.judge_seed)
    url = check_url(args.judge_url)
    material = read_material(args.folder, models, args.set, args.seed, "--pair" if pairs else "--model")
    manners = _manners(args)
    key = read_key(args.key_variable)
    asked = Judge(url, args.judge_model, key, options, args.judge_timeout, args.judge_max_retries)
    report = run(material, asked, manners, pairs)
    print(terminal_tables(report.entries))
    print(_in_numbers(report, manners), file=sys.stderr)
    if report.code:
        raise Ended(report.code, report.shortfall(manners))


def _pairs(args: argparse.Namespace) -> list[Pair]:
    if args.pair and args.model:
        raise BadInput(Problem("--model", args.model, "--pair names the models", "leave it out"))
    pairs: list[Pair] = []
    for one, other in args.pair:
        if one == other:
            raise BadInput(Problem("--pair", f"{one} {other}", "is one model", "name two"))
        if {one, other} in map(set, pairs):
            raise BadInput(Problem("--pair", f"{one} {other}", "stands there twice", "leave one out"))
        pairs.append((one, other))
    return pairs


def _manners(args: argparse.Namespace) -> Manners:
    given = args.price_in, args.price_out
    if (given[0] is None) != (given[1] is None):
        missing = "--price-in" if given[0] is None else "--price-out"
        raise BadInput(Problem(missing, None, "is missing beside the other price", "give both, or none"))
    prices = None if given[0] is None else Prices(*given)
    limits = args.requests_per_minute, args.tokens_per_minute
    return Manners(args.concurrency, *limits, args.asks, prices, args.max_cost)


def _in_numbers(report: Report, manners: Manners) -> str:
    """Of this command alone."""
    outcome = report.outcome
    cost = f", cost {outcome.cost:.4g}" if manners.prices else ""
    unparsable = sum(entry["unparsable_replies"] for entry in report.entries)
    asked = f"{outcome.replies} replies asked for, {outcome.retries} retries{cost}"
    return f"distill: {asked}; {unparsable} replies, old ones included, hold no verdict"
