"""The report's page: what stands on it is what the runs and evaluations say, and nothing of it is dangerous."""

import re
from pathlib import Path

import numpy as np
import pytest
from reports import (
    SFT,
    Element,
    difference,
    evaluation,
    figures,
    judged_folder,
    make_run,
    points,
    read,
    records,
    two_runs,
    write_evaluation,
)

from tools.reporting import costs, settings
from tools.reporting.charts import bars, thin
from tools.reporting.evaluations import read_evaluation
from tools.reporting.page import page
from tools.reporting.png import write_pngs
from tools.reporting.report import Report
from tools.reporting.results import best_student
from tools.reporting.runs import read_runs

HOSTILE = """</script><script>alert(1)</script>'"><img src=x onerror=alert(2)><svg onload=alert(3)>&amp;"""


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    return two_runs(tmp_path)


@pytest.fixture
def judged(tmp_path: Path) -> Path:
    return judged_folder(tmp_path)


def made(runs: list[Path], *evaluations: Path) -> Element:
    return read(page(Report(read_runs(runs), [read_evaluation(folder) for folder in evaluations])))


def sections(document: Element) -> list[str]:
    return [one.attributes["id"] or "" for one in document.all("section") if "id" in one.attributes]


def table(document: Element, section: str, number: int = 0) -> dict[str, dict[str, Element]]:
    """First cell's text → heading → cell."""
    head, *body = document.by_id(section).all("table")[number].rows()
    names = [cell.text for cell in head]
    return {row[0].text: dict(zip(names, row, strict=True)) for row in body}


def test_the_page_has_all_sections_and_links_to_each(two: list[Path], judged: Path) -> None:
    document = made(two, judged)
    expected = ["results", "positions", "responses", "settings", "curves", "rollouts", "costs"]
    assert sections(document) == expected
    links = [link.attributes["href"] for link in document.all("nav")[0].all("a")]
    assert links == [f"#{name}" for name in expected]
    assert document.all("h1")[0].text == "sft · minillm"
    cards = [card.text for card in document.all("div", "card")]
    assert ["models/big" in card and "minillm" in card for card in cards] == [False, True]
    assert "10.0 at step 60" in cards[0]


def test_without_evaluation_and_settings_a_page_is_made_of_metrics(tmp_path: Path) -> None:
    document = made([make_run(tmp_path / "bare", [{"step": 1, "loss/total": 1.0}])])
    assert sections(document) == ["curves"]
    assert "Nothing is validated or evaluated yet." in document.text


def test_many_runs_share_every_chart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"run{place}", records(5, level=place + 1.0), SFT) for place in range(16)]
    document = made(runs)
    (chart,) = [one for one in document.by_id("curves").all("figure") if "loss/total" in one.text]
    lines = chart.all("polyline", "line")
    looks = [tuple(line.classes) for line in lines]
    assert [line.attributes["data-series"] for line in lines] == [run.name for run in runs]
    assert len(set(looks)) == 16, "beyond the palette lines must be dashed, then dotted"
    assert len(document.all("button")) == 16


def test_the_table_holds_the_evaluation_s_figures(two: list[Path], judged: Path) -> None:
    found = table(made(two, judged), "results")
    assert list(found) == ["sft", "minillm", "teacher"]
    cell = found["minillm"]["Rouge-L ↑"]
    assert [part.text for part in cell.all() if part.tag in ("b", "small") and part.text] == ["15.2", "14.8 – 15.8"]
    assert "1.750" in found["sft"]["KL(q‖p) ↓"].text
    assert "1.700 – 1.800" in found["sft"]["KL(q‖p) ↓"].text
    assert "exact ↑" not in found["sft"], "what nobody has measured has no column"
    document = made(two, judged)
    assert [heading.text for heading in document.by_id("results").all("h4")] == ["held-out", "pets", "wiki"]
    assert "0.250" in table(document, "results", 2)["sft"]["ECE ↓"].text
    assert "31.50" in table(document, "results", 3)["minillm"]["perplexity ↓"].text


def test_best_is_marked_only_where_the_differences_are_sure(two: list[Path], judged: Path) -> None:
    document = made(two, judged)
    found = table(document, "results")
    marked = [(model, name) for model, row in found.items() for name, cell in row.items() if "best" in cell.classes]
    assert marked == [("minillm", "Rouge-L ↑")], "the interval of the KL's difference holds 0; a length has no best"
    between = table(document, "results", 1)
    row = between["minillm − sft"]
    assert "+3.0+2.5 … +3.5p ≤ 0.001" in row["Rouge-L ↑"].text
    assert "−0.100−0.300 … +0.100p = 0.31" in row["KL(q‖p) ↓"].text
    assert ["sure" in row["Rouge-L ↑"].classes, "sure" in row["KL(q‖p) ↓"].classes] == [True, False]
    assert "minillm comes closest to the references of held-out: Rouge-L 15.2 [14.8, 15.8]" in document.text


@pytest.mark.parametrize(
    ("ab", "bc", "ac", "highest", "lowest"),
    [
        (1.0, 1.0, 1.0, "c", "a"),
        (1.0, 0.4, 1.0, None, "a"),
        (1.0, 1.0, 0.4, None, None),
        (-1.0, -1.0, -1.0, "a", "c"),
        (1.0, -1.0, 1.0, "b", "a"),
    ],
)
def test_the_best_beats_each_other_student(
    tmp_path: Path, ab: float, bc: float, ac: float, highest: str | None, lowest: str | None
) -> None:
    keys = "rouge_l", "reverse_kl", "length"
    pairs = [
        {"set": "held-out", "model": model, "minus": minus, "figures": dict.fromkeys(keys, difference(value))}
        for model, minus, value in (("b", "a", ab), ("c", "b", bc), ("c", "a", ac))
    ]
    content = evaluation(figures(teacher=(99, 0), a=(1, 1), b=(2, 1), c=(3, 1)), pairs)
    found = read_evaluation(write_evaluation(tmp_path / "e", content))
    assert [best_student(found, "held-out", key) for key in keys] == [highest, lowest, None]


def test_settings_show_exactly_what_differs(two: list[Path]) -> None:
    runs = read_runs(two)
    expected = {
        "objective.name": ["sft", "minillm"],
        "objective.gamma": [None, "0.95"],
        "optim.lr": ["0.001", "0.0003"],
        "teacher": ["null", None],
        "teacher.path": [None, "models/big"],
    }
    assert settings.differences(runs) == expected
    document = made(two)
    found = table(document, "settings")
    assert {key: [cell.text for cell in row.values()][1:] for key, row in found.items()} == {
        key: ["–" if value is None else value for value in values] for key, values in expected.items()
    }
    assert "betas" in document.by_id("settings").all("pre")[0].text, "all settings stand below, folded"
    assert settings.differences([runs[0], runs[0]]) == {}


def test_curves_go_through_the_records(two: list[Path]) -> None:
    document = made(two)
    (svg,) = [one.all("svg")[0] for one in document.by_id("curves").all("figure") if "loss/total" in one.text]
    drawn = points(svg, "sft")
    values = [record["loss/total"] for record in records() if "loss/total" in record]
    width = 3  # 5 % of 60 records, to an odd number
    assert [round(x) for x, _ in drawn] == list(range(1, 61))
    for place, (_, y) in enumerate(drawn):
        reach = min(width // 2, place, 59 - place)
        window = values[place - reach : place + reach + 1]
        assert y == pytest.approx(sum(window) / len(window), abs=0.01)
    faint = svg.all("polyline", "raw")
    assert len(faint) == 2
    assert "3 records for sft" in document.by_id("curves").text


def test_few_points_are_drawn_as_they_are(tmp_path: Path) -> None:
    values = [1.0, 4.0, 2.0]
    run = make_run(tmp_path / "r", [{"step": 10 * n, "valid/rouge_l": v} for n, v in enumerate(values, 1)])
    svg = made([run]).by_id("curves").all("svg")[0]
    assert not svg.all("polyline", "raw")
    assert points(svg, "r") == [
        (pytest.approx(10 * n, abs=0.1), pytest.approx(v, abs=0.02)) for n, v in enumerate(values, 1)
    ]
    assert "nothing is smoothed" in made([run]).by_id("curves").text


def test_long_curves_are_thinned_without_losing_a_peak() -> None:
    x = np.arange(5000.0)
    y = np.sin(x / 300)
    y[1234], y[4321] = 9.0, -9.0
    thin_x, thin_y = thin(x, y)
    assert len(thin_x) <= 400
    assert (thin_y.max(), thin_y.min(), thin_x[0], thin_x[-1]) == (9.0, -9.0, 0.0, 4999.0)
    assert all(y[int(place)] == value for place, value in zip(thin_x, thin_y, strict=True))


def test_a_histograms_bars_are_shares_of_all_values() -> None:
    found = bars("x", 0, np.array([1.0, 1.0, 1.5, 4.0]), np.array([0.0, 1.2, 2.0, 3.0, 5.0]))
    assert (found.shares.tolist(), found.count, found.mean) == ([0.5, 0.25, 0.0, 0.25], 4, 1.875)


def test_three_long_runs_make_a_page_of_less_than_3_mb(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(size=(1500, 30))
    for name in "abc":
        make_run(
            tmp_path / name,
            [
                {"step": n, "time/step": 2.0} | {f"g{i % 5}/{i}": v for i, v in enumerate(row)}
                for n, row in enumerate(noise, 1)
            ],
        )
    text = page(Report(read_runs([tmp_path / name for name in "abc"])))
    assert len(text) < 3_000_000
    assert text.count("<svg") == 31 + 0


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    name = HOSTILE.replace("/", "∕")
    record = {"step": 1, f"loss/{HOSTILE}": 1.0, f"time/{HOSTILE}": 1.0, "time/step": 2.0, f"memory/{HOSTILE}": 1.0}
    bad = {HOSTILE: {HOSTILE: HOSTILE}, "optim": {"steps": HOSTILE}, "objective": {"name": HOSTILE}}
    bad |= {"student": {"path": HOSTILE}}
    rollouts = [{"step": step, "prompt": HOSTILE, "response": HOSTILE, "reward": 0.5} for step in (1, 2)]
    runs = [make_run(tmp_path / name, [record], bad, rollouts), make_run(tmp_path / "b", [record], SFT)]
    content = evaluation(
        figures(teacher=(1, 1), **{HOSTILE: (2, 1), "b": (1, 1)}),
        [{"set": "held-out", "model": HOSTILE, "minus": "b", "figures": {"rouge_l": difference(1)}}],
        [{"prompt": HOSTILE, "references": [HOSTILE], "responses": {HOSTILE: HOSTILE}}],
    )
    content["suite"]["sets"][HOSTILE] = "x"
    content["suite"]["template"] = HOSTILE
    document = made(runs, write_evaluation(tmp_path / "e", content))
    assert len(document.all("script")) == 1
    assert not document.all("img")
    names = {name for element in document.all() for name in element.attributes}
    assert not {name for name in names if name.startswith("on")}
    assert document.text.count("alert(1)") > 20, "all of it is there, as text"
    assert HOSTILE in document.by_id("responses").text


def test_the_page_asks_nothing_of_the_network(two: list[Path], judged: Path) -> None:
    document = made(two, judged)
    for element in document.all():
        assert element.tag not in ("link", "img", "iframe", "object", "embed", "base", "form")
        for name, value in element.attributes.items():
            assert name not in ("src", "srcset", "action", "data", "poster")
            if "href" in name:
                assert (value or "").startswith("#")
    css = document.all("style")[0].text
    assert not re.search(r"url\(|@import|@font-face", css)
    policy = document.all("meta")[1].attributes["content"] or ""
    assert policy.startswith("default-src 'none'; ")
    script = document.all("script")[0].text
    assert not re.search(r"\bfetch\(|XMLHttpRequest|import\(|WebSocket", script)


def test_a_model_has_the_colour_of_the_run_it_is_from(two: list[Path], tmp_path: Path) -> None:
    content = evaluation(figures(teacher=(20, 0), base=(1, 1), ours=(2, 1)))
    content["models"]["ours"]["path"] = "elsewhere/minillm/student"
    report = Report(read_runs(two), [read_evaluation(write_evaluation(tmp_path / "e", content))])
    assert report.colours == {"sft": 0, "minillm": 1, "base": 2, "ours": 1, "teacher": -1}


def test_a_run_cost_what_all_its_steps_did(tmp_path: Path) -> None:
    """Not only those on record."""
    rows = [{"step": step, "time/step": 2.0, "time/total": 2.0 * step} for step in (10, 20, 30)]
    document = made([make_run(tmp_path / "r", rows)])
    assert "training time60 s" in document.all("dl")[0].text.replace(" 60", "60")


def test_time_adds_up(two: list[Path]) -> None:
    (chart, _) = costs.time_charts(read_runs(two))
    assert [layer.name for layer in chart.layers] == ["Data and rollouts", "Forward", "Backward", "Between the phases"]
    assert [float(layer.shares.mean()) for layer in chart.layers] == [0.125, 0.25, 0.5, 0.125]
    found = table(made(two), "costs")
    row = next(iter(found.values()))
    assert [cell.text for cell in row.values()][1:] == [
        *("60.0 s12.5 %", "120.0 s25.0 %", "240.0 s50.0 %", "60.0 s12.5 %"),
        *("480.0 s", "60"),
    ]
    memory = table(made(two), "costs", 1)["sft"]
    assert [memory[name].text for name in ("first", "largest", "last")] == ["1.01 GiB", "1.60 GiB", "1.60 GiB"]


def test_positions_lengths_and_texts(two: list[Path], judged: Path) -> None:
    document = made(two, judged)
    charts = {one.all("figcaption")[0].all("b")[0].text: one for one in document.by_id("positions").all("figure")}
    own = points(charts["Excess accumulated error"].all("svg")[0], "minillm")
    assert own == [(pytest.approx(n, abs=0.1), pytest.approx(5.0 * (n - 1), abs=0.5)) for n in range(1, 13)]
    assert "teacher" not in document.by_id("positions").all("p", "legend")[0].text
    responses = document.by_id("responses")
    assert "sft 15.0 of 2" in responses.text
    assert "minillm 25.0 of 2" in responses.text
    articles = responses.all("article")
    assert len(articles) == 6
    labels = [heading.text for heading in articles[0].all("h4")]
    assert labels == ["sft", "minillm", "teacher", "reference 1", "reference 2"]
    assert len(responses.all("details")[0].all("article")) == 2
    rollouts = document.by_id("rollouts")
    assert [heading.text for heading in rollouts.all("h4")] == ["minillm step 1", "minillm step 60"]
    assert "reward +0.10 · 25 % drawn by the teacher" in rollouts.text
    assert "r60" in rollouts.text


def test_figures_for_papers_are_pngs(two: list[Path], judged: Path, tmp_path: Path) -> None:
    report = Report(read_runs(two), [read_evaluation(judged)])
    groups = [*report.positions, report.rewards, report.time, *report.curves[1:2]]
    written = write_pngs(groups, tmp_path / "png")
    names = {path.name for path in written}
    assert {"loss_total.png", "judged_held-out_excess_error.png", "minillm_time.png", "minillm_rewards.png"} <= names
    assert len(names) == len(written) == sum(len(group.charts) for group in groups)
    for path in written[:3]:
        head = path.read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n"
        assert int.from_bytes(head[16:20]) == pytest.approx(3.35 * 300, abs=1), "a column at 300 dpi"


def test_figures_of_one_name_do_not_overwrite_each_other(tmp_path: Path) -> None:
    names = ["loss/a", "loss/a b", "loss_a_b", "../loss/" + "x" * 300]
    run = make_run(tmp_path / "r", [{"step": step} | dict.fromkeys(names, 1.0) for step in (1, 2)])
    written = write_pngs(Report(read_runs([run])).groups, tmp_path / "png")
    assert sorted(path.name for path in written) == sorted(path.name for path in (tmp_path / "png").iterdir())
    assert {"loss_a.png", "loss_a_b.png", "loss_a_b-2.png"} < {path.name for path in written}
    assert len(written) == 4
