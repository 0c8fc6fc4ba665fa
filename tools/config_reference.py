"""Write the references of recipes and suites into README.md, from the settings models themselves.

python -m tools.config_reference README.md
"""

import sys
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from distill.config import Config, section_models
from distill.evaluation.suite import Suite
from distill.objective_settings import OBJECTIVES
from distill.settings import Settings


def config_reference() -> str:
    """Markdown: one table a section of a recipe."""
    parts = [_table("top level", "One run. `teacher` is needed by objectives that read one.", Config, {"precision"})]
    for name, model in section_models().items():
        parts.append(_table(f"`{name}`", model.__doc__ or "", model))
        if name == "data":
            titles = {f"`objective` (name: {kind})": settings for kind, settings in OBJECTIVES.items()}
            parts += [_table(title, settings.__doc__ or "", settings) for title, settings in titles.items()]
    return "\n\n".join(parts)


def suite_reference() -> str:
    """Markdown: the table of a suite; its teacher has the keys of a recipe's."""
    return _table("a suite", Suite.__doc__ or "", Suite)


REFERENCES = {"config": config_reference, "suite": suite_reference}
"""What stands between the markers of a name."""


def _table(title: str, about: str, model: type[Settings], only: set[str] | None = None) -> str:
    rows = [
        f"| `{name}` | {_default(field)} | {field.description or ''} |"
        for name, field in model.model_fields.items()
        if (only is None or name in only) and name != "name"
    ]
    table = ["| key | default | meaning |", "|---|---|---|", *rows] if rows else []
    return "\n".join([f"#### {title}", "", " ".join(about.split()), "", *table]).rstrip()


def _default(field: FieldInfo) -> str:
    extra: Any = field.json_schema_extra
    if isinstance(extra, dict) and extra.get("preset"):
        return "by preset"
    if field.is_required():
        return "required"
    return "none" if field.default is None else f"`{field.default}`"


def with_references(text: str) -> str:
    """The README's text with the parts between markers made anew."""
    for name, reference in REFERENCES.items():
        begin, end = f"<!-- {name} reference: begin -->", f"<!-- {name} reference: end -->"
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition(end)
        text = f"{head}{begin}\n{reference()}\n{end}{tail}"
    return text


def main() -> int:
    """Command line."""
    path = Path(sys.argv[1])
    path.write_text(with_references(path.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
