"""What a rank learns of its machine."""

import os
import shutil
import sys
from pathlib import Path

import psutil
import pytest

from distill import host, topology


def test_the_interface_of_the_loopback_is_never_chosen() -> None:
    """No other host gets there."""
    assert host.interface_towards("127.0.0.1") is None
    assert host.interface_towards("no-such-host.invalid") is None


def test_the_interface_that_has_the_address_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Probe:
        def __enter__(self) -> "Probe":
            return self

        def __exit__(self, *_: object) -> None:
            return None

        def connect(self, address: tuple[str, int]) -> None:
            assert address == ("10.1.2.3", 9)

        def getsockname(self) -> tuple[str, int]:
            return "10.1.2.9", 4711

    class Address:
        def __init__(self, address: str) -> None:
            self.address = address

    cards = {"lo": [Address("127.0.0.1")], "docker0": [Address("172.17.0.1")], "ens5": [Address("10.1.2.9")]}
    monkeypatch.setattr(host.socket, "socket", lambda *_: Probe())
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: cards)
    assert host.interface_towards("10.1.2.3") == "ens5"
    assert host.address_towards("10.1.2.3") == "10.1.2.9"


def test_an_interface_is_chosen_between_hosts_only_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology, "interface_towards", {"beta": "eth0", "gamma": "eth1"}.get)
    monkeypatch.setattr(topology.os, "environ", {"WORLD_SIZE": "4", "LOCAL_SIZE": "4"})
    topology.choose_interface("beta")
    assert "GLOO_SOCKET_IFNAME" not in topology.os.environ
    topology.os.environ["LOCAL_SIZE"] = "2"
    for towards in ("alpha", "beta", "gamma"):
        topology.choose_interface(towards)
    assert topology.os.environ["GLOO_SOCKET_IFNAME"] == "eth0"


def test_ninja_is_found_behind_what_the_user_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    beside = str(Path(sys.executable).parent)
    for path, expected in ((str(tmp_path), f"{tmp_path}:{beside}"), (f"{tmp_path}:{beside}", f"{tmp_path}:{beside}")):
        monkeypatch.setenv("PATH", path)
        host.find_ninja()
        assert os.environ["PATH"] == expected
    assert shutil.which("ninja")
