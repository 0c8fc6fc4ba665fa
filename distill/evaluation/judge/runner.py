"""`distill judge`: put the responses of an evaluation to a judge, and sum up what it says.

The evaluation's folder gets `judge/NAME.replies.jsonl` (each reply) and `judge.json` (all figures, of all judges).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from distill.checkpoint.disk import replace_file
from distill.errors import EXIT_FAILED, EXIT_PREEMPTED
from distill.evaluation.judge.asking import Asking, Outcome
from distill.evaluation.judge.material import Material
from distill.evaluation.judge.prompts import template_hash
from distill.evaluation.judge.replies import Reply, ReplyFile, locked, replies_file
from distill.evaluation.judge.scoring import Group, groups, of_pairs, of_scores
from distill.evaluation.judge.settings import Judge, Manners, Prices, check_costs
from distill.evaluation.judge.tasks import Pair, Task, pair_tasks, score_tasks
from distill.evaluation.statistics import Bootstrap

JUDGE = "judge.json"
# On the console; judge.json has all.
_NAMED = 5


@dataclass(frozen=True)
class Report:
    """What a command found."""

    entries: list[dict[str, Any]]
    """One a table's row, as in judge.json."""
    outcome: Outcome
    missing: list[str]
    """Questions without a verdict, each with the reason."""

    @property
    def code(self) -> int:
        """Exit code: 0, 75 where the limit of costs ended it, else 1 where verdicts are missing."""
        return EXIT_PREEMPTED if self.outcome.spent else EXIT_FAILED if self.missing else 0

    def shortfall(self, manners: Manners) -> str:
        """What is missing, in a few lines."""
        if self.outcome.spent:
            head = f"--max-cost {manners.max_cost:g} is reached ({self.outcome.cost:.4g} spent): "
            return f"{head}{len(self.missing)} questions have no verdict yet; the same command goes on"
        more = len(self.missing) - _NAMED
        lines = self.missing[:_NAMED] + ([f"and {more} more, see {JUDGE}"] if more > 0 else [])
        return "\n  ".join([f"{len(self.missing)} questions have no verdict:", *lines])


def run(material: Material, judge: Judge, manners: Manners, pairs: Sequence[Pair]) -> Report:
    """Judge each pair's responses against each other; without a pair, each response beside its reference.

    What was asked before is not asked again.

    Raises:
        BadInput: sets without references, a limit of costs without prices, no such judge, or somebody else at work.
        Unreachable: the judge stopped answering.
    """
    check_costs(judge, manners)
    tasks = pair_tasks(material, pairs, judge) if pairs else score_tasks(material, judge)
    with ReplyFile(replies_file(material.folder, judge.model)) as file:
        # Equal responses make equal questions.
        open_ones = {task.key: task for task in tasks if _is_open(task, file, manners)}
        with tqdm(total=len(open_ones), desc=judge.model, unit="verdict", leave=False) as bar:
            outcome = Asking(judge, manners, file).run(list(open_ones.values()), bar.update)
        entries = [_entry(group, file, material, judge, manners, outcome) for group in groups(tasks, pairs)]
        missing = [place for entry in entries for place in entry["missing"]]
    _save(material, entries)
    return Report(entries, outcome, missing)


def _is_open(task: Task, file: ReplyFile, manners: Manners) -> bool:
    return file.verdict(task) is None and len(file.of(task)) < manners.asks


def _entry(
    group: Group, file: ReplyFile, material: Material, judge: Judge, manners: Manners, outcome: Outcome
) -> dict[str, Any]:
    mode = group.tasks[0].place.mode
    rows = len(material.sets[group.set])
    measure = of_scores if mode == "score" else of_pairs
    replies = [reply for task in group.tasks for reply in file.of(task)]
    judged = [task for task in group.tasks if file.verdict(task) is not None]
    return {
        "judge": judge.model,
        "mode": mode,
        "set": group.set,
        "models": list(group.models),
        "weights": [material.weights(model) for model in group.models],
        "seeds": material.seeds,
        "urls": sorted({reply.url for reply in replies}),
        "options": dict(judge.options),
        "template": template_hash(mode),
        "questions": len(group.tasks),
        "verdicts": len(judged),
        "replies": len(replies),
        "unparsable_replies": len(replies) - len(judged),
        "missing": [f"{task.place}: {_why(task, file, outcome)}" for task in group.tasks if not file.verdict(task)],
        "tokens": _tokens(replies),
        "cost": _cost(replies, manners.prices),
        "figures": {
            name: asdict(of)
            for name, of in measure(group, file.verdict, rows, Bootstrap(rows, material.resamples)).items()
        },
    }


def _why(task: Task, file: ReplyFile, outcome: Outcome) -> str:
    if task.key in outcome.refused:
        return f"the judge refuses it ({outcome.refused[task.key]})"
    if not (replies := file.of(task)):
        return "not asked yet"
    last = replies[-1]
    cut = ", cut off" if last.finish == "length" else ""
    return f"no verdict in {len(replies)} replies; the last{cut}: {last.text[:80]!r}"


def _tokens(replies: Sequence[Reply]) -> dict[str, int]:
    """As the server counted them."""
    return {
        "prompt": sum(reply.prompt_tokens or 0 for reply in replies),
        "completion": sum(reply.completion_tokens or 0 for reply in replies),
        "replies_not_counted": sum(None in (reply.prompt_tokens, reply.completion_tokens) for reply in replies),
    }


def _cost(replies: Sequence[Reply], prices: Prices | None) -> dict[str, float] | None:
    if prices is None:
        return None
    tokens = _tokens(replies)
    total = prices.of(tokens["prompt"], tokens["completion"])
    return {"total": total, "per_million_prompt": prices.prompt, "per_million_completion": prices.completion}


def _save(material: Material, entries: list[dict[str, Any]]) -> None:
    """Beside what other commands found, unless it is of these or of responses that are no more."""
    path = material.folder / JUDGE
    with locked(material.folder):  # another judge may be done at the same time
        _replace(path, entries, material)


def _replace(path: Path, entries: list[dict[str, Any]], material: Material) -> None:
    kept = [entry for entry in _saved(path) if _is_current(entry, material)]
    new = {_identity(entry) for entry in entries}
    content = {"judgements": [entry for entry in kept if _identity(entry) not in new] + entries}
    replace_file(path, json.dumps(content, indent=1, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")


def _saved(path: Path) -> list[dict[str, Any]]:
    """Empty where the file is missing or no longer what it was: the replies have everything."""
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["judgements"])
    except (OSError, ValueError, LookupError, TypeError):
        return []


def _is_current(entry: dict[str, Any], material: Material) -> bool:
    models = material.evaluation["models"]
    return entry["weights"] == [models[model]["weights"] if model in models else None for model in entry["models"]]


def _identity(entry: dict[str, Any]) -> tuple[Any, ...]:
    return entry["judge"], entry["mode"], entry["set"], tuple(entry["models"])
