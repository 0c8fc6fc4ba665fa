"""What `distill judge` is given: flags, the folder of an evaluation, an endpoint."""

import json
from collections.abc import Callable
from pathlib import Path

from judge_server import evaluated

from bad_inputs.case import Case, Place

# Set everywhere, and no secret: what is missing is another thing.
_KEY = ("--key-variable", "PATH")
_NOWHERE = "http://127.0.0.1:9/v1"


def _judge(folder: Path, *flags: str, url: str = _NOWHERE) -> list[str]:
    words = ["distill", "judge", str(folder), "--judge-url", url, "--judge-model", "j", "--judge-max-retries", "0"]
    return [*words, *(() if "--key-variable" in flags else _KEY), *flags]


def _case(name: str, expected: str, *flags: str, url: str = _NOWHERE) -> Case:
    """Of an evaluation of the models a and b on the set held-out."""
    return Case(name, expected, lambda place: _judge(_evaluated(place), *flags, url=url))


def _evaluated(place: Place, references: bool = True) -> Path:
    (place.given / "e").mkdir()
    return evaluated(place.given / "e", references=references)


def _changed(name: str, expected: str, file: str, change: Callable[[str], str]) -> Case:
    """Of an evaluation of which one file is another."""

    def command(place: Place) -> list[str]:
        path = _evaluated(place) / file
        content = change(path.read_text() if path.exists() else "")
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        return _judge(place.given / "e")

    return Case(name, expected, command)


def _without(name: str, expected: str, file: str) -> Case:
    def command(place: Place) -> list[str]:
        (_evaluated(place) / file).unlink()
        return _judge(place.given / "e")

    return Case(name, expected, command)


_COSTS = ("--price-in", "1", "--price-out", "1", "--max-cost", "1")
JUDGING = [
    Case("no folder to judge", "DIR = '/nowhere': no such folder; give the", lambda p: _judge(Path("/nowhere"))),
    Case("no evaluation to judge", "DIR = 'GIVEN': no evaluation.json in it; give the", lambda p: _judge(p.given)),
    _changed(
        "half an evaluation to judge", "GIVEN/e/evaluation.json': is no evaluation", "evaluation.json", lambda t: t[:9]
    ),
    _changed(
        "an evaluation of another kind", "is no evaluation by a suite", "evaluation.json", lambda t: '{"figures": 3}'
    ),
    _changed(
        "a list as an evaluation",
        "is no evaluation by a suite",
        "evaluation.json",
        lambda t: json.dumps([json.loads(t)]),
    ),
    _changed(
        "an evaluation without prompts",
        "DIR = 'GIVEN/e': its suite has no `sets`, so nobody responded",
        "evaluation.json",
        lambda t: t.replace('{"held-out": "x.jsonl"}', "{}"),
    ),
    _without("no questions to judge by", "held-out.jsonl': is missing; run the same", "questions/held-out.jsonl"),
    _changed(
        "questions of another kind", "held-out.jsonl': cannot be read", "questions/held-out.jsonl", lambda t: "{}\n"
    ),
    _without("no responses to judge", "GIVEN/e/b/held-out.seed-10.jsonl': is missing", "b/held-out.seed-10.jsonl"),
    _changed(
        "half the responses",
        "GIVEN/e/b/held-out.seed-10.jsonl': holds 3 responses, its set has 4 rows",
        "b/held-out.seed-10.jsonl",
        lambda t: t[:-9],
    ),
    _changed("no line of responses", "holds no responses", "b/held-out.seed-10.jsonl", lambda t: ""),
    _changed("responses that are no text", "holds no responses", "b/held-out.seed-10.jsonl", lambda t: t + "3\n"),
    _changed(
        "responses of another model",
        "is newer than evaluation.json, or older",
        "b/held-out.seed-10.jsonl",
        lambda t: t.replace("weights of b", "weights of c"),
    ),
    _changed(
        "a judge's reply that is none",
        "j.replies.jsonl:1': is no judge's reply",
        "judge/j.replies.jsonl",
        lambda t: "{}\n",
    ),
    Case(
        "scores without references",
        "--set = 'held-out': has no references",
        lambda place: _judge(_evaluated(place, references=False)),
    ),
    _case("a model that was not measured", "--model = 'c': is not in this evaluation; it has a, b", "--model", "c"),
    _case("a pair with a stranger", "--pair = 'c': is not in this evaluation; it has a, b", "--pair", "a", "c"),
    _case("a set that was not measured", "--set = 'x': is not in this evaluation; it has held-out", "--set", "x"),
    _case("a seed that was not drawn", "--seed = 11: is not in this evaluation; it has 10", "--seed", "11"),
    _case("a model against itself", "--pair = 'a a': is one model; name two", "--pair", "a", "a"),
    _case("a pair twice", "--pair = 'b a': stands there twice", "--pair", "a", "b", "--pair", "b", "a"),
    _case("a pair and a model", "--model = ['a']: --pair names the models", "--pair", "a", "b", "--model", "a"),
    _case("half a pair", "argument --pair: expected 2 arguments", "--pair", "a"),
    _case("a judge's address without http", "--judge-url = 'localhost:80/v1': is no http", url="localhost:80/v1"),
    _case("a judge without a host", "--judge-url = 'http:///v1': is no http address", url="http:///v1"),
    _case("a judge's port that is none", "is no http address; e.g. http://localhost", url="http://h:x/v1"),
    _case("a judge's address with a key in it", "has a part after ? or #", url="http://h/v1?x=y"),
    _case("a judge's password", "--judge-url = 'ftp://***@h/v1': is no http", url="ftp://u:p@h/v1"),
    _case(
        "a judge that is not there",
        f"--judge-url = '{_NOWHERE}': cannot be reached ([Errno 111] Connection refused); start the server there, or",
    ),
    _case("a judge whose name nobody knows", "cannot be reached (", url="http://no-such-host.invalid/v1"),
    _case(
        "no key for a judge",
        "NO_SUCH_VARIABLE = None: is not set in the environment; export it, or name another",
        *("--key-variable", "NO_SUCH_VARIABLE"),
    ),
    _case("a key for its name", "--key-variable = '***': is no name of a variable", "--key-variable", "sk-0123"),
    _case("a cost without prices", "--max-cost = 1.0: nothing says what tokens cost", "--max-cost", "1"),
    _case("half a price", "--price-out = None: is missing beside the other price", "--price-in", "1"),
    _case("a price below 0", "argument --price-in: -1 is not a finite number from 0 up", "--price-in", "-1"),
    _case("a cost of nothing", "argument --max-cost: 0 is not above 0", *_COSTS[:-1], "0"),
    _case("a cost below a request's", "--max-cost = 1e-09: one request may cost 0.00", *_COSTS[:-1], "1e-9"),
    _case("a cost without end", "a reply may be of any length", *_COSTS, "--option", "max_tokens=null"),
    _case("a request field without a value", "--option = 'seed': not of the form name=value", "--option", "seed"),
    _case("a request field that is ours", "--option = 'model=x': model is not to be changed", "--option", "model=x"),
    _case("replies of half a token", "'max_tokens=0.5': is no number of tokens", "--option", "max_tokens=0.5"),
    _case("an endless pace", "--requests-per-minute: inf is not a finite", "--requests-per-minute", "inf"),
    _case("retries below 0", "argument --judge-max-retries: -1 is below 0", "--judge-max-retries", "-1"),
    _case("no asks", "argument --asks: 0 is not 1 or more", "--asks", "0"),
]
