"""Settings of the runs: what differs, side by side, and all of them, folded."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from tools.reporting.markup import NONE, esc, folded, table, tag
from tools.reporting.runs import Run

_MISSING = object()


def flat(settings: Mapping[str, Any], head: str = "") -> dict[str, Any]:
    """`section.key` → value; lists are values."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{head}{key}.")
        else:
            found[f"{head}{key}"] = value
    return found


def differences(runs: Sequence[Run]) -> dict[str, list[str | None]]:
    """Keys whose value is not the same in all runs → each run's value as YAML, None where it has no such key."""
    found = [flat(run.settings) for run in runs]
    keys = dict.fromkeys(key for settings in found for key in settings)
    order = [section for settings in found for section in dict.fromkeys(key.partition(".")[0] for key in settings)]
    values = {key: [settings.get(key, _MISSING) for settings in found] for key in keys}
    # A section that only some runs have stands as one value: no teacher is `teacher: null`.
    return {
        key: [None if value is _MISSING else _as_yaml(value) for value in values[key]]
        for key in sorted(keys, key=lambda key: order.index(key.partition(".")[0]))
        if len({_MISSING if value is _MISSING else _as_yaml(value) for value in values[key]}) > 1
    }


def _as_yaml(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("...\n").strip()


def differences_table(runs: Sequence[Run], colours: Mapping[str, int]) -> str:
    """Only keys that differ."""
    rows = [
        [f"<code>{esc(key)}</code>", *(NONE if value is None else f"<code>{esc(value)}</code>" for value in values)]
        for key, values in differences(runs).items()
    ]
    if not rows:
        return "<p>The runs have the same settings.</p>"
    return table(["setting", *(tag(run.name, colours[run.name]) for run in runs)], rows, "settings")


def all_settings(runs: Sequence[Run]) -> str:
    """The whole of each run, folded away."""
    return "".join(
        folded(
            f"All settings of {esc(run.name)}",
            f"<pre>{esc(yaml.safe_dump(dict(run.settings), sort_keys=False, allow_unicode=True))}</pre>",
        )
        for run in runs
        if run.settings
    )
