"""What the service manager is told, read from a socket in its place; and that the watchdog proves something."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from sendense_restored.daemon.bus import BusCallError, BusError
from sendense_restored.daemon.notify import ServiceManager

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@dataclass
class Manager:
    """The other end."""

    sock: socket.socket

    def heard(self) -> list[str]:
        """What has been said so far."""
        said = []
        while True:
            try:
                said.append(self.sock.recv(65536).decode("ascii"))
            except BlockingIOError:
                return said


@dataclass
class Timers:
    """Timers that expire when the test says so."""

    waiting: list[Timer] = field(default_factory=list)

    def later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        timer = Timer(self, seconds, callback)
        self.waiting.append(timer)
        return timer

    async def expire(self) -> float:
        (timer,) = self.waiting
        self.waiting.clear()
        timer.callback()
        await turns()
        return timer.seconds


@dataclass
class Timer:
    timers: Timers
    seconds: float
    callback: Callable[[], None]

    def cancel(self) -> None:
        self.timers.waiting.remove(self)


async def turns() -> None:
    """Let the loop run what is ready."""
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))
        sock.settimeout(0)
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        yield Manager(sock)


@pytest.fixture
def ours(manager: Manager) -> Iterator[ServiceManager]:
    del manager
    taken = ServiceManager.take()
    yield taken
    taken.close()
    taken.close()


def test_each_state_is_said_in_the_managers_words(manager: Manager, ours: ServiceManager) -> None:
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    ours.ready()
    ours.reloading()
    ours.extend(1.5)
    ours.stopping()
    ready, reloading, extend, stopping = manager.heard()
    assert (ready, extend, stopping) == ("READY=1", "EXTEND_TIMEOUT_USEC=1500000", "STOPPING=1")
    first, second = reloading.split("\n")
    assert first == "RELOADING=1"
    moment = int(second.removeprefix("MONOTONIC_USEC="))
    assert before <= moment <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000


def test_a_status_is_said_once_and_a_notice_stays_behind_it(manager: Manager, ours: ServiceManager) -> None:
    ours.status("1 mount")
    ours.status("1 mount")
    ours.notice("not reloaded")
    ours.status("2 mounts")
    ours.notice("")
    assert manager.heard() == [
        "STATUS=1 mount",
        "STATUS=1 mount; not reloaded",
        "STATUS=2 mounts; not reloaded",
        "STATUS=2 mounts",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a\nREADY=1", "STATUS=a READY=1"),
        ("a\rb\0c\x1b[2J", "STATUS=a b c [2J"),
        ("caf\u00e9 \u202e \U0001f600", "STATUS=caf\\xe9   \\U0001f600"),
        ("\ud800", "STATUS= "),
        ("x" * 5000, "STATUS=" + "x" * 1000),
    ],
)
def test_no_text_becomes_more_than_a_status(manager: Manager, ours: ServiceManager, text: str, said: str) -> None:
    ours.status(text)
    assert manager.heard() == [said]


def test_what_the_manager_has_given_us_is_for_nobody_else(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    del manager
    for name in ("WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"):
        monkeypatch.setenv(name, "1")
    before = set(os.environ)
    taken = ServiceManager.take()
    taken.close()
    left = {name for name in os.environ if name.startswith(("NOTIFY_", "WATCHDOG_", "LISTEN_"))}
    assert left == set()
    assert len(before - set(os.environ)) == 6


def test_without_a_manager_nothing_is_said_and_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    nobody = ServiceManager.take()
    nobody.ready()
    nobody.status("x")
    nobody.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the library leaves its socket behind
def test_a_manager_that_is_not_there_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    ServiceManager.take().ready()
    assert "cannot be reached" in caplog.text
    assert "NOTIFY_SOCKET" not in os.environ


def test_a_manager_that_does_not_read_holds_nobody_up(
    manager: Manager, ours: ServiceManager, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(5000):
        ours.status(str(number))
    assert "does not take 'STATUS'" in caplog.text
    assert manager.heard()[0] == "STATUS=0"
    caplog.clear()
    ours.ready()
    assert manager.heard() == ["READY=1"]
    assert not caplog.records


def test_a_manager_that_has_gone_is_logged(
    manager: Manager, ours: ServiceManager, caplog: pytest.LogCaptureFixture
) -> None:
    manager.sock.close()
    ours.ready()
    assert "does not take 'READY'" in caplog.text


# --- the watchdog ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("usec", "pid", "seconds"),
    [
        ("30000000", None, 30.0),
        ("30000000", "ours", 30.0),
        ("30000000", "1", 0.0),
        ("30000000", "", 0.0),
        (None, "ours", 0.0),
        ("0", None, 0.0),
        ("-5", None, 0.0),
        ("soon", None, 0.0),
        ("", None, 0.0),
    ],
)
def test_the_watchdog_is_for_the_process_it_was_set_for(
    usec: str | None, pid: str | None, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("WATCHDOG_USEC", usec), ("WATCHDOG_PID", str(os.getpid()) if pid == "ours" else pid)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert ServiceManager.take().watchdog == seconds


@pytest.fixture
def watched(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServiceManager]:
    del manager
    monkeypatch.setenv("WATCHDOG_USEC", "10000000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    taken = ServiceManager.take()
    yield taken
    taken.close()


async def test_each_half_interval_the_bus_is_asked_and_the_manager_told(
    manager: Manager, watched: ServiceManager
) -> None:
    timers, asked = Timers(), []

    async def ping(seconds: float) -> None:
        asked.append(seconds)

    watched.watch(ping, call_later=timers.later)
    watched.watch(ping, call_later=timers.later)  # again is nothing
    await turns()
    assert manager.heard() == ["WATCHDOG=1"]
    assert await timers.expire() == 5.0
    assert await timers.expire() == 5.0
    assert manager.heard() == ["WATCHDOG=1", "WATCHDOG=1"]
    # Together with the half that it may come late, an answer still is in time.
    assert asked == [2.5, 2.5, 2.5]
    await watched.unwatch()
    await watched.unwatch()
    assert not timers.waiting


@pytest.mark.parametrize(
    "failure", [TimeoutError(), BusError("ended"), BusCallError("org.freedesktop.DBus.Error.LimitsExceeded", "no")]
)
async def test_a_bus_that_does_not_answer_stops_the_beat_until_it_does(
    manager: Manager, watched: ServiceManager, failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    timers, failures = Timers(), [failure]

    async def ping(_seconds: float) -> None:
        if failures:
            raise failures[0]

    watched.watch(ping, call_later=timers.later)
    await turns()
    await timers.expire()
    assert manager.heard() == []
    assert "the message bus does not answer" in caplog.text
    failures.clear()
    await timers.expire()
    assert manager.heard() == ["WATCHDOG=1"]
    await watched.unwatch()


async def test_a_question_that_is_still_open_is_not_asked_twice(manager: Manager, watched: ServiceManager) -> None:
    timers, asked, answer = Timers(), [], asyncio.Event()

    async def ping(seconds: float) -> None:
        asked.append(seconds)
        await answer.wait()

    watched.watch(ping, call_later=timers.later)
    await timers.expire()
    assert (len(asked), manager.heard()) == (1, [])
    answer.set()
    await timers.expire()
    assert manager.heard() == ["WATCHDOG=1"]
    answer.clear()
    await timers.expire()
    await watched.unwatch()  # with a question open
    assert manager.heard() == []


async def test_without_a_watchdog_there_is_no_timer(ours: ServiceManager) -> None:
    timers = Timers()

    async def ping(_seconds: float) -> None:
        raise AssertionError("nobody wanted to know")

    ours.watch(ping, call_later=timers.later)
    await turns()
    assert not timers.waiting
    await ours.unwatch()
