"""Commands for other hosts: exact, quoted, and without a secret in them."""

import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import yaml
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from hypothesis import given
from hypothesis import strategies as st

from distill.errors import Absence, BadInput, Problem
from distill.launching import __main__ as launching
from distill.launching import here, hosts
from distill.launching.__main__ import main
from distill.launching.command import Launch, plan
from distill.launching.here import check_alone
from distill.launching.hosts import Ssh
from distill.launching.supervision import Supervisor
from distill.launching.variables import exports, forwarded, one_word

NASTY = '/a dir/it\'s "$(touch x)" `touch x`;%h \\ é\n$HOME.yaml'
FILE = "/tmp/distill-0.sh"
Capture = pytest.CaptureFixture[str]
ENVIRONMENT = {
    "WANDB_API_KEY": "sec ret",
    "HF_TOKEN": "t'o\"$(x)",
    "OMP_NUM_THREADS": "3",
    "RANK": "1",
    "HOME": "/root",
}


@pytest.fixture
def hostfile(tmp_path: Path) -> str:
    path = tmp_path / "hosts"
    path.write_text("worker-1 slots=2\nworker-2 slots=2\n")
    return str(path)


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
def test_one_word_survives_deepspeed_and_the_remote_shell(argument: str) -> None:
    word = one_word(argument)
    assert " " not in word
    assert "%" not in word
    assert word.isascii()


def test_bash_reads_words_back_whole() -> None:
    arguments = [NASTY, "", "plain/path.yaml", "optim.lr=1e-5", "a=$(touch x)"]
    command = "printf '%s\\0' " + " ".join(map(one_word, arguments))
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.split("\0")[:-1] == arguments


def test_only_what_is_meant_for_other_hosts_goes() -> None:
    assert list(forwarded(ENVIRONMENT)) == ["HF_TOKEN", "OMP_NUM_THREADS", "WANDB_API_KEY"]
    of_this_host = {"DS_ENV_FILE": "/home/me/.deepspeed_env", "DS_ACCELERATOR": "cpu", "https_proxy": "x", "PATH": "y"}
    assert list(forwarded(of_this_host)) == ["DS_ACCELERATOR", "https_proxy"]


def test_variables_survive_the_shell() -> None:
    text = exports(forwarded(ENVIRONMENT)) + 'printf "%s|%s" "$HF_TOKEN" "$WANDB_API_KEY"'
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout == "t'o\"$(x)|sec ret"


def test_one_machine_gets_the_command_as_it_is() -> None:
    arguments = ["--num_accelerators", "2", "launch/train.sh", "--config", NASTY]
    assert plan(arguments, ENVIRONMENT, FILE).arguments == arguments
    assert plan(arguments, ENVIRONMENT, FILE).ssh.hosts == ()


def test_pdsh_gets_words_and_a_file_with_the_secrets(hostfile: str) -> None:
    launch = plan(["--hostfile", hostfile, "launch/train.sh", "--config", NASTY], ENVIRONMENT, FILE)
    head = ["--hostfile", hostfile, "--venv_script", FILE, "launch/train.sh", "--config"]
    assert launch.arguments == [*head, one_word(NASTY)]
    assert launch.ssh.hosts == ["worker-1", "worker-2"]
    assert "export WANDB_API_KEY='sec ret'\n" in launch.content
    assert f"export DISTILL_FORWARDED={FILE}\n" in launch.content


def test_a_filter_leaves_one_host_alone(hostfile: str) -> None:
    launch = plan(["--hostfile", hostfile, "--include", "worker-2", "launch/train.sh"], ENVIRONMENT, FILE)
    assert launch.ssh.hosts == ()


def test_mpirun_is_given_names_only(hostfile: str) -> None:
    flags = [
        "--launcher",
        "openmpi",
        "--hostfile",
        hostfile,
        "--launcher_args=--oversubscribe",
        "--master_port",
        "7000",
    ]
    environment = ENVIRONMENT | {"GLOO_SOCKET_IFNAME": "ens3"}
    launch = plan([*flags, "launch/train.sh", "--config", NASTY], environment, FILE)
    names = "-x GLOO_SOCKET_IFNAME -x HF_TOKEN -x OMP_NUM_THREADS -x WANDB_API_KEY"
    expected = f"--oversubscribe {names} -x MASTER_PORT=7000 --bind-to none --mca btl_tcp_if_include ens3"
    assert launch.arguments[-4:] == [f"--launcher_args={expected}", "launch/train.sh", "--config", NASTY]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no such file"),
        ("worker-1\n", "bad entry"),
        ("worker-1 slots=2x\n", "bad entry"),
        ("worker-1 slots=0\n", "a host without a rank"),
        ("a slots=1\na slots=1\n", "multiple entries for a"),
        ("-v slots=1\n", "'-v' is no host's name"),
        ("a,b slots=1\n", "'a,b' is no host's name"),
    ],
)
def test_an_unusable_hostfile_is_refused(content: str | None, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    if content is not None:
        path.write_text(content)
    with pytest.raises(BadInput, match=expected):
        plan(["--hostfile", str(path), "launch/train.sh"], {}, FILE)


def test_a_hostfile_may_hold_comments_and_more_words(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# ours\nworker-1 slots=2 # the old one\n\n  me@worker-2   slots=2 gpus=a100\t# new\n")
    launch = plan(["--hostfile", str(path), "launch/train.sh"], {}, FILE)
    assert launch.ssh.hosts == ["worker-1", "me@worker-2"]


def test_a_script_that_would_be_split_is_refused(hostfile: str) -> None:
    with pytest.raises(BadInput, match="unquoted"):
        plan(["--hostfile", hostfile, "my launch/train.sh"], {}, FILE)


@pytest.fixture
def fake_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ssh to hosts on which the last argument is run here; `down` and `mute` are hosts that fail."""
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(
        '#!/bin/bash\nhost="${@: -2:1}"\n'
        '[ "$host" = down ] && { echo "ssh: connect to host down port 22: timed out" >&2; exit 255; }\n'
        '[ "$host" = mute ] && exec sleep 60\n'
        'printf "%s\\n" "$@" >> "$(dirname "$0")/../asked"\n'
        'exec bash -c "${@: -1}"\n'
    )
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ssh.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(hosts, "_ANSWER_SECONDS", 2)
    return tmp_path


def test_each_host_that_cannot_take_part_is_named(
    fake_ssh: Path, free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    problems = Ssh(["good", "down", "mute"]).prepare(free_port())
    assert all(isinstance(problem, Absence) for problem in problems), "they may yet come"
    found = list(map(str, problems))
    assert len(found) == 2
    assert found[0].startswith("host = 'down': not reached (ssh: connect to host down port 22: timed out)")
    assert found[1].startswith("host = 'mute': no answer in 2 s")
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    (problem,) = Ssh(["good"]).prepare(free_port())
    assert "has no /no/such/python" in str(problem)
    assert not isinstance(problem, Absence)


def test_the_file_is_private_and_goes_again(fake_ssh: Path, free_port: Callable[[], int]) -> None:
    file = fake_ssh / "variables.sh"
    assert Ssh(["a", "b"]).prepare(free_port(), str(file), "export X='1'\n") == []
    assert file.read_text() == "export X='1'\n"
    assert file.stat().st_mode & 0o077 == 0
    (fake_ssh / "variables.sh.1").touch()  # as of a host that was cut off
    Ssh(["a", "b"]).remove(str(file))
    assert "*" not in (fake_ssh / "asked").read_text().splitlines()[-1], "zsh would refuse what matches nothing"
    assert not list(fake_ssh.glob("variables*"))


def test_a_port_in_use_on_the_first_host_is_named(fake_ssh: Path) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        (problem,) = Ssh(["first", "second"]).prepare(port)
        assert str(problem).startswith(f"--master_port = 'first:{port}': another run listens there")
        with pytest.raises(BadInput, match=f"--master_port = '127.0.0.1:{port}': another run"):
            check_alone(port)
    assert Ssh(["first", "second"]).prepare(port) == []
    check_alone(port)


def test_hosts_are_asked_with_the_options_that_pdsh_will_use(hostfile: str, fake_ssh: Path) -> None:
    """And what they have told DeepSpeed does not ask again, without those options."""
    options = {"PDSH_SSH_ARGS_APPEND": "-i /a/key  -oPort=2222"}
    launch = plan(["--hostfile", hostfile, "launch/train.sh"], options, FILE)
    (fake_ssh / "bin/hostname").write_text("#!/bin/sh\necho 10.0.0.7 fd00::7\n")
    (fake_ssh / "bin/hostname").chmod(0o755)
    assert launch.meeting_address is None
    assert launch.ssh.first_address() == "10.0.0.7"
    asked = (fake_ssh / "asked").read_text().splitlines()
    assert asked[-5:] == ["-i", "/a/key", "-oPort=2222", "worker-1", "hostname -I"]


@pytest.mark.parametrize("interrupted", [False, True])
def test_no_host_keeps_the_file_of_a_launch_that_did_not_start(
    interrupted: bool, hostfile: str, fake_ssh: Path, free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first host without an address, and Ctrl-C while it is asked."""
    monkeypatch.setattr("distill.launching.__main__.check_launcher", lambda launcher: None)
    monkeypatch.setattr(secrets, "token_hex", lambda count: f"test-{os.getpid()}")
    file = Path(f"/tmp/distill-test-{os.getpid()}.sh")
    there: list[bool] = []

    def interrupt(self: Ssh) -> str:
        there.append(file.exists())
        raise KeyboardInterrupt

    (fake_ssh / "bin/hostname").write_text("#!/bin/sh\n")
    (fake_ssh / "bin/hostname").chmod(0o755)
    arguments = ["--hostfile", hostfile, "--master_port", str(free_port()), "launch/train.sh"]
    if interrupted:
        monkeypatch.setattr(Ssh, "first_address", interrupt)
        with pytest.raises(KeyboardInterrupt):
            main(arguments)
        assert there == [True]
    else:
        assert main(arguments) == 2
    assert f"rm -f {file}" in (fake_ssh / "asked").read_text()
    assert not list(Path("/tmp").glob(f"{file.name}*"))


def test_mpirun_may_have_another_way_than_ssh(hostfile: str) -> None:
    flags = ["--launcher", "openmpi", "--hostfile", hostfile]
    assert plan([*flags, "launch/train.sh"], {}, FILE).ssh.hosts == ["worker-1", "worker-2"]
    assert plan([*flags, "--no_ssh_check", "launch/train.sh"], {}, FILE).ssh.hosts == ()


@pytest.mark.parametrize(
    ("launcher", "expected"),
    [
        ("pdsh", "this machine has no ssh and no pdsh; install it (Debian: apt-get install openssh-client pdsh)"),
        ("openmpi", "this machine has no ssh and no mpirun and no ompi_info; install it (Debian: apt-get install "),
    ],
)
def test_a_launcher_that_is_not_installed(
    launcher: str, expected: str, hostfile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["--launcher", launcher, "--hostfile", hostfile, "launch/train.sh"]) == 2
    assert capsys.readouterr().err.startswith(f"distill: --launcher = '{launcher}': {expected}")


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(here, "get_accelerator", CUDA_Accelerator)
    monkeypatch.setattr(CUDA_Accelerator, "is_available", lambda self: False)
    assert main(["launch/train.sh", "--config", "x.yaml"]) == 2
    assert capsys.readouterr().err.startswith("distill: DS_ACCELERATOR = 'cuda': this machine has no such device")


def test_hosts_with_different_numbers_of_ranks_are_refused(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a slots=2\nb slots=2\nc slots=1\n")
    flags = ["--hostfile", str(tmp_path / "hosts")]
    with pytest.raises(BadInput, match=r"hosts': a has 2 ranks, c has 1; give all hosts the same number of slots"):
        plan([*flags, "launch/train.sh"], {}, FILE)
    assert plan([*flags, "--exclude", "c", "launch/train.sh"], {}, FILE).ssh.hosts == ["a", "b"]


SLEEPS = """
import subprocess, sys
from distill.launching.supervision import Supervisor
def launch():
    print(subprocess.Popen(["sleep", "60"]).pid, flush=True)
    subprocess.run(["sleep", "60"])
with Supervisor() as supervisor:
    code = supervisor.run(launch)
sys.exit(code)
"""


# Python swallows what is raised in a `__del__`.
SLEEPS_IN_DEL = SLEEPS.replace("def launch():", "class Gone:\n  def __del__(self):").replace(
    "with Supervisor", "def launch():\n    Gone()\n    subprocess.run(['sleep', '60'])\nwith Supervisor"
)


@pytest.mark.parametrize("text", [SLEEPS, SLEEPS_IN_DEL], ids=["anywhere", "where exceptions are lost"])
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_what_was_launched_ends_with_the_launcher(how: signal.Signals, text: str, root: Path) -> None:
    launcher = subprocess.Popen([sys.executable, "-c", text], cwd=root, stdout=subprocess.PIPE, text=True)
    assert launcher.stdout
    launched = psutil.Process(int(launcher.stdout.readline()))
    launcher.send_signal(how)
    codes = {signal.SIGINT: 1, signal.SIGTERM: 75, signal.SIGKILL: -signal.SIGKILL}
    assert launcher.wait(timeout=10) == codes[how]
    launched.wait(timeout=10)


# It does not wake what the main thread waits in, as one that comes just before the wait.
SIGNALLED_ELSEWHERE = """
import signal, subprocess, sys, threading, time
from distill.launching.supervision import Supervisor
def signalled():
    time.sleep(1)
    signal.pthread_kill(threading.get_ident(), signal.SIGINT)
def launch():
    IN_LAUNCH
    subprocess.run(["sleep", "60"])
with Supervisor() as supervisor:
    IN_SUPERVISOR
    code = supervisor.run(launch)
sys.exit(code)
"""


@pytest.mark.parametrize("where", ["launch", "supervisor"])
def test_a_signal_that_does_not_wake_the_wait_is_heard(where: str, root: Path) -> None:
    start = "threading.Thread(target=signalled).start()"
    text = SIGNALLED_ELSEWHERE.replace(f"IN_{where.upper()}", start)
    text = text.replace("IN_LAUNCH", "pass").replace("IN_SUPERVISOR", "pass")
    assert subprocess.run([sys.executable, "-c", text], cwd=root, timeout=20, check=False).returncode == 1


LISTENS = """
import sys, time, torch.distributed as dist
from distill.launching.supervision import Supervisor
from distill.vigil.board import Beat, Board
def launch():
    # A rank, as far as the launch can see.
    store = dist.TCPStore("127.0.0.1", PORT, is_master=True, wait_for_workers=False)
    board = Board.beside(store, 0, 1)
    board.publish(Beat(1, 1, "", 1, False))
    print("up", flush=True)
    while not LEAVES and not board.verdict():
        time.sleep(0.05)
    sys.exit(9 if board.verdict() else 75)
with Supervisor() as supervisor:
    code = supervisor.run(launch, ("127.0.0.1", PORT))
sys.exit(code)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 9)])
def test_a_signal_to_the_launch_reaches_the_ranks_as_a_word(
    number: signal.Signals, code: int, root: Path, free_port: Callable[[], int]
) -> None:
    launcher = listening(root, free_port(), "board.told_to_leave()")
    launcher.send_signal(number)
    assert launcher.wait(timeout=20) == code


def listening(root: Path, port: int, leaves: str) -> subprocess.Popen:
    """A launch whose rank is up, and leaves if that is so."""
    text = LISTENS.replace("PORT", str(port)).replace("LEAVES", leaves)
    launcher = subprocess.Popen([sys.executable, "-c", text], cwd=root, stdout=subprocess.PIPE, text=True)
    assert launcher.stdout
    assert launcher.stdout.readline() == "up\n"
    return launcher


def test_a_second_signal_to_the_launch_ends_the_ranks(root: Path, free_port: Callable[[], int]) -> None:
    """They have been asked to save themselves, and do not come to it."""
    launcher = listening(root, free_port(), "False")
    launcher.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        launcher.wait(timeout=2)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=20) == 9


@pytest.mark.parametrize(
    ("codes", "limit", "starts"),
    [
        ([1, 247, 0], 5, 3),
        ([1, 1, 1, 1], 2, 3),
        ([1, 1], 0, 1),
        ([1, 75], 5, 2),
        *(([settled], 5, 1) for settled in (0, 2, 3, 4, 75)),
    ],
)
def test_a_crash_is_started_again_and_nothing_else(
    codes: list[int], limit: int, starts: int, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    given = iter(codes)
    seen: list[list[str]] = []

    def start(launch: Launch, supervisor: Supervisor, typed: str) -> int:
        seen.append(launch.arguments)
        return next(given)

    monkeypatch.setattr(launching, "_start", start)
    monkeypatch.setattr(launching, "_REST_SECONDS", 0.01)
    arguments = ["--max-restarts", str(limit), "launch/train.sh", "--config", "x.yaml"]
    assert main(arguments) == codes[starts - 1]
    assert seen == [["launch/train.sh", "--config", "x.yaml"]] * starts
    said = capsys.readouterr().err.splitlines()
    assert len(said) == starts - 1
    assert not said or said[0] == f"distill: the run ended with exit code 1; starting again (1 of {limit})"


@pytest.mark.parametrize(("how", "code"), [("kill -9 $$", 1), ("kill -15 $$", 1), ("exit 0", 0)])
def test_a_launcher_that_is_killed_is_a_crash(how: str, code: int, root: Path) -> None:
    """DeepSpeed's own code hands on what is above 0 only."""
    launch = f"lambda: subprocess.Popen(['sh', '-c', {how!r}]).wait()"
    text = f"import subprocess; from distill.launching.supervision import *; sys.exit(Supervisor().run({launch}))"
    assert subprocess.run([sys.executable, "-c", text], cwd=root, check=False).returncode == code


def test_a_host_that_may_yet_come_is_waited_for(
    fake_ssh: Path, free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("distill.launching.__main__.check_launcher", lambda launcher: None)
    monkeypatch.setattr(launching, "_REST_SECONDS", 0.01)
    (fake_ssh / "hosts").write_text("good slots=1\ndown slots=1\n")
    head = ["--hostfile", str(fake_ssh / "hosts"), "--master_port", str(free_port())]
    assert main(["--max-restarts", "1", *head, "launch/train.sh"]) == 1
    said = capsys.readouterr().err
    assert said.count("distill: host = 'down': not reached") == 2
    assert "starting again (1 of 1)" in said
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert main([*head, "launch/train.sh"]) == 2, "the other host wants mending"


def test_what_was_good_a_start_ago_may_be_so_again(monkeypatch: pytest.MonkeyPatch) -> None:
    given = iter([1, 2, 0])

    def start(launch: Launch, supervisor: Supervisor, typed: str) -> int:
        code = next(given)
        if code == 2:
            raise BadInput(Problem("--master_port", 1, "another run listens there", "wait"))
        return code

    monkeypatch.setattr(launching, "_start", start)
    monkeypatch.setattr(launching, "_REST_SECONDS", 0.01)
    assert main(["--max-restarts", "5", "launch/train.sh"]) == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 1)])
def test_no_host_keeps_the_file_of_a_launch_told_to_end_while_it_asks(
    number: signal.Signals, code: int, fake_ssh: Path, free_port: Callable[[], int], root: Path
) -> None:
    """One host has taken it, the other has yet to answer."""
    (fake_ssh / "hosts").write_text("good slots=1\nmute slots=1\n")
    (fake_ssh / "bin/pdsh").write_text(f"#!/bin/sh\ntouch {fake_ssh}/launched\n")
    (fake_ssh / "bin/pdsh").chmod(0o755)
    text = (
        "import secrets, sys; from distill.launching import hosts; from distill.launching.__main__ import main; "
        f"hosts._ANSWER_SECONDS = 4; secrets.token_hex = lambda count: 'told-{os.getpid()}'; "
        "sys.exit(main(sys.argv[1:]))"
    )
    flags = ["--hostfile", str(fake_ssh / "hosts"), "--master_port", str(free_port()), "launch/train.sh"]
    launch = subprocess.Popen([sys.executable, "-c", text, *flags], cwd=root)
    file = Path(f"/tmp/distill-told-{os.getpid()}.sh")
    while not file.exists():
        assert launch.poll() is None
        time.sleep(0.02)
    launch.send_signal(number)
    assert launch.wait(timeout=30) == code
    assert not list(Path("/tmp").glob(f"{file.name}*"))
    assert not (fake_ssh / "launched").exists()


def test_a_launch_that_was_told_to_end_is_not_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[Launch] = []

    def start(launch: Launch, supervisor: Supervisor, typed: str) -> int:
        starts.append(launch)
        supervisor._hear(signal.SIGTERM, None)
        return 1

    monkeypatch.setattr(launching, "_start", start)
    assert main(["--max-restarts=3", "launch/train.sh"]) == 1
    assert len(starts) == 1


def test_a_number_of_restarts_that_is_none_is_refused(capsys: Capture) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--max-restarts", "-1", "launch/train.sh"])
    assert "-1 is below 0" in capsys.readouterr().err


def test_what_was_typed_goes_along(hostfile: str) -> None:
    """To say how to resume."""
    environment = {"DISTILL_COMMAND": f"bash {NASTY}"}
    launch = plan(["--hostfile", hostfile, "launch/train.sh"], environment, FILE)
    done = subprocess.run(
        ["bash", "-c", launch.content + 'printf %s "$DISTILL_COMMAND"'], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"bash {NASTY}"
    flags = ["--launcher", "openmpi", "--hostfile", hostfile]
    assert "-x DISTILL_COMMAND" in " ".join(plan([*flags, "launch/train.sh"], environment, FILE).arguments)


def test_train_sh_keeps_what_was_typed(root: Path, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\nprintf %s "$DISTILL_COMMAND"\n')
    python.chmod(0o755)
    scripts = tmp_path / "launch"
    scripts.mkdir()
    shutil.copy(root / "launch/train.sh", scripts)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment.pop("DISTILL_COMMAND", None)
    command = ["bash", str(scripts / "train.sh"), "--config", NASTY]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    read = ["bash", "-c", 'eval "set -- $1"; printf "%s\\0" "$@"', "bash", done.stdout]
    assert subprocess.run(read, capture_output=True, text=True, check=True).stdout.split("\0")[:-1] == command


@pytest.mark.parametrize(("code", "requeued"), [(75, True), (0, False), (1, False)])
def test_slurm_sbatch_passes_the_signal_on_and_goes_back_into_the_queue(
    code: int, requeued: bool, root: Path, tmp_path: Path
) -> None:
    """With an srun that ends with `code` when it is told to stop."""
    scripts = {
        "srun": f"trap 'exit {code}' USR1; touch {tmp_path}/up; while true; do sleep 0.05; done",
        "scontrol": f'[ "$1" = requeue ] && echo "$@" > {tmp_path}/requeued || echo node-1',
    }
    for name, script in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "node-1", "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(root)}
    environment = {**os.environ, **job, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    batch = subprocess.Popen(["bash", "launch/slurm.sbatch", "--config", "x.yaml"], cwd=root, env=environment)
    while not (tmp_path / "up").exists():
        time.sleep(0.02)
    batch.send_signal(signal.SIGUSR1)
    assert batch.wait(timeout=10) == code
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 7\n"


def test_a_launch_hands_on_its_exit_code(root: Path) -> None:
    for code in (0, 2):
        text = f"from distill.launching.supervision import *; sys.exit(Supervisor().run(lambda: sys.exit({code})))"
        assert subprocess.run([sys.executable, "-c", text], cwd=root, check=False).returncode == code


def test_dry_run_prints_no_secret(
    hostfile: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "verysecret")
    assert main(["--dry-run", "--hostfile", hostfile, "launch/train.sh", "--config", "x.yaml"]) == 0
    printed = capsys.readouterr()
    assert "verysecret" not in printed.out + printed.err
    assert "hosts: worker-1, worker-2" in printed.err
    assert "WANDB_API_KEY" in printed.err


def dry(root: Path, script: str, *arguments: str, cwd: Path | None = None, **changes: str) -> list[str]:
    """The words of the command that a script prints."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", str(root / "launch" / script), "--dry-run", *arguments]
    environment = {**os.environ, "PATH": path, "DS_ACCELERATOR": "cpu"} | changes
    done = subprocess.run(command, cwd=cwd or root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # As the user's own bash reads what was printed.
    read = ["bash", "-c", 'eval "set -- $1"; printf "%s\\0" "$@"', "bash", done.stdout]
    return subprocess.run(read, capture_output=True, text=True, check=True).stdout.split("\0")[:-1]


def test_train_sh_prints_its_command_and_runs_nothing(root: Path, tmp_path: Path) -> None:
    printed = dry(root, "train.sh", "--num_accelerators", "2", "--config", NASTY, "optim.lr=$(touch x)", cwd=tmp_path)
    head = ["deepspeed", "--num_accelerators", "2", str(root / "launch/train.sh")]
    assert printed == [*head, "--config", NASTY, "optim.lr=$(touch x)"]
    assert not list(tmp_path.iterdir())


def test_openmpi_sh_prints_names_not_values(root: Path, tmp_path: Path) -> None:
    settings = {"WANDB_API_KEY": "verysecret", "MASTER_PORT": "7000"}
    run = ["--config", NASTY, "optim.lr=$(touch x)"]
    printed = dry(root, "openmpi.sh", "--hostfile", "my hosts", *run, cwd=tmp_path, **settings)
    assert printed[:4] == ["mpirun", "--hostfile", "my hosts", "--bind-to"]
    assert printed[-3:] == run
    assert printed[-4] == str(root / "launch/train.sh")
    pairs = [" ".join(pair) for pair in pairwise(printed)]
    assert {"--bind-to none", "-x WANDB_API_KEY", "-x MASTER_PORT"} <= set(pairs)
    assert "verysecret" not in " ".join(printed)
    assert not list(tmp_path.iterdir())


def test_openmpi_sh_needs_no_variable(root: Path) -> None:
    done = subprocess.run(
        ["bash", "launch/openmpi.sh", "--dry-run", "--config", "x.yaml"],
        cwd=root,
        env={"PATH": f"{Path(sys.executable).parent}:{os.defpath}", "HOME": os.environ.get("HOME", "/")},
        capture_output=True,
        text=True,
        check=True,
    )
    words = shlex.split(done.stdout)
    assert words[:3] == ["mpirun", "--bind-to", "none"]
    assert "" not in words


def test_no_ssh_sh_prints_its_command(root: Path, tmp_path: Path) -> None:
    hosts = ["--hosts", "a,b", "--slots", "8", "--node-rank", "1", "--master-addr", "a.svc", "--master_port", "7000"]
    printed = dry(root, "no_ssh.sh", *hosts, "--config", NASTY, "a=$(touch x)", cwd=tmp_path)
    head = ["python", "-m", "distill.launching", "--hostfile", "/dev/fd/9", "--no_ssh"]
    head += ["--node_rank", "1", "--master_addr", "a.svc"]
    assert printed == [*head, "--master_port", "7000", str(root / "launch/train.sh"), "--config", NASTY, "a=$(touch x)"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"--slots": "x; touch x"}, "--slots = 'x; touch x' is no number"),
        ({"--node-rank": "2"}, "--node-rank = 2, but --hosts has 2 hosts"),
        ({"--hosts": ""}, "--hosts is missing"),
        ({"--master-addr": ""}, "--master-addr is missing"),
    ],
)
def test_no_ssh_sh_says_what_is_wrong(changed: dict, expected: str, root: Path) -> None:
    settings = {"--hosts": "a,b", "--slots": "8", "--node-rank": "0", "--master-addr": "a"} | changed
    words = [word for pair in settings.items() for word in pair]
    command = ["bash", str(root / "launch/no_ssh.sh"), "--dry-run", *words, "--config", "x.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert expected in done.stderr


def test_slurm_sbatch_prints_its_command(root: Path, tmp_path: Path) -> None:
    """And what it prints is what every task runs, through to the run's own arguments."""
    job = {
        "SLURM_CPUS_PER_TASK": "64",
        "SLURM_JOB_ID": "12345",
        "SLURM_SUBMIT_DIR": str(root),
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_NODEID": "1",
    }
    printed = dry(root, "slurm.sbatch", "--config", NASTY, "a=$(touch x)", cwd=tmp_path, **job)
    assert printed[:4] == ["srun", "--ntasks-per-node=1", "--kill-on-bad-exit=0", "--wait=300"]
    assert "--cpus-per-task=64" in printed
    task = printed[printed.index("bash") :]
    assert task[-3:] == ["--config", NASTY, "a=$(touch x)"]
    assert task[task.index("--master_port") + 1] == "22345"
    words = dry(root, "no_ssh.sh", "--node-rank", "1", *task[4:])
    assert words[-3:] == ["--config", NASTY, "a=$(touch x)"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [["--max-restarts", "5"], ["--max-restarts=5"]])
def test_slurm_sbatch_hands_on_how_often_to_start_again(flags: list[str], root: Path) -> None:
    printed = dry(root, "slurm.sbatch", *flags, "--config", "x.yaml")
    task = printed[printed.index("bash") :]
    assert task[-2 - len(flags) :] == [*flags, "--config", "x.yaml"]
    words = dry(root, "no_ssh.sh", "--node-rank", "0", *task[4:])
    assert words[-3 - len(flags) : -3] == flags


def test_slurm_sbatch_outside_of_slurm_says_so(root: Path) -> None:
    command = ["bash", "launch/slurm.sbatch", "--config", "x.yaml"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "start it with sbatch" in done.stderr


def test_the_kubernetes_recipe_gives_no_ssh_sh_what_it_needs(root: Path) -> None:
    service, job = yaml.safe_load_all((root / "launch/kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    arguments = [word.replace("$(JOB_COMPLETION_INDEX)", "1") for word in pod["containers"][0]["args"]]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert pod["containers"][0]["command"] == ["bash", "launch/no_ssh.sh"]
    assert dry(root, "no_ssh.sh", *arguments)[-2:] == ["--config", "/runs/my.yaml"]
    assert len(arguments[arguments.index("--hosts") + 1].split(",")) == job["spec"]["completions"]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck")
@pytest.mark.parametrize("script", ["train.sh", "openmpi.sh", "no_ssh.sh", "slurm.sbatch"])
def test_scripts_are_clean(script: str, root: Path) -> None:
    # The rest of train.sh is Python.
    shell = (root / "launch" / script).read_text().split("\n'''\n")[0] + "\n"
    done = subprocess.run(["shellcheck", "-s", "bash", "-"], input=shell, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "set -euo pipefail" in shell
