"""What this machine must have before it starts ranks, here or elsewhere."""

import shutil
import subprocess
import sys

from deepspeed.accelerator import get_accelerator

from distill.errors import BadInput, Problem
from distill.rollcall import port_taken

# With SO_REUSEADDR only a port that someone listens at is taken, not one that was in use a moment ago.
LISTEN = (
    "import socket, sys; s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); "
    "s.bind(('', int(sys.argv[1]))); s.listen()"
)
"""Python that fails where its argument is a port in use."""

_PACKAGES = {"ssh": "openssh-client", "pdsh": "pdsh", "mpirun": "openmpi-bin", "ompi_info": "openmpi-bin"}
_NEEDS = {"pdsh": ("ssh", "pdsh"), "openmpi": ("ssh", "mpirun", "ompi_info")}


def check_launcher(launcher: str) -> None:
    """See that the commands are here through which DeepSpeed reaches other hosts.

    Raises:
        BadInput: one is missing.
    """
    missing = [command for command in _NEEDS[launcher] if shutil.which(command) is None]
    if missing:
        packages = " ".join(dict.fromkeys(_PACKAGES[command] for command in missing))
        wrong = f"this machine has no {' and no '.join(missing)}"
        raise BadInput(Problem("--launcher", launcher, wrong, f"install it (Debian: apt-get install {packages})"))


def check_alone(port: int) -> None:
    """See that this machine can run ranks that meet at `port`.

    Raises:
        BadInput: no device of the kind asked for, or the port is in use.
    """
    accelerator = get_accelerator()
    if not accelerator.is_available():
        wrong = "this machine has no such device, or torch was not built for it"
        mend = "unset it or give cpu, or start on a machine that has one"
        raise BadInput(Problem("DS_ACCELERATOR", accelerator.device_name(), wrong, mend))
    if subprocess.run([sys.executable, "-c", LISTEN, str(port)], capture_output=True, check=False).returncode != 0:
        raise BadInput(port_taken(f"127.0.0.1:{port}"))
