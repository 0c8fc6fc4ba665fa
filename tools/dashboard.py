"""Make wandb's workspace for the runs of a project, or bring it up to date, from a file of sections and panels.

python -m tools.dashboard --entity ENTITY --project distill [--spec launch/dashboard.yaml] [--dry-run] [--json FILE]

The workspace is known by its name: the same command changes the one that it has made before. Neither `--dry-run` nor
`--json` needs a network.
"""

import argparse
import hashlib
import json
import sys
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from distill.dashboards.wandb_board import STEP, has_key
from distill.errors import EXIT_BAD_INPUT, EXIT_FAILED, BadInput, Problem
from distill.settings import Settings
from distill.settings_file import Kind, read_settings

SPEC = Path("launch/dashboard.yaml")


class Panel(Settings):
    """One of a line plot, a number a run, or a table."""

    title: str
    line: tuple[str, ...] = Field((), description="Metrics over `x`.")
    scalar: str | None = Field(None, description="A metric's latest value.")
    table: str | None = Field(None, description="A table that runs log.")
    x: str = Field(STEP, description="The line plot's axis.")
    log_y: bool = False

    @model_validator(mode="after")
    def _is_one_thing(self) -> Self:
        if sum(bool(kind) for kind in (self.line, self.scalar, self.table)) != 1:
            raise ValueError(f"panel {self.title!r} needs one of line, scalar and table")
        if not self.line and (self.log_y or self.x != STEP):
            raise ValueError(f"panel {self.title!r} is no line plot: it has neither x nor log_y")
        return self


class Spec(Settings):
    """A workspace."""

    name: str = Field(min_length=1)
    columns: tuple[str, ...] = Field((), description="Of the table of runs, pinned.")
    sections: dict[str, tuple[Panel, ...]] = Field(min_length=1)


_SPEC = Kind(
    model=Spec,
    # Panels stand in lists, under any number.
    sections=defaultdict(lambda: Panel),
    field="--spec",
    what="a dashboard, as launch/dashboard.yaml",
    holds="`sections:`",
    reference="launch/dashboard.yaml",
)


def load_spec(path: Path) -> Spec:
    """Read a dashboard's YAML.

    Raises:
        BadInput: an unreadable file, or keys that do not fit; all at once.
    """
    return read_settings(_SPEC, path, ())


def workspace(spec: Spec, entity: str, project: str) -> Any:
    """The library's object, not saved. Needs no network."""
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as workspaces

    def built(panel: Panel) -> Any:
        if panel.line:
            # None leaves a line plot as it is by default.
            return panels.LinePlot(title=panel.title, x=panel.x, y=list(panel.line), log_y=panel.log_y or None)
        if panel.scalar:
            return panels.ScalarChart(title=panel.title, metric=panel.scalar)
        return panels.WeavePanelSummaryTable(table_name=str(panel.table))

    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=spec.name,
        sections=[
            workspaces.Section(name=name, panels=[built(panel) for panel in listed], is_open=True)
            for name, listed in spec.sections.items()
        ],
        settings=workspaces.WorkspaceSettings(x_axis=STEP),
        runset_settings=workspaces.RunsetSettings(pinned_columns=[f"summary:{name}" for name in spec.columns]),
        auto_generate_panels=True,  # histograms, and what only some objectives log
    )


def serialised(made: Any) -> dict[str, Any]:
    """What would be sent to wandb's server."""
    view: dict[str, Any] = json.loads(made._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))
    return view


def save(made: Any) -> str:
    """Send a workspace to wandb's server, in place of the one of that name; its address.

    Raises:
        BadInput: the server knows no such project.
        Exception: of the library's, where the server is out of reach or refuses.
    """
    import wandb
    from wandb_workspaces.workspaces import internal

    # The server knows views by a name of its own; made from ours it can be found again.
    key = hashlib.sha256(f"{made.entity}/{made.project}/{made.name}".encode()).hexdigest()[:11]
    made._internal_name = internal._url_query_str_to_internal_name(key)
    wandb.Api(timeout=30)
    try:
        made._internal_id = internal.View.from_name(made.entity, made.project, made._internal_name).id
    except ValueError as error:
        if "Project" in str(error):
            wrong = f"{made.entity} has no such project that you can see"
            raise BadInput(Problem("--project", made.project, wrong, "start a run in it first")) from None
    return str(made.save().url)


def outline(spec: Spec) -> str:
    """The panels in words, one a line."""
    lines = []
    for name, listed in spec.sections.items():
        lines.append(name)
        for panel in listed:
            shown = f"{', '.join(panel.line)} over {panel.x}" if panel.line else panel.scalar or panel.table
            lines.append(f"  {panel.title}: {shown}")
    return "\n".join(lines)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entity", required=True, help="user or team of wandb's")
    parser.add_argument("--project", required=True, help="as `log.project` of the runs")
    parser.add_argument("--spec", type=Path, default=SPEC, help=f"YAML file (default {SPEC})")
    parser.add_argument("--dry-run", action="store_true", help="print the panels, send nothing")
    parser.add_argument("--json", type=Path, help="write what would be sent into this file, send nothing")
    try:
        return _run(parser.parse_args())
    except BadInput as error:
        print(f"dashboard: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT


def _run(args: argparse.Namespace) -> int:
    if find_spec("wandb_workspaces") is None:
        mend = "pip install wandb-workspaces==0.4.13"
        raise BadInput(Problem("tools.dashboard", "wandb-workspaces", "is not installed", mend))
    spec = load_spec(args.spec)
    made = workspace(spec, args.entity, args.project)
    if args.dry_run:
        print(outline(spec))
    if args.json is not None:
        if args.json.is_dir() or not args.json.absolute().parent.is_dir():
            wrong = "is a folder" if args.json.is_dir() else "its folder does not exist"
            raise BadInput(Problem("--json", str(args.json), wrong, "give the path of a file"))
        args.json.write_text(json.dumps(serialised(made), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(args.json)
    if args.dry_run or args.json is not None:
        return 0
    if not has_key():
        raise BadInput(Problem("WANDB_API_KEY", None, "there is no key for wandb", "set it, or run `wandb login`"))
    try:
        print(save(made))
    except BadInput:
        raise
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else ""
        print(f"dashboard: wandb does not take it ({type(error).__name__}: {first})", file=sys.stderr)
        return EXIT_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
