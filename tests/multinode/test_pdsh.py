"""Two hosts under pdsh: the same numbers as on one, and what happens when one host is not like the other."""

import importlib.metadata
import os
import secrets
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from cluster import Cluster

SECRET = secrets.token_hex(20)


def test_two_hosts_train_to_the_numbers_of_one(
    of_one_host: list, figures: Callable, recipe: Callable, hostfile: Callable, on_alpha: Callable, tmp_path: Path
) -> None:
    """By `.deepspeed_env` under `deepspeed`, and by `launch/train.sh`, which forwards variables itself."""
    (tmp_path / "variables").write_text("OMP_NUM_THREADS=1\n")
    command = ["deepspeed", "--hostfile", str(hostfile("alpha", "beta")), "launch/train.sh"]
    done = on_alpha(*command, "--config", str(recipe("two")), DS_ENV_FILE=str(tmp_path / "variables"))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]

    # A path that a shell would take apart, and run a part of.
    nasty = tmp_path / 'it\'s $(touch x) "%h".yaml'
    recipe("three").rename(nasty)
    settings = {"OMP_NUM_THREADS": "1", "WANDB_API_KEY": SECRET, "WANDB_MODE": "offline", "WANDB_NOTES": 'a "b" $(c)'}
    command = ["bash", "launch/train.sh", "--hostfile", str(hostfile("alpha", "beta"))]
    careful = on_alpha(*command, "--config", str(nasty), **settings)
    assert careful.returncode == 0, careful.stdout[-4000:] + careful.stderr[-8000:]

    assert figures(tmp_path / "two") == of_one_host
    assert figures(tmp_path / "three") == of_one_host
    assert not list(tmp_path.rglob("x")), "nothing of the path was run"
    (wandb_run,) = (tmp_path / "three/wandb").glob("offline-run-*/*.wandb")
    assert b'a "b" $(c)' in wandb_run.read_bytes(), "wandb got its variables, whole"
    assert SECRET not in careful.stdout + careful.stderr
    written = [file for file in (tmp_path / "three").rglob("*") if file.is_file()]
    assert not [file for file in written if SECRET.encode() in file.read_bytes()]
    # Other launches of this machine have files there too.
    brought = [file for file in Path("/tmp").glob("distill-*.sh*") if SECRET in file.read_text()]
    assert not brought, "the file that brought the key is gone"


@pytest.fixture
def gone(cluster: Cluster) -> str:
    """The name of a host whose power is cut."""
    if "gone" not in cluster.hosts:
        cluster.silence(cluster.add("gone"))
    return "gone"


def test_a_host_that_is_down_is_named_within_30_seconds(
    gone: str, recipe: Callable, hostfile: Callable, on_alpha: Callable, tmp_path: Path
) -> None:
    flags = ["--hostfile", str(hostfile("alpha", gone)), "--config", str(recipe("down"))]
    started = time.monotonic()
    on_alpha("bash", "launch/train.sh", "--dry-run", *flags)
    imported = time.monotonic()
    done = on_alpha("bash", "launch/train.sh", *flags)
    # Importing DeepSpeed takes as long as this machine is busy.
    assert time.monotonic() - imported < 25 + (imported - started)
    assert done.returncode == 1, "it may come back"
    assert "distill: host = 'gone': not reached (ssh: connect to host 10.77.0." in done.stderr
    assert "worker" not in done.stdout, "no launcher has begun"
    assert not (tmp_path / "down").exists()


def test_the_ranks_of_other_hosts_name_a_host_that_is_down(
    gone: str, recipe: Callable, hostfile: Callable, begin_on_alpha: Callable, tmp_path: Path
) -> None:
    """Under plain `deepspeed`, which leaves that to them."""
    flags = ["--hostfile", str(hostfile("alpha", gone)), "launch/train.sh", "--config", str(recipe("down"))]
    process = begin_on_alpha("deepspeed", *flags)
    read = []
    while not any("distill: waiting for gone" in line for line in read):
        read.append(process.stderr.readline())
        assert read[-1], read
    assert not (tmp_path / "down").exists()


@pytest.mark.parametrize(
    ("starter", "how", "group"),
    [
        # As when Ctrl-C is pressed, a terminal is closed, and memory has run out.
        ("bash", signal.SIGINT, True),
        ("deepspeed", signal.SIGHUP, True),
        ("bash", signal.SIGKILL, False),
    ],
)
def test_no_rank_outlives_the_launcher(
    starter: str,
    how: signal.Signals,
    group: bool,
    recipe: Callable,
    hostfile: Callable,
    begin_on_alpha: Callable,
    cluster: Cluster,
    tmp_path: Path,
) -> None:
    path = str(recipe("long"))
    command = {"bash": ["bash", "launch/train.sh"], "deepspeed": ["deepspeed"]}[starter]
    command += ["--hostfile", str(hostfile("alpha", "beta"))] + ["launch/train.sh"] * (starter == "deepspeed")
    process = begin_on_alpha(*command, "--config", path, "optim.steps=100000")
    while not (tmp_path / "long/metrics.jsonl").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.2)
    assert cluster.running(cluster.hosts["beta"], path)
    if group:
        os.killpg(process.pid, how)
    else:
        (launcher,) = psutil.Process(process.pid).children()  # of nsenter
        launcher.send_signal(how)
    killed = time.monotonic()
    while left := [line for name in ("alpha", "beta") for line in cluster.running(cluster.hosts[name], path)]:
        assert time.monotonic() - killed < 30, left
        time.sleep(0.2)


def other_code(root: Path, folder: Path) -> tuple[Path, Path]:
    changed = folder / "errors.py"
    changed.write_text((root / "distill/errors.py").read_text() + "# changed\n")
    return changed, root / "distill/errors.py"


def other_package(root: Path, folder: Path) -> tuple[Path, Path]:
    found = importlib.metadata.distribution("accelerate")
    metadata = Path(str(found.locate_file(f"accelerate-{found.version}.dist-info/METADATA")))
    changed = folder / "METADATA"
    changed.write_text(metadata.read_text().replace(f"Version: {found.version}\n", "Version: 0.0.1\n"))
    return changed, metadata


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("oldcode", other_code, "differs from alpha in distill/errors.py ("),
        ("oldpip", other_package, "differs from alpha in accelerate (0.0.1, not "),
    ],
)
def test_a_host_that_differs_is_refused(
    name: str,
    change: Callable,
    expected: str,
    recipe: Callable,
    hostfile: Callable,
    on_alpha: Callable,
    cluster: Cluster,
    root: Path,
    tmp_path: Path,
) -> None:
    ours, theirs = change(root, tmp_path)
    cluster.add(name, prepare=f"mount --bind '{ours}' '{theirs}'")
    command = ["bash", "launch/train.sh", "--hostfile", str(hostfile("alpha", name))]
    done = on_alpha(*command, "--config", str(recipe("refused")))
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "distill: " in line]
    assert f"distill: host = '{name}': {expected}" in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "refused").exists()


def test_records_that_only_one_host_has_are_named(
    recipe: Callable, hostfile: Callable, on_alpha: Callable, cluster: Cluster, records_dir: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    cluster.add("bare", prepare=f"mount --bind '{empty}' '{records_dir}'")
    command = ["bash", "launch/train.sh", "--hostfile", str(hostfile("alpha", "bare"))]
    done = on_alpha(*command, "--config", str(recipe("refused")))
    assert done.returncode == 2, done.stderr
    assert "distill: host = 'bare': differs from alpha in data.train (absent, not " in done.stderr
