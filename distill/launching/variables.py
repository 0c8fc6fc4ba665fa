"""Which variables of the user's shell go along to other hosts, and how they stay whole and secret on the way.

    python -m distill.launching.variables    # their names here, as `-x NAME` for mpirun, one word a line

ssh brings none of them. DeepSpeed forwards PYTHON* and NCCL_* on its command line, which it also prints.
"""

import os
import shlex
from collections.abc import Mapping
from pathlib import Path

from distill.lifeline import COMMAND

_PREFIXES = (
    "WANDB_",
    "HF_",
    "HUGGING_FACE_",
    "TRANSFORMERS_",
    "TOKENIZERS_",
    "NCCL_",
    "GLOO_",
    "TORCH_",
    "DS_",
    "DEEPSPEED_",
    "OMP_",
    "MPI4PY_",
)
_NAMES = ("LD_LIBRARY_PATH", "CXX", "CUDA_HOME", COMMAND)
_PROXIES = ("http_proxy", "https_proxy", "no_proxy", "all_proxy")
_MEETING_POINT = ("MASTER_ADDR", "MASTER_PORT")
# Of this host's own launch, or read by the launcher alone.
_NEVER = ("DS_ENV_FILE",)

FORWARDED = "DISTILL_FORWARDED"
"""Names the file that brought the variables; the ranks remove it once all hosts have read it."""


def forwarded(environment: Mapping[str, str]) -> dict[str, str]:
    """The part of `environment` that other hosts are given."""

    def goes(name: str) -> bool:
        return name.startswith(_PREFIXES) or name in _NAMES or name.lower() in _PROXIES

    return {name: value for name, value in sorted(environment.items()) if goes(name) and name not in _NEVER}


def exports(variables: Mapping[str, str]) -> str:
    """Shell text that sets `variables`, whatever their values hold."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())


def forget_file() -> None:
    """Remove the file that brought this host its variables: it may hold keys."""
    file = os.environ.pop(FORWARDED, None)
    if file is not None:
        Path(file).unlink(missing_ok=True)


def one_word(argument: str) -> str:
    """`argument` as bash reads it back whole, without a blank in it.

    DeepSpeed joins arguments into a remote command unquoted, but for those with blanks, which it puts into double
    quotes: `$(…)` in them would be run. pdsh takes a % for itself.
    """
    if argument and all(character.isascii() and (character.isalnum() or character in _SAFE) for character in argument):
        return argument
    return "$'" + "".join(_escaped(byte) for byte in argument.encode()) + "'"


_SAFE = "@+=:,./_-"


def _escaped(byte: int) -> str:
    character = chr(byte)
    return character if byte < 128 and (character.isalnum() or character in _SAFE) else f"\\x{byte:02x}"


def mpirun_flags(variables: Mapping[str, str]) -> list[str]:
    """`-x NAME` for each: mpirun carries the values itself, so that no command line shows them."""
    return [word for name in variables for word in ("-x", name)]


if __name__ == "__main__":
    print("\n".join(mpirun_flags(forwarded(os.environ) | {name: "" for name in _MEETING_POINT if name in os.environ})))
