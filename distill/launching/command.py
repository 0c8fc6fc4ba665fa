"""What a launch comes to: the deepspeed command with everything quoted, and what goes to the hosts before it."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT
from deepspeed.launcher import runner

from distill.errors import BadInput, Problem
from distill.launching.hostfile import read_hostfile
from distill.launching.hosts import Ssh
from distill.launching.variables import FORWARDED, exports, forwarded, mpirun_flags, one_word
from distill.lifeline import STDIN
from distill.rollcall import unequal_slots

# Of DeepSpeed; the first two are known here.
_LAUNCHERS = ("pdsh", "openmpi", "mpich", "impi", "slurm", "mvapich")
_SOCKETS = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


@dataclass(frozen=True)
class Launch:
    """Arguments of the DeepSpeed launcher, the hosts that it reaches by ssh, and what these are given."""

    arguments: list[str]
    launcher: str | None = None
    """What reaches the hosts; None where ranks start on this machine, or we do not know."""
    ssh: Ssh = field(default_factory=Ssh)
    """Without hosts where nothing is to be asked of them."""
    meeting_port: int = TORCH_DISTRIBUTED_DEFAULT_PORT
    meeting_address: str | None = None
    """Where the ranks will meet; None where it has yet to be found out, or nobody but the launcher knows."""
    alone: bool = False
    """Whether all ranks are on this machine."""
    file: str | None = None
    content: str = ""
    variables: tuple[str, ...] = ()


def plan(arguments: Sequence[str], environment: Mapping[str, str], file: str) -> Launch:
    """What `deepspeed *arguments` should be; `file` is the name, on all hosts, for what they are given.

    Raises:
        BadInput: a hostfile that cannot be used, or paths that DeepSpeed would not hand over whole.
    """
    args = runner.parse_args(list(arguments))
    _check_numbers(args)
    hosts = [] if args.no_ssh else _hosts(args)
    launcher, port, address = args.launcher.lower(), args.master_port, args.master_addr or None
    if len(hosts) < 2 and not (hosts and args.force_multi):
        alone = not args.no_ssh
        return Launch(list(arguments), None, Ssh(), port, "127.0.0.1" if alone else address, alone)
    if launcher not in _LAUNCHERS:
        raise BadInput(Problem("--launcher", args.launcher, "no such launcher", f"one of {', '.join(_LAUNCHERS)}"))
    if launcher not in ("pdsh", "openmpi"):
        return Launch(list(arguments), None, Ssh(), port, address)
    flags = list(arguments[: len(arguments) - 1 - len(args.user_args)])
    variables = forwarded(environment)
    if launcher == "openmpi":
        given = [args.launcher_args, shlex.join(_for_mpirun(args, variables))]
        flags.append(f"--launcher_args={' '.join(given).strip()}")
        # mpirun may have another way onto the hosts than ssh.
        ssh = Ssh() if args.no_ssh_check else Ssh(hosts, args.ssh_port)
        words = [*flags, args.user_script, *args.user_args]
        return Launch(words, launcher, ssh, port, address, variables=tuple(variables))
    for name, path in (("checkout", str(Path.cwd())), ("python", sys.executable), ("script", args.user_script)):
        if one_word(path) != path:
            wrong = "DeepSpeed hands this path to other hosts unquoted"
            raise BadInput(Problem(name, path, wrong, "move it to a path of letters, digits, `.`, `_` and `-`"))
    activate = f"source {shlex.quote(args.venv_script)}\n" if args.venv_script else ""
    content = activate + exports(variables | {FORWARDED: file, STDIN: "1"})
    words = [one_word(argument) for argument in args.user_args]
    # pdsh gives them to ssh.
    ssh = Ssh(hosts, args.ssh_port, environment.get("PDSH_SSH_ARGS_APPEND", "").split())
    flags += ["--venv_script", file, args.user_script]
    return Launch([*flags, *words], launcher, ssh, port, address, False, file, content, tuple(variables))


def _check_numbers(args: "runner.argparse.Namespace") -> None:
    """DeepSpeed's own -1 stands for what was not given."""
    for flag, value in (("--num_nodes", args.num_nodes), ("--num_accelerators", args.num_gpus)):
        if value < 1 and value != -1:
            raise BadInput(Problem(flag, value, "is not 1 or more", "give how many there are"))
    if not 0 < args.master_port < 2**16:
        raise BadInput(Problem("--master_port", args.master_port, "is no port", "give 1024 to 65535"))


def _hosts(args: "runner.argparse.Namespace") -> list[str]:
    """The hosts that will take part, in order; none without a hostfile."""
    if args.hostfile != runner.DLTS_HOSTFILE and not Path(args.hostfile).is_file():
        # DeepSpeed would train on this machine alone.
        wrong = "is a folder" if Path(args.hostfile).is_dir() else "no such file"
        raise BadInput(Problem("--hostfile", args.hostfile, wrong, "see launch/hostfile.example"))
    if not Path(args.hostfile).is_file():
        return []
    slots = read_hostfile(args.hostfile)
    try:
        chosen = runner.parse_inclusion_exclusion(slots, args.include, args.exclude)
    except (ValueError, LookupError) as error:
        flag = "--include" if args.include else "--exclude"
        raise BadInput(Problem(flag, args.include or args.exclude, str(error), "e.g. worker-1@worker-2:0,1")) from None
    if not chosen:
        raise BadInput(Problem("--exclude", args.exclude, "leaves no host", "leave one in"))
    active = runner.apply_num_nodes_and_gpus(chosen, args.num_nodes, args.num_gpus)
    if problem := unequal_slots("--hostfile", args.hostfile, {host: len(ranks) for host, ranks in active.items()}):
        raise BadInput(problem)
    return list(active)


def _for_mpirun(args: "runner.argparse.Namespace", variables: Mapping[str, str]) -> list[str]:
    # mpirun is not told DeepSpeed's meeting point.
    flags = [*mpirun_flags(variables), "-x", f"MASTER_PORT={args.master_port}"]
    if args.master_addr:
        flags += ["-x", f"MASTER_ADDR={args.master_addr}"]
    if "--bind-to" not in args.launcher_args:
        # mpirun would hold every rank to one core.
        flags += ["--bind-to", "none"]
    chosen = [variables[name] for name in _SOCKETS if name in variables]
    if chosen and chosen[0].replace(",", "").isalnum() and "btl_tcp_if_include" not in args.launcher_args:
        # DeepSpeed would say eth0.
        flags += ["--mca", "btl_tcp_if_include", chosen[0]]
    return flags
