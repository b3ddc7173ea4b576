"""The real daemon and its service manager, which the test is; and that an idle daemon sleeps."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sendense_restored.daemon.bus import Bus
from tools.lab import idle, leftovers
from tools.lab.bus import private_bus
from tools.lab.service import BUS_NAME, service

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tools.lab.bus import PrivateBus

    from .conftest import Machine

INTERVAL = 0.8
"""Seconds of the watchdog."""


class Manager:
    """The other end of the notify socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def hears(self, beginning: str, *, seconds: float = 60) -> str:
        """The next message that begins so; others are passed over. Raises TimeoutError."""
        self._sock.settimeout(seconds)
        while not (said := self._sock.recv(65536).decode("ascii")).startswith(beginning):
            pass
        return said

    def has_heard(self) -> Iterator[str]:
        """All that is there already."""
        self._sock.settimeout(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                yield self._sock.recv(65536).decode("ascii")

    def hears_no_more(self, seconds: float) -> bool:
        """Whether silence of that length begins, after what may be on its way."""
        list(self.has_heard())
        self._sock.settimeout(seconds)
        try:
            return not [self._sock.recv(65536) for _ in range(2)]
        except TimeoutError:
            return True


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield Manager(sock)


@pytest.fixture
def watchdog(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", str(int(INTERVAL * 1e6)))


def test_the_manager_hears_of_start_reloads_and_stop(machine: Machine, manager: Manager, tmp_path: Path) -> None:
    with service(machine.bus, tmp_path) as daemon:
        manager.hears("READY=1")
        configuration = tmp_path / "restored.toml"
        good = configuration.read_text()

        configuration.write_text(good + "\n[mounts]\nmax = 3\n[image]\nchain_depth = 5\n")
        os.kill(daemon.pid, signal.SIGHUP)
        assert "MONOTONIC_USEC=" in manager.hears("RELOADING=1")
        assert "restart to apply image.chain_depth" in manager.hears("STATUS=")
        manager.hears("READY=1")

        configuration.write_text(good + "\n[mounts]\nmax = 0\n")
        os.kill(daemon.pid, signal.SIGHUP)
        manager.hears("RELOADING=1")
        assert "not reloaded" in manager.hears("STATUS=")
        manager.hears("READY=1")

        configuration.write_text(good)
        os.kill(daemon.pid, signal.SIGHUP)
        manager.hears("RELOADING=1")
        manager.hears("READY=1")
    manager.hears("STOPPING=1")
    assert int(manager.hears("EXTEND_TIMEOUT_USEC=").partition("=")[2]) > 0
    log = daemon.log.read_text()
    assert "changed mounts.max" in log
    assert "takes effect at the next start: image.chain_depth" in log
    assert "mounts.max must be" in log
    assert log.count("changed mounts.max") == 2  # there and back


def test_a_start_that_fails_says_why_to_the_manager(machine: Machine, manager: Manager, tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="did not start"),
        service(machine.bus, tmp_path, "[mounts]\nmax = 0"),
    ):
        pass
    assert "not starting" in manager.hears("STATUS=")


@pytest.fixture
def private(tmp_path: Path) -> Iterator[PrivateBus]:
    """Before ``manager``: dbus-daemon, too, sends READY=1 to a NOTIFY_SOCKET that it finds in its environment."""
    with private_bus(tmp_path) as bus:
        yield bus


async def test_who_does_not_get_the_name_is_not_ready(private: PrivateBus, manager: Manager, tmp_path: Path) -> None:
    other = await Bus.connect(private.address)
    try:
        await other.own(BUS_NAME)
        with service(private, tmp_path, ready=False) as daemon:
            assert await asyncio.to_thread(daemon.process.wait, 60) not in {0, 78}
    finally:
        await other.close()
    assert "belongs to another process" in daemon.log.read_text()
    assert not [said for said in manager.has_heard() if said.startswith("READY=")]


@pytest.mark.usefixtures("watchdog")
def test_no_child_can_speak_in_the_daemons_name(
    machine: Machine, manager: Manager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LISTEN_FDNAMES", "nothing")
    with service(machine.bus, tmp_path) as daemon:
        manager.hears("READY=1")
        children = [int(key.split()[-1]) for key in leftovers.children_of(daemon.pid)]
        assert children
        for pid in children:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
            assert not any(name in environment for name in (b"NOTIFY_", b"WATCHDOG_", b"LISTEN_")), environment


@pytest.mark.usefixtures("watchdog")
def test_the_watchdog_hears_of_a_daemon_that_its_bus_can_reach_and_of_no_other(
    manager: Manager, tmp_path: Path
) -> None:
    with private_bus(tmp_path) as bus, service(bus, tmp_path) as daemon:
        for _ in range(3):
            manager.hears("WATCHDOG=1", seconds=10)
        for pid in (bus.pid, daemon.pid):
            os.kill(pid, signal.SIGSTOP)
            try:
                assert manager.hears_no_more(2 * INTERVAL)
            finally:
                os.kill(pid, signal.SIGCONT)
            manager.hears("WATCHDOG=1", seconds=10)
    assert "the message bus does not answer" in daemon.log.read_text()


@pytest.mark.long
def test_an_idle_daemon_sleeps(machine: Machine, tmp_path: Path) -> None:
    with service(machine.bus, tmp_path) as daemon:
        idle.switches_during(daemon.pid, 5)  # in which it may end what the start has begun
        counted = idle.switches_during(daemon.pid, 60)
    due = 0  # the sweep is due every 15 minutes
    assert counted.total() <= due + 2, counted
