"""Asking all hosts at once, through ssh, whether they can run this checkout; handing them the forwarded variables."""

import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from distill.errors import Absence, BadInput, Problem
from distill.launching.here import LISTEN
from distill.rollcall import port_taken

# A host that is down does not answer at all; one that is busy may take a while for the rest.
_CONNECT_SECONDS, _ANSWER_SECONDS = 10, 20
_NO_FOLDER, _NO_PYTHON, _NO_FILE, _NO_PORT = 91, 92, 93, 94
_NOT_REACHED = 255
"""Of ssh itself."""


@dataclass(frozen=True)
class Ssh:
    """How to reach the hosts of a run."""

    hosts: Sequence[str] = ()
    port: int | None = None
    options: Sequence[str] = ()
    """Further ones of the ssh command."""

    def prepare(self, meeting_port: int, file: str | None = None, content: str = "") -> list[Problem]:
        """See that every host is up and has this folder and interpreter; leave `content` there as private `file`.

        At `meeting_port` of the first, rank 0 will listen.
        """
        folder, python = shlex.quote(str(Path.cwd())), shlex.quote(sys.executable)
        asked = f"cd {folder} || exit {_NO_FOLDER}; test -x {python} || exit {_NO_PYTHON}"
        commands = dict.fromkeys(self.hosts, asked)
        listen = f"{python} -c {shlex.quote(LISTEN)} {meeting_port} 2>/dev/null || exit {_NO_PORT}"
        commands[self.hosts[0]] += f"; {listen}"
        if file is not None:
            # Renamed into place: where hosts share a filesystem, one may read while another writes.
            for number, host in enumerate(self.hosts):
                parts = f"{file}.{number}", file
                commands[host] += f"; umask 077; cat > {parts[0]} && mv -f {parts[0]} {parts[1]} || exit {_NO_FILE}"
        with ThreadPoolExecutor(max_workers=64) as pool:
            return [
                problem
                for problem in pool.map(lambda host: self._ask(host, commands[host], content, meeting_port), commands)
                if problem
            ]

    def first_address(self) -> str:
        """An address of the first host, as DeepSpeed would choose it: the first that the host itself names.

        Raises:
            BadInput: it names none.
        """
        done = self._run(self.hosts[0], "hostname -I", "")
        addresses = done.stdout.split() if done else []
        if not addresses:
            wrong = f"{self.hosts[0]} does not tell its address (hostname -I)"
            raise BadInput(Problem("--master_addr", None, wrong, "give an address of it that the others reach"))
        return addresses[0]

    def remove(self, file: str) -> None:
        """Take the private file away where the ranks have not."""
        with ThreadPoolExecutor(max_workers=64) as pool:
            commands = [f"rm -f {file} {file}.{number}" for number in range(len(self.hosts))]
            list(pool.map(lambda host, command: self._run(host, command, ""), self.hosts, commands))

    def _ask(self, host: str, command: str, content: str, meeting_port: int) -> Problem | None:
        done = self._run(host, command, content)
        if done is None:
            return Absence("host", host, f"no answer in {_ANSWER_SECONDS} s", "see whether it is up, or leave it out")
        folder = str(Path.cwd())
        reasons = {
            _NO_FOLDER: (f"has no folder {folder}", "put the checkout at the same path on all hosts"),
            _NO_PYTHON: (f"has no {sys.executable}", "put the environment at the same path on all hosts"),
            _NO_FILE: ("takes no file in /tmp", "see whether its disk is full"),
        }
        if done.returncode == 0:
            return None
        if done.returncode == _NOT_REACHED:
            mend = f"see whether it is up and `ssh {host} true` asks nothing, or leave it out"
            return Absence("host", host, f"not reached ({_last_line(done.stderr)})", mend)
        if done.returncode == _NO_PORT:
            return port_taken(f"{host}:{meeting_port}")
        other = f"refuses a command ({_last_line(done.stderr)})", f"see what `ssh {host} true` says"
        return Problem("host", host, *reasons.get(done.returncode, other))

    def _run(self, host: str, command: str, content: str) -> subprocess.CompletedProcess[str] | None:
        options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_SECONDS}", *self.options]
        port = ["-p", str(self.port)] if self.port is not None else []
        try:
            return subprocess.run(
                ["ssh", *options, *port, host, command],
                input=content,
                capture_output=True,
                text=True,
                timeout=_ANSWER_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return None


def _last_line(text: str) -> str:
    return (text.strip() or "it says nothing").splitlines()[-1][:160]
