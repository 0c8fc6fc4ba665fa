"""The page as a browser lays it out: nothing sticks out, nothing is reported on its console."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from matplotlib.image import imread
from reports import judged_folder, two_runs

from tools.reporting.evaluations import read_evaluation
from tools.reporting.page import page
from tools.reporting.report import Report
from tools.reporting.runs import read_runs

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no browser")]
# In a frame: a window cannot be as narrow as a phone.
FRAME = """<!doctype html><body><iframe style="width:{width}px;height:900px;border:0"></iframe><script>
const frame = document.querySelector("iframe");
frame.srcdoc = {page};
frame.onload = () => {{
  const root = frame.contentDocument.documentElement;
  const buttons = frame.contentDocument.querySelectorAll("[data-toggle]");
  buttons[0].click();
  const off = frame.contentDocument.querySelectorAll(".off").length;
  const chart = frame.contentDocument.querySelector("#positions svg"), box = chart.getBoundingClientRect();
  const middle = box.left + box.width * (46 + 286 / 2) / 340;
  chart.dispatchEvent(new PointerEvent("pointermove", {{clientX: middle, clientY: box.top + 50}}));
  const note = frame.contentDocument.querySelector(".read").innerText.split("\\n").join(", ");
  document.title = [root.clientWidth, root.scrollWidth, off > 0, note].join(" | ");
}};
</script>"""


@pytest.fixture
def text(tmp_path: Path) -> str:
    return page(Report(read_runs(two_runs(tmp_path)), [read_evaluation(judged_folder(tmp_path))]))


def browse(folder: Path, text: str, *flags: str) -> tuple[str, list[str]]:
    """Standard output, and what the page's console was told."""
    assert BROWSER is not None
    (folder / "page.html").write_text(text)
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--enable-logging=stderr", *flags, (folder / "page.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_drawn_in_both_modes(tmp_path: Path, text: str, scheme: str) -> None:
    shot = tmp_path / "shot.png"
    dark = [f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"]
    _, console = browse(tmp_path, text, f"--screenshot={shot}", "--window-size=1280,2000", "--hide-scrollbars", *dark)
    assert not console
    pixels = imread(shot)[..., :3].reshape(-1, 3)
    paper = pixels[0].mean()
    assert paper > 0.9 if scheme == "light" else paper < 0.2
    assert abs(pixels - pixels[0]).max(1).mean() > 0.005, "the page is empty"


@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_sticks_out_buttons_work_and_values_are_read_off(tmp_path: Path, text: str, width: int) -> None:
    content = json.dumps(text).replace("</", "<\\/")
    found, console = browse(
        tmp_path, FRAME.format(width=width, page=content), "--dump-dom", "--virtual-time-budget=5000"
    )
    assert not console
    title = found.partition("<title>")[2].partition("</title>")[0]
    client, scroll, hides, note = title.split(" | ")
    assert width - 20 < int(client) == int(scroll)  # but for a scroll bar
    assert hides == "true"
    assert note == "position in the response, tokens 6, sft 1.25, minillm 1.75", "what is read off is what was drawn"
