"""Suites, and the models that are to be measured on them."""

from bad_inputs.case import Case, Place


def _evaluate(place: Place, *words: str, suite: str = "sets: {s: t.jsonl}", out: str = "") -> list[str]:
    path = place.file("suite.yaml", suite)
    return ["distill", "evaluate", "--suite", str(path), "--out", out or str(place.work / "out"), *words]


def _of_model(name: str, expected: str, *models: str, suite: str = "sets: {s: t.jsonl}") -> Case:
    flags = [flag for model in models for flag in ("--model", model)]
    return Case(name, expected, lambda place: _evaluate(place, *flags, suite=suite))


def _of_suite(name: str, expected: str, suite: str) -> Case:
    return _of_model(name, expected, "a=x", suite=suite)


SUITES = [
    _of_model("a model without a folder", "--model = 'a=': needs a name of letters", "a="),
    _of_model("a model with a path for a name", "--model = '../x=y': needs a name of letters", "../x=y"),
    _of_model("two models of one name", "--model = 'a=y': another one is called 'a'", "a=x", "a=y"),
    _of_model(
        "two students of runs of one name",
        "--model = 'y/r/student': another one is called 'r'; give each a name",
        "x/r/student",
        "y/r/student",
    ),
    _of_model("an address as a model", "--model = 'https://***@h/m': is an address", "a=https://u:p@h/m"),
    _of_model("nothing to measure", "--model = None: there is no model to measure; e.g. --model student=runs/x"),
    _of_model(
        "a student called like its teacher",
        "--model = 'teacher': is what the suite's teacher is called",
        "teacher=x",
        suite="teacher: {path: y}\nsets: {s: t}",
    ),
    Case(
        "a file for an evaluation",
        "--out = 'GIVEN/taken': is a file",
        lambda p: _evaluate(p, "--model", "a=x", out=str(p.file("taken", ""))),
    ),
    Case(
        "no suite",
        "--suite = 'GIVEN/none.yaml': no such file; give the path of a suite",
        lambda p: ["distill", "evaluate", "--suite", str(p.given / "none.yaml"), "--model", "a=x", "--out", "o"],
    ),
    Case(
        "an override of a suite that is none",
        "override = 'temperature': not of the form",
        lambda p: _evaluate(p, "--model", "a=x", "--", "temperature"),
    ),
    _of_suite("an empty suite", "holds no settings; give it `sets:`, `choices:` or `texts:`", ""),
    _of_suite("a suite without sets", "nothing to measure: give it `sets`, `choices` or `texts`", "seeds: [1]"),
    _of_suite("a misspelt key of a suite", "seed = [1]: unknown key; did you mean 'seeds'?", "sets: {s: t}\nseed: [1]"),
    _of_suite(
        "a misspelt key of a suite's teacher",
        "teacher.pathh = 'x': unknown key; did you mean 'path'?",
        "sets: {s: t}\nteacher: {path: y, pathh: x}",
    ),
    _of_suite("a set with a path for a name", "the name '../s' is to become a file's", "sets: {../s: t}"),
    _of_suite("a seed twice", "a seed stands twice in `seeds`", "sets: {s: t}\nseeds: [1, 1]"),
    _of_suite("two sets of one name", "two sets have one name", "sets: {s: t}\ntexts: {s: u}"),
    _of_suite(
        "no temperature",
        "temperature = 0: input should be greater than 0; see the suite reference in README.md",
        "sets: {s: t}\ntemperature: 0",
    ),
]
