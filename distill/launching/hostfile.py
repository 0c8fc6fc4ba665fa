"""Reading hostfiles more strictly than DeepSpeed, which takes `slots=2x` for 2 and any word for a host."""

import re
from pathlib import Path

from distill.errors import BadInput, Problem

_LINE = re.compile(r"(\S+)\s+slots=(\d{1,5})(\s+\S+=\S+)*")
# It becomes a word of ssh's, pdsh's and the shell's: no option, no pattern, no list.
_HOST = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9_][A-Za-z0-9_.:-]*")
_LONGEST = 2**20
_MEND = "write lines such as `worker-1 slots=8`, as in launch/hostfile.example"


def read_hostfile(path: str) -> dict[str, int]:
    """Ranks by host, in order.

    Raises:
        BadInput: a line that is none, a host that stands twice, or no host at all; names the line.
    """
    slots: dict[str, int] = {}
    for number, line in enumerate(_text(path).splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line.partition("#")[0].rstrip())
        host, count = (found[1], int(found[2])) if found else ("", 0)
        if found is None:
            wrong = "is a bad entry"
        elif not _HOST.fullmatch(host):
            wrong = f"{host!r} is no host's name"
        elif count < 1:
            wrong = "a host without a rank; leave it out"
        elif host in slots:
            wrong = f"multiple entries for {host}"
        else:
            slots[host] = count
            continue
        raise BadInput(Problem("--hostfile", f"{path}:{number}", f"{wrong} ({line[:80]!r})", _MEND))
    if not slots:
        raise BadInput(Problem("--hostfile", path, "names no host", _MEND))
    return slots


def _text(path: str) -> str:
    try:
        with Path(path).open("rb") as file:
            raw = file.read(_LONGEST + 1)
    except OSError as error:
        raise BadInput(Problem("--hostfile", path, f"cannot be read ({error.strerror or error})", _MEND)) from None
    if len(raw) > _LONGEST:
        raise BadInput(Problem("--hostfile", path, "is longer than 1 MiB", _MEND))
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise BadInput(Problem("--hostfile", path, "not UTF-8", _MEND)) from None
