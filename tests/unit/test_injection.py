"""Arguments reach the run as they were typed, through launch scripts and `make preprocess`; nothing in them runs."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

NASTY = [
    "run.folder=$(touch PWNED)",
    "a=`touch PWNED`",
    "b=; touch PWNED;",
    'c=" touch PWNED " \'',
    "d=x\ntouch PWNED\ny",
    "e=*",
    "f=%h %n",
    "g=  two  blanks ",
    "h=\\",
    "i=x && touch PWNED || touch PWNED",
    "j=${IFS}$HOME~",
    "k=| touch PWNED & >PWNED",
    "l=<(touch PWNED)",
    "m=!! #",
    "n=$(shell touch PWNED)$$x",
]
CONFIG = "my $(touch PWNED) recipe's.yaml"

# Writes down its arguments, each with a NUL behind it.
DUMP = '#!/bin/bash\nprintf "%s\\0" "$@" >"$DUMP"\n'
PYTHON = '#!/bin/bash\n[[ "$*" == "-m distill.launching.variables" ]] && exit\n' + DUMP.partition("\n")[2]
# Both run the command behind their own flags.
MPIRUN = '#!/bin/bash\nwhile [[ "$1" != */python ]]; do shift; done\nexec "$@"\n'
SRUN = (
    "#!/bin/bash\n"
    'while [[ "$1" == --* ]]; do [[ "$1" != --chdir=* ]] || cd "${1#--chdir=}"; shift; done\n'
    'SLURM_NODEID=0 exec "$@"\n'
)
SCONTROL = "#!/bin/bash\nprintf 'a\\nb\\n'\n"


@pytest.fixture
def checkout(root: Path, tmp_path: Path) -> Path:
    """The scripts in a folder of an unpleasant name, around an interpreter that only tells what it is asked."""
    folder = tmp_path / "a $(touch PWNED) checkout"
    shutil.copytree(root / "launch", folder / "launch")
    shutil.copy(root / "Makefile", folder)
    (folder / "requirements.txt").touch()
    for name, text in {
        "python": PYTHON,
        "deepspeed": DUMP,
        "mpirun": MPIRUN,
        "srun": SRUN,
        "scontrol": SCONTROL,
    }.items():
        path = folder / ".venv/bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    (folder / ".venv/.installed").touch()
    return folder


def run(checkout: Path, *command: str, **changes: str) -> list[str]:
    """What arrives at the interpreter or DeepSpeed."""
    dump = checkout / "dump"
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MAKE", "MFLAGS"))
    }
    environment |= {"PATH": f"{checkout}/.venv/bin:{os.environ['PATH']}", "DUMP": str(dump)} | changes
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not list(checkout.parent.rglob("PWNED"))
    return dump.read_text().split("\0")[:-1]


def test_train_sh(checkout: Path) -> None:
    flags = ["--num_accelerators", "2", "--launcher_args", "$(touch PWNED) * `touch PWNED`"]
    found = run(checkout, "bash", "launch/train.sh", *flags, "--config", CONFIG, *NASTY)
    assert found == ["-m", "distill.launching", *flags, str(checkout / "launch/train.sh"), "--config", CONFIG, *NASTY]


def test_no_ssh_sh(checkout: Path) -> None:
    hosts = ["--hosts", "a,b", "--slots", "2", "--node-rank", "0", "--master-addr", "$(touch PWNED)"]
    found = run(checkout, "bash", "launch/no_ssh.sh", *hosts, "--config", CONFIG, *NASTY)
    assert found[found.index("--master_addr") + 1] == "$(touch PWNED)"
    assert found[-len(NASTY) - 3 :] == [str(checkout / "launch/train.sh"), "--config", CONFIG, *NASTY]


def test_openmpi_sh(checkout: Path) -> None:
    found = run(checkout, "bash", "launch/openmpi.sh", "--hostfile", "$(touch PWNED)", "--config", CONFIG, *NASTY)
    assert found == ["-u", str(checkout / "launch/train.sh"), "--config", CONFIG, *NASTY]


def test_slurm_sbatch(checkout: Path) -> None:
    """Through srun and the shell of its task, as in a job."""
    job = {
        "SLURM_JOB_NODELIST": "[a-b]",
        "SLURM_JOB_ID": "7",
        "SLURM_GPUS_ON_NODE": "2",
        "SLURM_SUBMIT_DIR": str(checkout),
    }
    found = run(checkout, "bash", "launch/slurm.sbatch", "--config", CONFIG, *NASTY, **job)
    assert found[found.index("--master_addr") + 1] == "a"
    assert found[-len(NASTY) - 3 :] == [f"{checkout}/launch/train.sh", "--config", CONFIG, *NASTY]


@pytest.mark.parametrize("nasty", NASTY)
@pytest.mark.parametrize("by_environment", [False, True])
def test_make_preprocess(by_environment: bool, nasty: str, checkout: Path) -> None:
    flags = {
        "DATA": "--data",
        "OUT": "--out",
        "TOKENIZER": "--tokenizer",
        "KIND": "--kind",
        "TEMPLATE": "--template",
        "MAX_PROMPT": "--max-prompt",
        "MAX_LENGTH": "--max-length",
        "ON_BAD": "--on-bad",
        "WORKERS": "--workers",
    }
    given = {name: f"{name} {nasty}" for name in flags}
    words = [] if by_environment else [f"{name}={value}" for name, value in given.items()]
    found = run(checkout, "make", "preprocess", *words, **(given if by_environment else {}))
    assert found[:2] == ["-m", "data_prep.preprocess"]
    assert dict(zip(found[2::2], found[3::2], strict=True)) == {flags[name]: value for name, value in given.items()}


def test_make_has_its_defaults_and_demo_its_flags(checkout: Path) -> None:
    found = run(checkout, "make", "preprocess", "DATA=a b", "OUT=c", "TOKENIZER=d")
    assert found[2:8] == ["--data", "a b", "--out", "c", "--tokenizer", "d"]
    assert found[8:] == [
        *("--kind", "instructions", "--template", "alpaca", "--max-prompt", "256", "--max-length", "512"),
        *("--on-bad", "fail"),
    ]
    assert run(checkout, "make", "demo") == ["-m", "tools.demo", "--ranks", "2"]
    assert run(checkout, "make", "demo", "FRESH=1", "RANKS=3") == ["-m", "tools.demo", "--ranks", "3", "--fresh"]
    assert run(checkout, "make", "demo", "RANKS=$(touch PWNED)")[-1] == "$(touch PWNED)"


@pytest.mark.slow
def test_deepspeed_hands_the_arguments_on(
    root: Path, environment: dict, free_port: Callable[[], int], tmp_path: Path
) -> None:
    """The real launcher and a real rank, which names the recipe that is not there."""
    command = ["bash", str(root / "launch/train.sh"), "--num_accelerators", "1", "--master_port", str(free_port())]
    missing = 'no $(touch PWNED) `touch PWNED`; touch PWNED "recipe\'s".yaml'
    done = subprocess.run(
        [*command, "--config", missing, *NASTY],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"--config = {missing!r}: no such file" in done.stderr
    assert done.returncode != 0
    assert not list(tmp_path.iterdir())
