"""The pytest plugin in the virtual machine: tells the outer run what happens, and keeps a flight record.

A failed test's report has what the journal, udev and the message bus had to say meanwhile. A test that does not end
is ended with pytest itself (faulthandler shows where it was); ``runner`` goes on with the next.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from .project import PORT, seconds_for_a_test

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

STATE: Final = Path("/var/lib/sendense-tests")
"""What has to be known after the machine was started anew."""
RUNNING: Final = STATE / "running"
"""The node id of the test that runs."""
REBOOTING: Final = STATE / "rebooting"
"""Exists while a test waits for the start that it asked for."""
TRACE: Final = STATE / "trace"
_LEFT: Final = STATE / "left"
_CHANNEL: Final = Path("/dev/virtio-ports", PORT)

_MOST_OF_A_RECORD = 60_000
_RECORDERS = {
    "udev": ("udevadm", "monitor", "--kernel", "--udev"),
    "bus": ("busctl", "--system", "monitor"),
}


def tell(**message: object) -> None:
    """Send a message to the outer run."""
    with _CHANNEL.open("wb", buffering=0) as port:
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[port.write(data) or 0 :]


def left() -> list[str]:
    """The node ids that are not done."""
    return _LEFT.read_text(encoding="utf-8").splitlines()


def leave(tests: Iterable[str]) -> None:
    """Write down what is not done."""
    _LEFT.write_text("".join(f"{test}\n" for test in tests), encoding="utf-8")


def done(test: str) -> None:
    """Cross it out, and say that it has ended."""
    leave(each for each in left() if each != test)
    RUNNING.unlink(missing_ok=True)
    tell(event="end", test=test)


class _Recorder:
    """A program that prints what happens on the machine, into a file, as long as the tests run."""

    def __init__(self, name: str, command: tuple[str, ...]) -> None:
        self.name = name
        self._file = STATE / f"{name}.record"
        with self._file.open("wb") as output:
            self._program = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
        self._begin = 0

    def mark(self) -> None:
        """From here on it is the next test's."""
        self._begin = self._file.stat().st_size

    def since(self) -> str:
        """What was printed for the test, the last of it if that is much."""
        with self._file.open("rb") as file:
            file.seek(max(self._begin, self._file.stat().st_size - _MOST_OF_A_RECORD))
            return file.read().decode(errors="replace")

    def close(self) -> None:
        """End it."""
        self._program.kill()
        self._program.wait()


class Inside:
    """The plugin; one for a run of pytest."""

    def __init__(self) -> None:
        self._recorders: list[_Recorder] = []
        self._begun = 0.0
        TRACE.parent.mkdir(exist_ok=True)
        self._trace = TRACE.open("w", encoding="utf-8")

    def pytest_sessionstart(self) -> None:
        """The recorders run from here on."""
        self._recorders = [_Recorder(name, command) for name, command in _RECORDERS.items()]

    def pytest_sessionfinish(self) -> None:
        """To here."""
        for recorder in self._recorders:
            recorder.close()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, None, None]:
        """Around a test with its fixtures."""
        RUNNING.write_text(item.nodeid, encoding="utf-8")
        tell(event="start", test=item.nodeid)
        self._begun = time.time()
        for recorder in self._recorders:
            recorder.mark()
        limit = seconds_for_a_test(long=item.get_closest_marker("long") is not None)
        faulthandler.dump_traceback_later(limit, exit=True, file=self._trace)
        yield
        faulthandler.cancel_dump_traceback_later()
        done(item.nodeid)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, Any, None]:  # noqa: ARG002
        """A failure gets its flight record."""
        outcome = yield
        report = outcome.get_result()
        if report.failed:
            report.sections += flight_record(self._begun)
            report.sections += [(recorder.name, recorder.since()) for recorder in self._recorders]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """To the outer run."""
        tell(
            event="report",
            test=report.nodeid,
            when=report.when,
            outcome=report.outcome,
            duration=report.duration,
            text=report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext,
            expected=getattr(report, "wasxfail", None),
            sections=report.sections,
        )


def flight_record(since: float) -> list[tuple[str, str]]:
    """The journal, with the kernel's part, from ``since`` (seconds of the epoch) on."""
    journal = subprocess.run(
        ["/usr/bin/journalctl", "--no-pager", "--output=short-precise", f"--since=@{int(since)}"],
        capture_output=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    return [("journal", journal.stdout.decode(errors="replace")[-_MOST_OF_A_RECORD:])]


def reboot() -> None:
    """Have the running test run again after a new start of the machine; does not return."""
    REBOOTING.touch()
    os.sync()
    subprocess.run(["/usr/bin/systemctl", "--no-block", "reboot"], check=True, stdin=subprocess.DEVNULL)
    while True:  # a pause ends with any signal that has a handler; the machine going down ends this process
        signal.pause()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In the order in which the outer run expects their reports; older pytests move parametrized tests about."""
    order = left()
    items.sort(key=lambda item: order.index(item.nodeid))


def pytest_configure(config: pytest.Config) -> None:
    """Called by pytest."""
    config.pluginmanager.register(Inside())
