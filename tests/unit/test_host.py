"""What a rank learns of its machine."""

import psutil
import pytest

from distill import host


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
