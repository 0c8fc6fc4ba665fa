"""`deepspeed`, with care for other hosts: they are asked first, and given the variables that ssh does not bring.

    python -m distill.launching [--dry-run] [--max-restarts N] [launcher flags] SCRIPT [its arguments]

`--dry-run` prints the command and, on stderr, what goes along; nothing is started and no host is asked.
`--max-restarts` starts again after a crash, up to N times.
"""

import argparse
import os
import secrets
import shlex
import sys
from contextlib import suppress

from deepspeed.launcher import runner

from distill.console import natural, tell
from distill.errors import (
    EXIT_BAD_INPUT,
    EXIT_BAD_NUMBERS,
    EXIT_DOES_NOT_FIT,
    EXIT_FAILED,
    EXIT_PREEMPTED,
    BadInput,
    refusal,
)
from distill.launching.command import Launch, plan
from distill.launching.here import check_alone, check_launcher
from distill.launching.supervision import Supervisor
from distill.lifeline import COMMAND

# A connection that is lost without a word is given up after two minutes, and pdsh then names the host.
_KEEP_ALIVE = "-o ServerAliveInterval=30 -o ServerAliveCountMax=4"
# After these a start would end in the same way, or is someone else's to decide.
_SETTLED = (0, EXIT_BAD_INPUT, EXIT_DOES_NOT_FIT, EXIT_BAD_NUMBERS, EXIT_PREEMPTED)
# Other hosts may still be ending.
_REST_SECONDS = 5.0


def main(arguments: list[str]) -> int:
    """Start what the arguments say; the exit code."""
    options, wanted = _options(arguments)
    typed = os.environ.get(COMMAND) or shlex.join(["python", "-m", "distill.launching", *arguments])
    started = 0
    with Supervisor() as supervisor:
        while True:
            code = _once(wanted, options.dry_run, supervisor, typed, again=started > 0)
            if code in _SETTLED or started == options.max_restarts or not supervisor.rest(_REST_SECONDS):
                return code
            started += 1
            again = f"starting again ({started} of {options.max_restarts})"
            with suppress(OSError):
                print(f"distill: the run ended with exit code {code}; {again}", file=sys.stderr, flush=True)


def _once(wanted: list[str], dry_run: bool, supervisor: Supervisor, typed: str, again: bool) -> int:
    """One start; what is refused is told."""
    try:
        launch = plan(wanted, {**os.environ, COMMAND: typed}, f"/tmp/distill-{secrets.token_hex(8)}.sh")
        if not dry_run:
            return _start(launch, supervisor, typed)
        _show(launch)
        return 0
    except BadInput as error:
        if supervisor.told:
            return supervisor.code_unstarted()  # Ctrl-C ends ssh, too
        tell(error)
        # What was good a start ago may be so again: a host that reboots, a port that is not free yet.
        return EXIT_FAILED if again else error.code


def _options(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Ours, which stand before the script, and what DeepSpeed's launcher gets."""
    parser = argparse.ArgumentParser(prog="distill.launching", allow_abbrev=False, add_help=False)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--max-restarts", type=natural, default=0)
    return parser.parse_known_args(arguments)


def _show(launch: Launch) -> None:
    print(shlex.join(["deepspeed", *launch.arguments]))
    if launch.ssh.hosts:
        print(f"hosts: {', '.join(launch.ssh.hosts)}", file=sys.stderr)
        print(f"forwarded: {', '.join(launch.variables) or 'nothing'}", file=sys.stderr)


def _start(launch: Launch, supervisor: Supervisor, typed: str) -> int:
    def run(*more: str) -> None:
        os.environ[COMMAND] = typed
        runner.main([*more, *launch.arguments])

    if launch.launcher is not None:
        check_launcher(launch.launcher)
    elif launch.alone:
        check_alone(launch.meeting_port)
    if not launch.ssh.hosts:
        meeting = (launch.meeting_address, launch.meeting_port) if launch.meeting_address else None
        return supervisor.run(run, meeting)
    # Whatever happens from here on, no host keeps the file: it may hold keys.
    try:
        if problems := launch.ssh.prepare(launch.meeting_port, launch.file, launch.content):
            raise refusal(problems)
        if supervisor.told:
            return supervisor.code_unstarted()
        address = launch.meeting_address or launch.ssh.first_address()
        # DeepSpeed would ask once more, by an ssh without the user's options.
        found = [] if launch.meeting_address else ["--master_addr", address]
        before = os.environ.get("PDSH_SSH_ARGS_APPEND", "")
        os.environ["PDSH_SSH_ARGS_APPEND"] = f"{before} {_KEEP_ALIVE}".strip()
        return supervisor.run(lambda: run("--no_ssh_check", *found), (address, launch.meeting_port))
    finally:
        _clear(launch)


def _clear(launch: Launch) -> None:
    if launch.file is not None:
        launch.ssh.remove(launch.file)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
