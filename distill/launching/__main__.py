"""`deepspeed`, with care for other hosts: they are asked first, and given the variables that ssh does not bring.

    python -m distill.launching [--dry-run] [launcher flags] SCRIPT [its arguments]

`--dry-run` prints the command and, on stderr, what goes along; nothing is started and no host is asked.
"""

import os
import secrets
import shlex
import sys
from contextlib import suppress

from deepspeed.launcher import runner

from distill.console import tell
from distill.errors import EXIT_BAD_INPUT, BadInput
from distill.launching.command import Launch, plan
from distill.launching.here import check_alone, check_launcher
from distill.launching.supervision import supervise

# A connection that is lost without a word is given up after two minutes, and pdsh then names the host.
_KEEP_ALIVE = "-o ServerAliveInterval=30 -o ServerAliveCountMax=4"


def main(arguments: list[str]) -> int:
    """Start what the arguments say; the exit code."""
    dry = "--dry-run" in arguments
    wanted = [argument for argument in arguments if argument != "--dry-run"]
    try:
        launch = plan(wanted, os.environ, f"/tmp/distill-{secrets.token_hex(8)}.sh")
        if dry:
            print(shlex.join(["deepspeed", *launch.arguments]))
            if launch.ssh.hosts:
                print(f"hosts: {', '.join(launch.ssh.hosts)}", file=sys.stderr)
                print(f"forwarded: {', '.join(launch.variables) or 'nothing'}", file=sys.stderr)
            return 0
        return _start(launch)
    except BadInput as error:
        tell(error)
        return EXIT_BAD_INPUT


def _start(launch: Launch) -> int:
    arguments = launch.arguments
    if launch.launcher is not None:
        check_launcher(launch.launcher)
    elif launch.meeting_port is not None:
        check_alone(launch.meeting_port)
    if not launch.ssh.hosts:
        return supervise(lambda: runner.main(arguments))
    assert launch.meeting_port is not None
    # Whatever happens from here on, no host keeps the file: it may hold keys.
    try:
        if problems := launch.ssh.prepare(launch.meeting_port, launch.file, launch.content):
            raise BadInput(problems)
        # DeepSpeed would ask once more, by an ssh without the user's options.
        found = ["--master_addr", launch.ssh.first_address()] if launch.finds_address else []
        before = os.environ.get("PDSH_SSH_ARGS_APPEND", "")
        os.environ["PDSH_SSH_ARGS_APPEND"] = f"{before} {_KEEP_ALIVE}".strip()
        return supervise(lambda: runner.main(["--no_ssh_check", *found, *arguments]))
    finally:
        _clear(launch)


def _clear(launch: Launch) -> None:
    if launch.file is not None:
        with suppress(KeyboardInterrupt):
            launch.ssh.remove(launch.file)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
