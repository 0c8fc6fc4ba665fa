"""Two hosts on which something else than ssh starts the ranks."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import Cluster


@pytest.fixture
def fake_slurm(cluster: Cluster, tmp_path: Path) -> Path:
    """`srun`, which starts one task on each of the two hosts as Slurm does, and `scontrol`."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    tasks = "\n".join(
        f'SLURM_NODEID={number} {" ".join(cluster.on(host))} "$@" & pids+=($!)'
        for number, host in enumerate(cluster.hosts[name] for name in ("alpha", "beta"))
    )
    scripts = {
        "srun": f'while [[ "$1" == --* ]]; do shift; done\npids=()\n{tasks}\n'
        'for pid in "${pids[@]}"; do wait "$pid" || exit; done',
        "scontrol": "printf 'alpha\\nbeta\\n'",
    }
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    return folder


def test_slurm_trains_to_the_numbers_of_one_host(
    fake_slurm: Path,
    of_one_host: list,
    figures: Callable,
    recipe: Callable,
    environment: dict,
    root: Path,
    tmp_path: Path,
) -> None:
    nasty = tmp_path / 'it\'s $(touch x) "%h".yaml'
    recipe("two").rename(nasty)
    settings = environment | {"PATH": f"{fake_slurm}:{environment['PATH']}", "OMP_NUM_THREADS": "1", "RANKS": "1"}
    settings |= {"SLURM_JOB_NODELIST": "two", "SLURM_JOB_ID": "77", "SLURM_SUBMIT_DIR": str(root)}
    command = ["bash", "launch/slurm.sbatch", "--config", str(nasty)]
    done = subprocess.run(command, cwd=root, env=settings, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    assert figures(tmp_path / "two") == of_one_host
    assert not list(tmp_path.rglob("x")), "nothing of the path was run"
