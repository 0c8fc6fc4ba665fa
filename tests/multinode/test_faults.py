"""Two hosts under pdsh: a fault on one ends both, and being told to stop reaches both."""

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from cluster import Cluster


@pytest.mark.parametrize(
    ("strike", "codes", "told"),
    [
        ("kill", range(1, 256), "distill: rank 1 (beta) not heard of for 5 s, last at step "),
        ("stop", (75,), "distill: told to stop, saved at step "),
    ],
)
def test_what_happens_to_one_happens_to_both(
    strike: str,
    codes: tuple[int, ...],
    told: str,
    recipe: Callable,
    hostfile: Callable,
    begin_on_alpha: Callable[..., subprocess.Popen[str]],
    cluster: Cluster,
    tmp_path: Path,
) -> None:
    path = str(recipe("long"))
    command = ["bash", "launch/train.sh", "--hostfile", str(hostfile("alpha", "beta")), "--config", path]
    process = begin_on_alpha(*command, "optim.steps=100000")
    while not (tmp_path / "long/metrics.jsonl").exists():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.2)
    (launcher,) = psutil.Process(process.pid).children()  # of nsenter
    if strike == "stop":
        launcher.terminate()
    else:
        # Processes of the two hosts share their ids, but the one of a rank on beta is not below the launch.
        ours = {child.pid for child in launcher.children(recursive=True)}
        (rank,) = [one for one in psutil.process_iter() if _is_rank(one, path) and one.environ().get("RANK") == "1"]
        assert rank.pid not in ours
        rank.send_signal(signal.SIGKILL)
    struck = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - struck < 30
    assert process.returncode in codes, err[-4000:]
    (line,) = [line for line in err.splitlines() if told in line]
    assert "to resume: bash launch/train.sh --hostfile" in err
    assert line.startswith(("alpha: ", "beta: ")), "pdsh says whose line it is"
    for name in ("alpha", "beta"):
        assert not cluster.running(cluster.hosts[name], path)


def _is_rank(process: psutil.Process, path: str) -> bool:
    try:
        return path in process.cmdline() and any(word.startswith("--local_rank") for word in process.cmdline())
    except psutil.Error:
        return False
