"""Summary of the trials: a table by room, the survivors by name, and one dictionary with all of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.evaluation.table import aligned
from tools.mutation.campaign import Campaign, Result
from tools.mutation.entries import Mutant

LEAST_KILLED = 0.95
_COLUMNS = ("tried", "killed", "survived", "errors", "equivalent", "survived_before")


def sum_up(mutants: Sequence[Mutant], campaign: Campaign) -> dict[str, Any]:
    """Count the results by room, and list survivors, errors and what killed each mutant."""
    results, broken = campaign.mutants, [one for one in campaign.targets.values() if one.outcome == "error"]
    rooms: dict[str, dict[str, int]] = {}
    for mutant in mutants:
        _count(rooms.setdefault(mutant.room, dict.fromkeys(_COLUMNS, 0)), mutant, results.get(mutant.id))
    survivors = [mutant for mutant in mutants if _is(results.get(mutant.id), "survived")]
    errors = [one for one in results.values() if one.outcome == "error"]
    return {
        **{column: sum(room[column] for room in rooms.values()) for column in _COLUMNS if column != "equivalent"},
        "equivalent": [{"id": one.id, "reason": one.equivalent} for one in mutants if one.equivalent is not None],
        "seconds": round(sum(one.seconds for one in (*results.values(), *campaign.targets.values())), 1),
        "by_room": rooms,
        "killed_by": {one.name: one.by for one in results.values() if one.outcome == "killed"},
        "survivors": [_survivor(mutant, campaign.project) for mutant in survivors],
        "survives_no_more": [one.id for one in mutants if one.survives and _is(results.get(one.id), "killed")],
        "broken": [{"name": one.name, "why": one.by} for one in (*broken, *errors)],
    }


def _is(result: Result | None, outcome: str) -> bool:
    return result is not None and result.outcome == outcome


def _count(room: dict[str, int], mutant: Mutant, result: Result | None) -> None:
    room["equivalent"] += mutant.equivalent is not None
    if result is None:
        return
    room["tried"] += result.outcome != "error"
    room["survived_before"] += mutant.survived_before
    for outcome, column in (("killed", "killed"), ("survived", "survived"), ("error", "errors")):
        room[column] += result.outcome == outcome


def _survivor(mutant: Mutant, project: Path) -> dict[str, str | None]:
    line = mutant.line_in((project / mutant.file).read_text(encoding="utf-8"))
    return {"id": mutant.id, "place": f"{mutant.file}:{line}", "why": mutant.why, "reason": mutant.survives}


def verdict(summary: dict[str, Any], is_all: bool) -> str | None:
    """Say why the tests are not good enough, if so. The share to be killed is of all mutants: a few need no share."""
    if summary["broken"]:
        return f"{len(summary['broken'])} targets or mutants end in an error"
    if unexplained := [one["id"] for one in summary["survivors"] if one["reason"] is None]:
        return f"survived without a reason in tests/mutants.yaml: {', '.join(unexplained)}"
    if is_all and summary["killed"] < LEAST_KILLED * summary["tried"]:
        return f"{summary['killed']} of {summary['tried']} are killed, fewer than {LEAST_KILLED:.0%}"
    return None


def in_words(summary: dict[str, Any]) -> str:
    """Print for the console: the table, the survivors, the errors."""
    totals = {**summary, "equivalent": len(summary["equivalent"])}
    rows = [
        [name, *(str(of[column]) for column in _COLUMNS)] for name, of in [*summary["by_room"].items(), ("all", totals)]
    ]
    lines = [aligned([["room", *(column.replace("_", " ") for column in _COLUMNS)], *rows])]
    for one in summary["survivors"]:
        known = f" [{one['reason']}]" if one["reason"] else ""
        lines.append(f"survived: {one['id']} ({one['place']}): {one['why']}{known}")
    lines += [f"killed, though it says `survives`: {name}" for name in summary["survives_no_more"]]
    lines += [f"error: {one['name']}: {one['why']}" for one in summary["broken"]]
    return "\n".join(lines)
