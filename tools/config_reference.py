"""Write the config reference into README.md, from the settings models themselves.

python -m tools.config_reference README.md
"""

import sys
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from distill.config import Config, section_models
from distill.objective_settings import OBJECTIVES
from distill.settings import Settings

BEGIN, END = "<!-- config reference: begin -->", "<!-- config reference: end -->"


def reference() -> str:
    """Markdown: one table a section."""
    parts = [_table("top level", "One run. `teacher` is needed by objectives that read one.", Config, {"precision"})]
    for name, model in section_models().items():
        parts.append(_table(f"`{name}`", model.__doc__ or "", model))
        if name == "data":
            titles = {f"`objective` (name: {kind})": settings for kind, settings in OBJECTIVES.items()}
            parts += [_table(title, settings.__doc__ or "", settings) for title, settings in titles.items()]
    return "\n\n".join(parts)


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


def with_reference(text: str) -> str:
    """The README's text with the part between the markers made anew."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{reference()}\n{END}{tail}"


def main() -> int:
    """Command line."""
    path = Path(sys.argv[1])
    path.write_text(with_reference(path.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
