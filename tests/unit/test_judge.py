"""`distill judge` against a server that speaks the protocol, and fails in all the ways that servers have."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from judge_server import FIRST, SIX_OF_TEN, Answer, Endpoint, endpoint, evaluated

from distill import cli
from distill.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_PREEMPTED
from distill.evaluation.judge.replies import GARBAGE, Reply, ReplyFile
from distill.evaluation.judge.tasks import Place, Task, longest_prompt

KEY = "sk-5ecr3tmark-0123456789"
PAIR = ("--pair", "a", "b")


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return evaluated(tmp_path)


def judge(folder: Path, url: str, *flags: str) -> int:
    words = ["judge", str(folder), "--judge-url", url, "--judge-model", "org/judge", "--judge-timeout", "5"]
    return cli.main([*words, *flags])


def entries(folder: Path) -> list[dict[str, Any]]:
    return list(json.loads((folder / "judge.json").read_text())["judgements"])


def replies(folder: Path) -> Path:
    return folder / "judge/org_judge.replies.jsonl"


def longer(prompt: str) -> str:
    """A real opinion: model a's responses are the better ones."""
    return '{"better": 1}' if prompt.index("Response of a") < prompt.index("Response of b") else '{"better": 2}'


def test_pairs_are_asked_in_both_orders(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with endpoint(lambda prompt, number: Answer(longer(prompt))) as server:
        assert judge(folder, server.url, *PAIR) == 0
    assert len(server.bodies) == len(set(server.prompts)) == 8
    for row in range(4):
        both = [prompt for prompt in server.prompts if f"Question {row}?" in prompt]
        assert len({prompt.index("Response of a") < prompt.index("Response of b") for prompt in both}) == 2
    (entry,) = entries(folder)
    assert entry["figures"]["win_rate"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert entry["figures"]["disagreement"]["value"] == 0
    assert (entry["questions"], entry["verdicts"], entry["replies"], entry["missing"]) == (8, 8, 8, [])
    assert entry["tokens"] == {"prompt": 800, "completion": 80, "replies_not_counted": 0}
    assert "a against b  100.0 [100.0, 100.0]" in capsys.readouterr().out


def test_a_judge_that_always_says_the_first_gives_half(folder: Path) -> None:
    with endpoint(lambda prompt, number: Answer(FIRST)) as server:
        assert judge(folder, server.url, *PAIR) == 0
    figures = entries(folder)[0]["figures"]
    assert figures["win_rate"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert figures["disagreement"]["value"] == 1


def test_scores_stand_beside_the_references(folder: Path) -> None:
    """The judge gives 6 to what stands first, 10 to the other: half of the rows have the reference first."""
    with endpoint(lambda prompt, number: Answer(SIX_OF_TEN)) as server:
        assert judge(folder, server.url, "--option", "temperature=null", "--option", "top_p=0.5") == 0
    assert len(server.bodies) == 8  # two models, four rows
    assert all(("Reference" in prompt, "Response of" in prompt) == (True, True) for prompt in server.prompts)
    found = entries(folder)
    assert [entry["models"] for entry in found] == [["a"], ["b"]]
    for entry in found:
        assert {name: of["value"] for name, of in entry["figures"].items()} == {"score": 8, "reference": 8, "ratio": 1}
        assert entry["options"] == {"max_tokens": 512, "seed": 0, "top_p": 0.5}
        assert entry["urls"] == [server.url]
    fields = {name: value for name, value in server.bodies[0].items() if name != "messages"}
    assert fields == {"model": "org/judge", "max_tokens": 512, "seed": 0, "top_p": 0.5}


def test_what_was_asked_is_not_asked_again(folder: Path) -> None:
    with endpoint(lambda prompt, number: Answer(longer(prompt))) as server:
        judge(folder, server.url, *PAIR)
        first = (folder / "judge.json").read_bytes()
        assert judge(folder, server.url, *PAIR) == 0
        assert len(server.bodies) == 8
        assert (folder / "judge.json").read_bytes() == first
        assert judge(folder, server.url, *PAIR, "--judge-seed", "1") == 0
        assert len(server.bodies) == 16  # other requests


def test_equal_responses_make_one_question(tmp_path: Path) -> None:
    folder = evaluated(tmp_path, rows=3)
    source = folder / "a/held-out.seed-10.jsonl"
    (folder / "b/held-out.seed-10.jsonl").write_text(source.read_text().replace("weights of a", "weights of b"))
    with endpoint(lambda prompt, number: Answer(FIRST, delay=0.2)) as server:
        assert judge(folder, server.url, *PAIR) == 0
    assert len(server.bodies) == 3
    assert entries(folder)[0]["figures"]["win_rate"]["value"] == 0.5


def test_figures_of_other_commands_stay(folder: Path) -> None:
    with endpoint(lambda prompt, number: Answer(SIX_OF_TEN if "points_1" in prompt else FIRST)) as server:
        judge(folder, server.url, *PAIR)
        judge(folder, server.url, "--model", "a")
        judge(folder, server.url, "--model", "b")
    assert [(entry["mode"], entry["models"]) for entry in entries(folder)] == [
        ("pairs", ["a", "b"]),
        ("score", ["a"]),
        ("score", ["b"]),
    ]
    for name in ("evaluation.json", "b/held-out.seed-10.jsonl"):  # b was trained anew
        path = folder / name
        path.write_text(path.read_text().replace("weights of b", "other weights"))
    with endpoint(lambda prompt, number: Answer(SIX_OF_TEN)) as server:
        judge(folder, server.url, "--model", "a")
    assert [entry["models"] for entry in entries(folder)] == [["a"]]


def test_responses_are_those_of_their_row_in_whatever_order_they_lie(folder: Path) -> None:
    path = folder / "a/held-out.seed-10.jsonl"
    first, *lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([first, *reversed(lines)]))
    with endpoint(lambda prompt, number: Answer(SIX_OF_TEN)) as server:
        assert judge(folder, server.url, "--model", "a") == 0
    texts = {row["row"]: row["text"] for row in map(json.loads, lines)}
    for row, text in texts.items():
        (prompt,) = [prompt for prompt in server.prompts if f"Question {row}?" in prompt]
        assert f"\n{text}\n" in prompt


def test_a_servers_page_holds_no_verdict(tmp_path: Path) -> None:
    task = Task(Place("pairs", "held-out", 10, 0, "a", "b"), "?", "key")
    with ReplyFile(tmp_path / "x.replies.jsonl") as file:
        file.add(task, Reply('{"error": {"better": 1}}', GARBAGE, None, None, "http://x", 0))
        assert file.verdict(task) is None
        file.add(task, Reply('{"better": 2}', "stop", None, None, "http://x", 0))
        assert file.verdict(task) == (0.0, 1.0)


def test_half_a_line_of_a_killed_command_is_dropped_and_the_rest_kept(folder: Path) -> None:
    with endpoint(lambda prompt, number: Answer(longer(prompt))) as server:
        judge(folder, server.url, *PAIR)
        whole = (folder / "judge.json").read_bytes()
        lines = replies(folder).read_bytes().splitlines(keepends=True)
        replies(folder).write_bytes(b"".join(lines[:5]) + lines[5][:-20])
        for _ in range(2):  # the second reads what the first has added to
            assert judge(folder, server.url, *PAIR) == 0
            assert len(server.bodies) == 8 + 3
    assert (folder / "judge.json").read_bytes() == whole
    assert replies(folder).read_bytes().count(b"\n") == 8


def test_a_killed_command_goes_on(folder: Path, root: Path) -> None:
    command = [sys.executable, "-m", "distill", "judge", str(folder), "--judge-model", "org/judge", *PAIR]
    with endpoint(lambda prompt, number: Answer(longer(prompt), delay=0.2)) as server:
        flags = ["--judge-url", server.url, "--concurrency", "1"]
        process = subprocess.Popen([*command, *flags], cwd=root, env=os.environ | {"PYTHONPATH": str(root)})
        try:
            wait_until(lambda: replies(folder).exists() and replies(folder).read_bytes().count(b"\n") >= 3)
        finally:
            process.kill()
            process.wait()
        kept = replies(folder).read_bytes().count(b"\n")
        before = len(server.bodies)
        assert 3 <= kept < 8
        assert not (folder / "judge.json").exists()
        assert judge(folder, server.url, *PAIR) == 0
        assert len(server.bodies) - before == 8 - kept
    assert entries(folder)[0]["figures"]["win_rate"]["value"] == 1


def wait_until(true: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_two_commands_do_not_write_to_one_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def answer(prompt: str, number: int) -> Answer:
        asked.set()
        go_on.wait(20)
        return Answer(FIRST)

    with endpoint(answer) as server:
        codes: list[int] = []
        other = threading.Thread(target=lambda: codes.append(judge(folder, server.url, *PAIR, "--judge-timeout", "30")))
        other.start()
        assert asked.wait(20)
        assert judge(folder, server.url, *PAIR) == EXIT_BAD_INPUT
        assert "another `distill judge` writes to it" in capsys.readouterr().err
        go_on.set()
        other.join()
    assert codes == [0]


def test_failures_that_pass_are_tried_again(folder: Path) -> None:
    """Each of these once, at first: too many requests, a broken server, garbage, silence for too long."""
    failures = {
        1: Answer("slow down", 429, headers={"Retry-After": "0.05"}),
        2: Answer("broken", 500),
        3: Answer(raw=b"<html>a proxy's page</html>"),
        4: Answer(longer("Response of a, Response of b"), delay=2),
    }
    with endpoint(lambda prompt, number: failures.get(number, Answer(longer(prompt)))) as server:
        assert judge(folder, server.url, *PAIR, "--judge-timeout", "1", "--concurrency", "1") == 0
    assert len(server.bodies) == 8 + 4
    (entry,) = entries(folder)
    assert (entry["verdicts"], entry["replies"], entry["unparsable_replies"]) == (8, 9, 1)
    assert entry["figures"]["win_rate"]["value"] == 1
    assert sum(json.loads(line)["reply"]["retries"] for line in replies(folder).read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("answer", "code", "said"),
    [
        (Answer("overloaded", 503), EXIT_FAILED, "fails (503: overloaded), 2 times; ask more slowly"),
        (Answer("no credit", 429), EXIT_FAILED, "fails (429: no credit), 2 times"),
        (Answer(delay=1.5), EXIT_FAILED, "was silent for 0.5 s, 2 times; raise --judge-timeout"),
        (
            Answer(f"unknown key {KEY}", 401),
            EXIT_BAD_INPUT,
            "refuses the key (401: unknown key ***); see --key-variable",
        ),
        (
            Answer("no such model", 404),
            EXIT_BAD_INPUT,
            "no such model (404: no such model); see --judge-model org/judge",
        ),
        (Answer("what is seed", 400), EXIT_BAD_INPUT, "does not take our requests (400: what is seed); change their"),
        (Answer(raw=b"<html>hello</html>"), EXIT_BAD_INPUT, "sends no chat completion, but '<html>hello</html>'; most"),
        (Answer(raw=b'{"choices": []}'), EXIT_BAD_INPUT, "sends no chat completion"),
    ],
)
def test_a_judge_that_cannot_be_asked(
    answer: Answer, code: int, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with endpoint(lambda prompt, number: answer) as server:
        assert judge(folder, server.url, *PAIR, "--judge-max-retries", "1", "--judge-timeout", "0.5") == code
    err = capsys.readouterr().err
    assert f"--judge-url = '{server.url}': " in err
    assert said in err
    assert KEY not in err
    assert "Traceback" not in err
    assert not (folder / "judge.json").exists()


def test_a_server_that_goes_away_is_named_and_nothing_lost(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(prompt: str, number: int) -> Answer:
        if number == 3:
            leaving.set()
        return Answer(longer(prompt)) if number < 3 else Answer("gone", 502)

    leaving = threading.Event()
    flags = (*PAIR, "--judge-max-retries", "0", "--concurrency", "1")
    with endpoint(answer) as server:
        assert judge(folder, server.url, *flags) == EXIT_FAILED
    assert "the same command goes on" in capsys.readouterr().err
    assert judge(folder, server.url, *flags) == EXIT_BAD_INPUT
    err = capsys.readouterr().err
    assert f"'{server.url}': cannot be reached (" in err
    assert "start the server there" in err
    with endpoint(lambda prompt, number: Answer(longer(prompt))) as server:
        assert judge(folder, server.url, *flags) == 0
        assert len(server.bodies) == 5


def test_replies_without_a_verdict_are_asked_again_and_then_told(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(prompt: str, number: int) -> Answer:
        return Answer("I will not say.", finish="length") if "Question 2?" in prompt else Answer(longer(prompt))

    with endpoint(answer) as server:
        assert judge(folder, server.url, *PAIR, "--asks", "2") == EXIT_FAILED
        again = [body for body in server.bodies if "Question 2?" in body["messages"][0]["content"]]
        assert len(again) == 4
        assert sorted(body["seed"] for body in again) == [0, 0, 1, 1]
        assert len(set(server.prompts)) == len(server.prompts) == 6 + 4
        said = capsys.readouterr()
        place = "held-out row 2, seed 10, a before b: no verdict in 2 replies; the last, cut off: 'I will not say.'"
        assert "2 questions have no verdict:" in said.err
        assert place in said.err
        assert "6 of 8" in said.out
        assert "4 replies, old ones included, hold no verdict" in said.err
        (entry,) = entries(folder)
        assert entry["missing"][0] == place
        assert entry["unparsable_replies"] == 4
        assert entry["figures"]["win_rate"]["value"] == 1
        asked = len(server.bodies)
        assert judge(folder, server.url, *PAIR, "--asks", "2") == EXIT_FAILED
        assert len(server.bodies) == asked
        assert judge(folder, server.url, *PAIR, "--asks", "3") == EXIT_FAILED
        assert len(server.bodies) == asked + 2


def test_one_request_that_is_refused_does_not_stop_the_others(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(prompt: str, number: int) -> Answer:
        return Answer("too long", 400) if "Question 3?" in prompt else Answer(longer(prompt))

    with endpoint(answer) as server:
        assert judge(folder, server.url, *PAIR) == EXIT_FAILED
    assert len(server.bodies) == 8
    assert "held-out row 3, seed 10, b before a: the judge refuses it (400: too long)" in capsys.readouterr().err
    assert entries(folder)[0]["verdicts"] == 6


def test_costs_stay_below_their_limit_and_the_same_command_goes_on(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In millionths, a request may cost a prompt of as many tokens as bytes, and ten for each of 100 tokens of a reply.
    It does cost 100 + 10 × 10 = 200: with room for one at its worst and for 500 more, three are asked."""
    prices = ("--price-in", "1", "--price-out", "10", "--judge-max-tokens", "100")
    with endpoint(lambda prompt, number: Answer(longer(prompt))) as server:
        limit = (longest(folder, server) + 100 * 10 + 500) / 1e6
        flags = (*PAIR, *prices, "--max-cost", str(limit))
        assert judge(folder, server.url, *flags) == EXIT_PREEMPTED
        assert len(server.bodies) == 3
        err = capsys.readouterr().err
        assert "(0.0006 spent): 5 questions have no verdict yet; the same command goes on" in err
        (entry,) = entries(folder)
        assert entry["cost"] == {"total": pytest.approx(6e-4), "per_million_prompt": 1, "per_million_completion": 10}
        assert (entry["verdicts"], len(entry["missing"])) == (3, 5)
        assert entry["missing"][0].endswith(": not asked yet")
        assert judge(folder, server.url, *flags) == EXIT_PREEMPTED
        assert judge(folder, server.url, *flags) == 0
        assert len(server.bodies) == 8
        assert entries(folder)[0]["figures"]["win_rate"]["value"] == 1


def longest(folder: Path, server: Endpoint) -> int:
    """Tokens that a prompt may have, found by asking another judge the same."""
    words = ["judge", str(folder), "--judge-url", server.url, "--judge-model", "other", *PAIR]
    assert cli.main(words) == 0
    found = max(longest_prompt(body) for body in server.bodies)
    (folder / "judge.json").unlink()
    server.bodies.clear()
    return found


def test_a_count_below_0_is_none(folder: Path) -> None:
    usage = {"prompt_tokens": -10, "completion_tokens": 10}
    with endpoint(lambda prompt, number: Answer(FIRST, usage=usage)) as server:
        assert judge(folder, server.url, *PAIR) == 0
    assert entries(folder)[0]["tokens"] == {"prompt": 0, "completion": 80, "replies_not_counted": 8}


def test_a_server_that_counts_no_tokens_is_taken_to_have_used_the_most(folder: Path) -> None:
    prices = ("--price-in", "1", "--price-out", "1", "--judge-max-tokens", "100")
    with endpoint(lambda prompt, number: Answer(longer(prompt), usage=None)) as server:
        limit = (longest(folder, server) + 100) * 2.5 / 1e6
        assert judge(folder, server.url, *PAIR, *prices, "--max-cost", str(limit)) == EXIT_PREEMPTED
        assert len(server.bodies) == 2
    assert entries(folder)[0]["tokens"] == {"prompt": 0, "completion": 0, "replies_not_counted": 2}


def test_so_many_requests_run_at_once(folder: Path) -> None:
    with endpoint(lambda prompt, number: Answer(longer(prompt), delay=0.3)) as server:
        assert judge(folder, server.url, *PAIR, "--concurrency", "3") == 0
    assert server.most_at_once == 3


def took(server: Endpoint) -> float:
    return server.times[-1] - server.times[0]


def test_requests_keep_their_pace(tmp_path: Path) -> None:
    """Ten requests, a tenth of a second apart; without the limit they take a twentieth of a second together."""
    folder = evaluated(tmp_path, rows=5)
    with endpoint(lambda prompt, number: Answer(longer(prompt))) as server:
        assert judge(folder, server.url, *PAIR, "--requests-per-minute", "600") == 0
    assert len(server.times) == 10
    assert took(server) > 0.6


def test_retries_keep_the_pace_too(tmp_path: Path) -> None:
    folder = evaluated(tmp_path, rows=1)
    busy = Answer("busy", 429, headers={"Retry-After": "0.01"})
    with endpoint(lambda prompt, number: Answer(FIRST) if number >= 4 else busy) as server:
        assert judge(folder, server.url, *PAIR, "--requests-per-minute", "240") == 0
    assert len(server.times) == 6
    assert took(server) > 0.9


def test_tokens_keep_their_pace(tmp_path: Path) -> None:
    """110 tokens a request at 33,000 a minute: five a second, once the server's counts have replaced our bounds of
    2,000, which alone would make it half a minute."""
    folder = evaluated(tmp_path, rows=5)
    with endpoint(lambda prompt, number: Answer(longer(prompt))) as server:
        assert judge(folder, server.url, *PAIR, "--tokens-per-minute", "33000") == 0
    assert 1.4 < took(server) < 15


def test_keys_and_passwords_stay_where_they_are(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Even if a server sends them back."""
    with endpoint(lambda prompt, number: Answer(f"{FIRST} {KEY}")) as server:
        url = server.url.replace("http://", "http://me:5ecr3tmark-pass@")
        assert judge(folder, url, *PAIR) == 0
    assert server.headers[0]["authorization"].startswith("Basic ")
    with endpoint(lambda prompt, number: Answer(SIX_OF_TEN)) as server:
        assert judge(folder, server.url) == 0
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    said = "".join(capsys.readouterr())
    written = "".join(path.read_text() for path in folder.rglob("*") if path.is_file())
    assert "5ecr3tmark" not in said + written
    assert entries(folder)[0]["urls"][0].startswith("http://127.0.0.1:")


def test_another_variable_may_hold_the_key(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTHER", "another-key")
    monkeypatch.delenv("OPENAI_API_KEY")
    with endpoint(lambda prompt, number: Answer(FIRST)) as server:
        assert judge(folder, server.url, *PAIR, "--key-variable", "OTHER") == 0
    assert server.headers[0]["authorization"] == "Bearer another-key"


def test_a_judge_needs_no_torch(folder: Path, root: Path) -> None:
    """Seconds at each start, and a machine that need not have it."""
    with endpoint(lambda prompt, number: Answer(FIRST)) as server:
        words = ["judge", str(folder), "--judge-url", server.url, "--judge-model", "j", *PAIR]
        code = (
            f"import sys; from distill.cli import main; code = main({words!r});"
            "print([name for name in ('torch', 'transformers', 'deepspeed') if name in sys.modules]); sys.exit(code)"
        )
        env = os.environ | {"PYTHONPATH": str(root)}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
