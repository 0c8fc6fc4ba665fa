"""Hosts made of namespaces, each with a name, an address, processes and an sshd of its own, on one virtual switch."""

import os
import shutil
import signal
import subprocess
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

PREFIX = "distill-test"
_NEEDED = {"ip": "iproute2", "pdsh": "pdsh", "/usr/sbin/sshd": "openssh-server", "ssh": "openssh-client"}
_NEEDED |= {"nsenter": "util-linux", "unshare": "util-linux"}


def missing() -> str | None:
    """Why hosts cannot be made here; None if they can."""
    if os.uname().sysname != "Linux" or os.geteuid() != 0:
        return "network namespaces need root on Linux"
    for command, package in _NEEDED.items():
        if shutil.which(command) is None:
            return f"no {command} (Debian: apt-get install {package})"
    probe = _call("unshare", "--net", "--mount", "--uts", "ip", "link", "add", "x", "type", "veth", check=False)
    return None if probe.returncode == 0 else f"this kernel gives no namespaces ({probe.stderr.strip()})"


def _call(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=check, capture_output=True, text=True, timeout=30)


@dataclass
class Host:
    """One namespace; `sshd` is the process whose namespaces a command on this host joins."""

    name: str
    address: str
    namespace: str
    sshd: int = 0


@dataclass
class Cluster:
    """Hosts on one switch. Their filesystem is this machine's, but for what a host has mounted over a file.

    They have processes of their own because DeepSpeed, interrupted, ends all launches that it finds on a host.
    """

    folder: Path
    hosts: dict[str, Host] = field(default_factory=dict)
    _undo: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> "Cluster":
        with self._undo as undo:
            _sweep()
            self._make_keys()
            self._switch = self._namespace("switch")
            _call("ip", "-n", self._switch, "link", "add", "br0", "type", "bridge")
            _call("ip", "-n", self._switch, "link", "set", "br0", "up")
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def add(self, name: str, prepare: str = "true") -> Host:
        """A host of that name; `prepare` is run in its mount namespace before its sshd starts."""
        number = len(self.hosts) + 1
        host = Host(name, f"10.77.0.{number}", self._namespace(name))
        cable = f"to{number}"
        _call("ip", "-n", self._switch, "link", "add", cable, "type", "veth", "peer", "eth0", "netns", host.namespace)
        _call("ip", "-n", self._switch, "link", "set", cable, "master", "br0", "up")
        _call("ip", "-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
        for interface in ("lo", "eth0"):
            _call("ip", "-n", host.namespace, "link", "set", interface, "up")
        self.hosts[name] = host
        self._write_names(host)
        self._start_sshd(host, prepare)
        return host

    def silence(self, host: Host) -> None:
        """Let everything sent to the host vanish, as when its power is cut."""
        _call("ip", "-n", self._switch, "link", "set", f"to{host.address.rpartition('.')[2]}", "down")
        for other in self.hosts.values():
            if other is not host:
                # Otherwise the kernel soon says "no route to host", because nobody answers for the address.
                where = (host.address, "lladdr", "02:00:00:00:00:77", "dev", "eth0", "nud", "permanent")
                _call("ip", "-n", other.namespace, "neighbour", "replace", *where)

    def on(self, host: Host) -> list[str]:
        """What starts a command on the host, with the caller's environment."""
        return ["nsenter", "--target", str(host.sshd), "--net", "--uts", "--mount", "--pid", f"--wdns={Path.cwd()}"]

    def running(self, host: Host, word: str) -> list[str]:
        """The command lines on the host that hold `word`."""
        found = []
        for pid in _call("ip", "netns", "pids", host.namespace).stdout.split():
            with suppress(OSError):  # it has just ended
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found += [command] if word in command else []
        return found

    def path(self, path: str) -> str:
        """PATH with an ssh that knows these hosts in front."""
        return f"{self.folder}:{path}"

    def _namespace(self, name: str) -> str:
        namespace = f"{PREFIX}-{os.getpid()}-{name}"
        _call("ip", "netns", "add", namespace)
        self._undo.callback(_remove, namespace)
        return namespace

    def _make_keys(self) -> None:
        for key in ("host_key", "user_key"):
            _call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key))
        shutil.copy(self.folder / "user_key.pub", self.folder / "authorized_keys")
        ssh = self.folder / "ssh"
        ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F "{self.folder}/ssh_config" "$@"\n')
        ssh.chmod(0o755)
        Path("/run/sshd").mkdir(exist_ok=True)

    def _write_names(self, host: Host) -> None:
        # As Debian's installer writes it: a host's own name leads to its loopback.
        for each in self.hosts.values():
            others = [f"{other.address} {other.name}" for other in self.hosts.values() if other is not each]
            names = Path("/etc/netns") / each.namespace / "hosts"
            names.parent.mkdir(parents=True, exist_ok=True)
            # In place: what a namespace has mounted is this file, not its name.
            names.write_text("\n".join(["127.0.0.1 localhost", f"127.0.1.1 {each.name}", *others, ""]))
        options = f"User root\nIdentityFile {self.folder}/user_key\nIdentitiesOnly yes\nLogLevel ERROR\n"
        options += "StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\n"
        known = "".join(f"Host {each.name}\n  HostName {each.address}\n" for each in self.hosts.values())
        (self.folder / "ssh_config").write_text(f"{known}Host *\n{options}")

    def _start_sshd(self, host: Host, prepare: str) -> None:
        config = self.folder / f"sshd_{host.name}"
        config.write_text(
            f"ListenAddress {host.address}\nHostKey {self.folder}/host_key\nPidFile none\nUsePAM no\nStrictModes no\n"
            f"PermitRootLogin prohibit-password\nAuthorizedKeysFile {self.folder}/authorized_keys\nMaxStartups 100\n"
        )
        inside = f"hostname {host.name} && {prepare} && exec /usr/sbin/sshd -D -e -f {config}"
        log = (self.folder / f"sshd_{host.name}.log").open("w")
        own = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command = ["ip", "netns", "exec", host.namespace, *own, "sh", "-c", inside]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        self._undo.callback(process.wait)
        self._undo.callback(process.kill)
        deadline = time.monotonic() + 10
        while "Server listening" not in Path(log.name).read_text():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no sshd on {host.name}: {Path(log.name).read_text()}")
            time.sleep(0.05)
        host.sshd = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())


def _remove(namespace: str) -> None:
    """End what still runs in the namespace, then take it and its names away."""
    for pid in _call("ip", "netns", "pids", namespace, check=False).stdout.split():
        try:
            os.kill(int(pid), signal.SIGKILL)
        except ProcessLookupError:
            continue
    _call("ip", "netns", "delete", namespace, check=False)
    shutil.rmtree(Path("/etc/netns") / namespace, ignore_errors=True)


def _sweep() -> None:
    """Remove what a killed test session has left."""
    for line in _call("ip", "netns", "list").stdout.splitlines():
        name = line.split()[0]
        if name.startswith(PREFIX) and not Path(f"/proc/{name.split('-')[2]}").exists():
            _remove(name)
