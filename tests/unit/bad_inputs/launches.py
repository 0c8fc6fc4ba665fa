"""Hostfiles and flags of the launchers."""

from bad_inputs.case import Case

_TRAIN = ("launch/train.sh", "--config", "x.yaml")


def _hosts(name: str, expected: str, content: str | bytes, *flags: str) -> Case:
    return Case(name, expected, lambda p: ["launch", "--hostfile", str(p.file("hosts", content)), *flags, *_TRAIN])


def _flags(name: str, expected: str, *flags: str) -> Case:
    return Case(name, expected, lambda _: ["launch", *flags, *_TRAIN])


_LINE = "--hostfile = 'GIVEN/hosts:2': "
_TWO = "a slots=2\nb slots=2\n"
LAUNCHES = [
    _flags("no such hostfile", "--hostfile = '/no/hosts': no such file", "--hostfile", "/no/hosts"),
    Case("a folder", "--hostfile = 'GIVEN': is a folder", lambda p: ["launch", "--hostfile", str(p.given), *_TRAIN]),
    _hosts("an empty hostfile", "--hostfile = 'GIVEN/hosts': names no host", "# nobody\n"),
    _hosts("a host twice", f"{_LINE}multiple entries for a ('a slots=4')", "a slots=2\na slots=4\n"),
    _hosts("no slots", f"{_LINE}is a bad entry ('b')", "a slots=2\nb\n"),
    _hosts("a host without a rank", f"{_LINE}a host without a rank; leave it out", "a slots=2\nb slots=0\n"),
    _hosts("a word for slots", f"{_LINE}is a bad entry ('b slots=x')", "a slots=2\nb slots=x\n"),
    _hosts("slots with a tail", f"{_LINE}is a bad entry ('b slots=2x')", "a slots=2\nb slots=2x\n"),
    _hosts("negative slots", f"{_LINE}is a bad entry ('b slots=-2')", "a slots=2\nb slots=-2\n"),
    _hosts("slots without end", f"{_LINE}is a bad entry", "a slots=2\nb slots=99999999999\n"),
    _hosts(
        "an option as a host",
        f"{_LINE}'-oProxyCommand=touch$IFS' is no host's name",
        "a slots=2\n-oProxyCommand=touch$IFS slots=2\n",
    ),
    _hosts(
        "a command as a host", f"{_LINE}'$(touch${{IFS}}x)' is no host's name", "a slots=2\n$(touch${IFS}x) slots=2\n"
    ),
    _hosts("a file as a host", f"{_LINE}'^/etc/passwd' is no host's name", "a slots=2\n^/etc/passwd slots=2\n"),
    _hosts("garbage", f"{_LINE}is a bad entry", "a slots=2\n{]}}}\n"),
    _hosts("bytes that are no text", "--hostfile = 'GIVEN/hosts': not UTF-8", b"caf\xe9 slots=2\n"),
    _hosts("unequal hosts", "--hostfile = 'GIVEN/hosts': a has 2 ranks, b has 4", "a slots=2\nb slots=4\n"),
    _hosts("an unknown host", "--include = 'c': Hostname 'c' not found in hostfile", _TWO, "--include", "c"),
    _hosts("an unknown slot", "--include = 'a:7': No slot '7' specified on host 'a'", _TWO, "--include", "a:7"),
    _hosts("a slot that is a word", "--include = 'a:x': ", _TWO, "--include", "a:x"),
    _hosts("nobody left", "--exclude = 'a@b': leaves no host", _TWO, "--exclude", "a@b"),
    _hosts("both filters", "--include = 'a': include_str and exclude_str", _TWO, "--include", "a", "--exclude", "b"),
    _hosts(
        "an unknown launcher", "--launcher = 'rsh': no such launcher; one of pdsh, openmpi", _TWO, "--launcher", "rsh"
    ),
    _flags("no ranks", "--num_accelerators = 0: is not 1 or more", "--num_accelerators", "0"),
    _flags("no nodes", "--num_nodes = -3: is not 1 or more", "--num_nodes", "-3"),
    _flags("ranks that are a word", "argument --num_gpus", "--num_accelerators", "two"),
    _flags("no port", "--master_port = 99999: is no port; give 1024 to 65535", "--master_port", "99999"),
]
