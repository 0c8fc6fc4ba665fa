"""Two hosts under Open MPI: the ranks find each other by mpi4py."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

SECRET = "0123456789abcdef0123456789abcdef01234567"
# mpirun asks to be sure.
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}

pytestmark = pytest.mark.skipif(
    not (shutil.which("mpirun") and shutil.which("ompi_info")), reason="no mpirun (Debian: apt-get install openmpi-bin)"
)


@pytest.mark.parametrize("starter", ["deepspeed", "train.sh", "openmpi.sh"])
def test_two_hosts_train_to_the_numbers_of_one(
    starter: str,
    of_one_host: list,
    figures: Callable,
    recipe: Callable,
    hostfile: Callable,
    on_alpha: Callable,
    tmp_path: Path,
) -> None:
    nasty = tmp_path / 'it\'s $(touch x) "%h".yaml'
    recipe("two").rename(nasty)
    hosts = ["--hostfile", str(hostfile("alpha", "beta"))]
    command = {
        "deepspeed": [
            "deepspeed",
            "--launcher",
            "openmpi",
            *hosts,
            "--launcher_args=-x OMP_NUM_THREADS",
            "launch/train.sh",
        ],
        "train.sh": ["bash", "launch/train.sh", "--launcher", "openmpi", *hosts],
        "openmpi.sh": ["bash", "launch/openmpi.sh", *hosts],
    }[starter]
    changes = {"OMP_NUM_THREADS": "1", "WANDB_API_KEY": SECRET, "WANDB_MODE": "offline"}
    done = on_alpha(*command, "--config", str(nasty), **AS_ROOT, **changes)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    assert figures(tmp_path / "two") == of_one_host
    assert not list(tmp_path.rglob("x")), "nothing of the path was run"
    assert SECRET not in done.stdout + done.stderr


def test_hosts_that_differ_are_refused(
    recipe: Callable, hostfile: Callable, on_alpha: Callable, cluster: object, root: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "errors.py"
    changed.write_text((root / "distill/errors.py").read_text() + "# changed\n")
    cluster.add("oldmpi", prepare=f"mount --bind '{changed}' '{root}/distill/errors.py'")
    command = ["bash", "launch/openmpi.sh", "--hostfile", str(hostfile("alpha", "oldmpi"))]
    done = on_alpha(*command, "--config", str(recipe("refused")), **AS_ROOT)
    assert done.returncode == 2, done.stderr
    assert "distill: host = 'oldmpi': differs from alpha in distill/errors.py (" in done.stderr
