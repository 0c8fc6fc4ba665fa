"""Flags and files of the other commands."""

import json
from pathlib import Path

from bad_inputs.case import Case, Place, cut


def _says(name: str, expected: str, *words: str) -> Case:
    return Case(name, expected, lambda place: [word.replace("GIVEN", str(place.given)) for word in words])


def _with_student(place: Place) -> Path:
    """A run folder with a finished student."""
    place.model().rename(place.file("run/metrics.jsonl", '{"step": 1, "loss/total": 1.0}\n').parent / "student")
    return place.given / "run"


def _damaged_student(place: Place) -> list[str]:
    run = _with_student(place)
    cut(run / "student/model.safetensors", 0.5)
    return ["distill", "export", "--run", str(run), "--out", str(place.work / "out")]


def _linked_student(place: Place) -> list[str]:
    run = _with_student(place)
    (run / "student/key").symlink_to("/etc/hostname")
    return ["distill", "export", "--run", str(run), "--out", str(place.work / "out")]


def _export_below_a_file(place: Place) -> list[str]:
    return ["distill", "export", "--run", str(_with_student(place)), "--out", str(place.file("taken", "") / "out")]


def _results(place: Place) -> list[str]:
    run = _with_student(place)
    return [
        *("distill", "export", "--run", str(run), "--out", str(place.work / "out")),
        *("--results", str(place.file("results.md", b"\xff\xfe"))),
    ]


def _report(place: Place, evaluation: str, *flags: str) -> list[str]:
    """On a run, with an evaluation of that content."""
    run, path = _with_student(place), place.file("judged/evaluation.json", evaluation)
    out = ("--out", str(place.work / "report.html"))
    return ["report", str(run), "--evaluation", str(path.parent), *out, *flags]


def _report_on(place: Place, records: str) -> list[str]:
    run = place.file("run/metrics.jsonl", records).parent
    return ["report", str(run), "--out", str(place.work / "report.html")]


def _shrink(place: Place, layers: str) -> list[str]:
    return ["shrink_model", str(place.models / "teacher"), str(place.work / "out"), "--layers", layers]


def _shrink_pickles(place: Place) -> list[str]:
    folder = place.model("teacher")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return ["shrink_model", str(folder), str(place.work / "out"), "--layers", "2"]


def _dashboard(name: str, expected: str, content: str, *flags: str) -> Case:
    def command(place: Place) -> list[str]:
        path = place.file("board.yaml", content)
        words = [word.replace("WORK", str(place.work)) for word in flags]
        return ["dashboard", "--entity", "me", "--project", "mine", "--spec", str(path), "--dry-run", *words]

    return Case(name, expected, command)


_PANELS = "name: x\nsections: {Loss: [{title: Loss, line: [loss/total]}]}\n"


def _plan(*flags: str) -> list[str]:
    return ["distill", "plan", *flags]


_BOARD = ("dashboard", "--entity", "me", "--project", "mine")
COMMANDS = [
    _says("no verb", "the following arguments are required: VERB", "distill"),
    _says("an unknown verb", "invalid choice: 'trian'", "distill", "trian"),
    _says(
        "an unknown flag", "unrecognized arguments: --rank", "distill", "export", "--run", "a", "--out", "b", "--rank"
    ),
    _says("no recipe", "the following arguments are required: --config", "distill", "doctor"),
    Case("no ranks", "argument --ranks: 0 is not 1 or more", lambda p: [*p.doctor(), "--ranks", "0"]),
    Case(
        "ranks that are a word",
        "argument --ranks: invalid positive value: 'many'",
        lambda p: [*p.doctor(), "--ranks", "many"],
    ),
    _says(
        "no run", "--run = '/nowhere': has no finished student", "distill", "export", "--run", "/nowhere", "--out", "o"
    ),
    Case(
        "an export that is there",
        "--out = 'GIVEN': exists already",
        lambda p: ["distill", "export", "--run", str(_with_student(p)), "--out", str(p.given)],
    ),
    Case(
        "half a student",
        "--run = 'GIVEN/run/student': model.safetensors is no whole safetensors file",
        _damaged_student,
    ),
    Case("a student with a link", "GIVEN/run/student/key is a link; a student holds files only", _linked_student),
    Case("an export below a file", "--out = 'GIVEN/taken/out': cannot be written", _export_below_a_file),
    Case("results that are no text", "--results = 'GIVEN/results.md': cannot be read", _results),
    Case("a plan for no nodes", "--nodes = 0: is not 1 or more", lambda p: [*_plan(*p.doctor()[2:4]), "--nodes", "0"]),
    Case(
        "a plan for endless memory",
        "--gpu-memory = inf: is no rate or size above 0",
        lambda p: [*_plan(*p.doctor()[2:4]), "--gpu-memory", "inf"],
    ),
    Case("a plan for no number", "--flops = nan: is no rate", lambda p: [*_plan(*p.doctor()[2:4]), "--flops", "nan"]),
    Case(
        "a plan into a folder",
        "--json = 'GIVEN': is a folder",
        lambda p: [*_plan(*p.doctor()[2:4]), "--json", str(p.given)],
    ),
    _says("a report on no run", "RUN = '/nowhere': no metrics.jsonl in it", "report", "/nowhere", "--out", "x.html"),
    Case(
        "a report on a run before its first step",
        "RUN = 'GIVEN/run': its metrics.jsonl holds no record; wait for the run's first step",
        lambda p: _report_on(p, '{"step": 1, "lo'),
    ),
    Case(
        "a report on one run twice",
        "RUN = 'GIVEN/run': is given twice",
        lambda p: ["report", *[str(_report_on(p, '{"step": 1}\n')[1])] * 2, "--out", "x.html"],
    ),
    Case(
        "half an evaluation",
        "--evaluation = 'GIVEN/judged/evaluation.json': is no evaluation",
        lambda p: _report(p, '{"figures":'),
    ),
    Case(
        "another evaluation",
        "is no evaluation (at suite); give what `distill evaluate --out`",
        lambda p: _report(p, json.dumps({"figures": {}})),
    ),
    Case(
        "an evaluation's file",
        "--evaluation = 'GIVEN/judged.json': is a file; give the folder of `distill evaluate --out`",
        lambda p: [*_report_on(p, '{"step": 1}\n'), "--evaluation", str(p.file("judged.json", "{}"))],
    ),
    Case(
        "a report on no evaluation",
        "--evaluation = '/nowhere': no such folder; run `distill evaluate` first",
        lambda p: [*_report_on(p, '{"step": 1}\n'), "--evaluation", "/nowhere"],
    ),
    Case(
        "a report without a place",
        "--out = '/nowhere/r.html': its folder does not exist",
        lambda p: _report(p, "{}", "--out", "/nowhere/r.html"),
    ),
    Case(
        "figures into a file",
        "--png = 'GIVEN/taken': is a file; give a folder",
        lambda p: _report(p, "{}", "--png", str(p.file("taken", ""))),
    ),
    _says("no GGUF file", "FILE = '/no.gguf': no such file", "import_gguf", "/no.gguf", "out"),
    Case(
        "text as GGUF",
        "FILE = 'GIVEN/a.gguf': is no GGUF file",
        lambda p: ["import_gguf", str(p.file("a.gguf", "x")), "out"],
    ),
    Case(
        "half a GGUF file",
        "FILE = 'GIVEN/a.gguf': cannot be read",
        lambda p: ["import_gguf", str(p.file("a.gguf", b"GGUF\3\0")), "out"],
    ),
    Case("too many layers", "--layers = 99: the model has 3 layers; give 2 to 3", lambda p: _shrink(p, "99")),
    Case(
        "pickles to shrink",
        "its weights are pickles only (pytorch_model.bin), files that may run code when they are read; make "
        "safetensors of them, or give --allow-pickle",
        _shrink_pickles,
    ),
    _says("no run to look into", "RUN = '/nowhere': no checkpoint there", "inspect_rollouts", "/nowhere"),
    _says("no such dashboard", "--spec = 'x.yaml': no such file", *_BOARD, "--spec", "x.yaml"),
    _dashboard("a dashboard of nothing", "sections = None: missing; add it", "name: x\n"),
    _dashboard(
        "a dashboard without sections", "sections = {}: dictionary should have at least 1", "{name: x, sections: {}}"
    ),
    _dashboard("a misspelt panel", "unknown key; did you mean 'line'?", _PANELS.replace("line:", "lines:")),
    _dashboard(
        "a panel of two kinds",
        "needs one of line, scalar and table",
        _PANELS.replace("title: Loss", "title: a, scalar: b"),
    ),
    _dashboard("a panel of no kind", "panel 'Loss' needs one of line", _PANELS.replace(", line: [loss/total]", "")),
    _dashboard("an axis of a table", "is no line plot", _PANELS.replace("line: [loss/total]", "table: a, x: b")),
    _dashboard("a dashboard into a folder", "--json = 'WORK': is a folder", _PANELS, "--json", "WORK"),
    _dashboard("a dashboard into nowhere", "its folder does not exist", _PANELS, "--json", "WORK/a/b.json"),
]
