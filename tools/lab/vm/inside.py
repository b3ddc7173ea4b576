"""The pytest plugin in the virtual machine: tells the outer run what happens, and keeps a flight record.

A failed test's report has what the journal, the kernel, udev and the message bus had to say meanwhile. A test that
does not end is ended with pytest itself (faulthandler shows where it was); ``runner`` goes on with the next.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from .project import PORT, seconds_for_a_test

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

STATE: Final = Path("/var/lib/sendense-tests")
"""What has to be known after the machine was started anew."""
RUNNING: Final = STATE / "running"
"""The node id of the test that runs, written when it began."""
REBOOTING: Final = STATE / "rebooting"
"""Exists while a test waits for the start that it asked for."""
TRACE: Final = STATE / "trace"
INSTALLED: Final = STATE / "installed"
"""What systemd said of the service when its packages had just been installed and nobody had called it yet."""
_LEFT: Final = STATE / "left"
_CHANNEL: Final = Path("/dev/virtio-ports", PORT)

_MOST_OF_A_RECORD = 60_000
_RECORDERS = {
    "udev": ("udevadm", "monitor", "--kernel", "--udev"),
    "bus": ("busctl", "--system", "monitor"),
}
_JOURNALS = {
    "journal": ("journalctl", "--no-pager", "--output=short-precise"),
    # Not --dmesg, which is the present boot's, while the machine may have been started anew.
    "kernel": ("journalctl", "--no-pager", "--output=short-precise", "_TRANSPORT=kernel"),
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
    """A program that prints what happens on the machine, into a file, as long as pytest runs."""

    def __init__(self, name: str, command: tuple[str, ...]) -> None:
        self._file, self._mark = _record(name)
        self.mark()
        with self._file.open("ab") as output:
            self._program = subprocess.Popen(
                ["setpriv", "--pdeathsig=KILL", "--", *command],  # noqa: S607
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def mark(self) -> None:
        """From here on it is the next test's."""
        self._mark.write_text(str(self._file.stat().st_size if self._file.exists() else 0), encoding="ascii")

    def close(self) -> None:
        """End it."""
        self._program.kill()
        self._program.wait()


class Inside:
    """The plugin; one for a run of pytest."""

    def __init__(self) -> None:
        self._recorders: list[_Recorder] = []
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
            report.sections += flight_record()

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


def flight_record() -> list[tuple[str, str]]:
    """What the journal, the kernel, udev and the bus have said since the running test began; the last of it, if much.

    Also of a test that has taken pytest or the machine down with it. If none runs, it is all of the journal, and what
    udev and the bus have said since the last one began.
    """
    since = (f"--since=@{int(RUNNING.stat().st_mtime)}",) if RUNNING.exists() else ()
    found = []
    for name, command in _JOURNALS.items():
        said = subprocess.run(
            [*command, *since],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        found.append((name, said.stdout))
    for name in _RECORDERS:
        file, mark = _record(name)
        try:
            found.append((name, file.read_bytes()[int(mark.read_text(encoding="ascii")) :]))
        except (FileNotFoundError, ValueError):  # there was none yet; or a panic came before it was on the disk
            found.append((name, b""))
    return [(name, said.decode(errors="replace")[-_MOST_OF_A_RECORD:]) for name, said in found]


def _record(name: str) -> tuple[Path, Path]:
    """The file that a recorder writes, and the one that says where in it the running test begins."""
    return STATE / f"{name}.record", STATE / f"{name}.mark"


def reboot() -> None:
    """Have the running test run again after a new start of the machine; does not return."""
    REBOOTING.touch()
    os.sync()
    tell(event="reboot")
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
