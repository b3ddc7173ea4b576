"""The pytest plugin of the outer run: a test of tests/vm runs in a virtual machine, its result is reported here.

The first such test builds what is needed and boots a machine for each release, with all of its chosen tests on the
agenda; it works them off in the order in which they are reported here, the machines side by side. Each test is an
item of the outer run like any other, chosen by -k or a node id. If a machine hangs, the next test gets a new one.
"""

from __future__ import annotations

import faulthandler
import os
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import pytest

from . import backups, image, project, qemu

if TYPE_CHECKING:
    from collections.abc import Iterator

_BEYOND_A_TEST = 300.0
"""Seconds that a machine may be silent for besides its test's own: it boots, or says how a test was ended."""
_A_START = 900.0
"""The same after a test has asked for a new start: one of a kernel that shared its processors took seven minutes."""
_MOST_FAILURES = 3


class Outside:
    """The plugin. ``directory`` is where the tests are that run in a machine."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._work: Path | None = None
        self._material: tuple[Path, Path] | None = None
        self._machines: dict[str, qemu.VirtualMachine] = {}
        """By their release; one that has hung is not in it any more."""
        self._processors = 1
        self._failures: Counter[str] = Counter()
        """How often none could be had, or one hung, by release."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        """Instead of running it here."""
        if not self._is_mine(item):
            return None
        # What this takes is bounded by itself, and the first test has everything built.
        faulthandler.cancel_dump_traceback_later()
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._reports(item):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        if nextitem is None or not self._is_mine(nextitem) or release_of(nextitem) != release_of(item):
            self._end(release_of(item))
        return True

    def pytest_sessionfinish(self) -> None:
        """Whatever happened, nothing stays."""
        for release in tuple(self._machines):
            self._end(release)
        if self._work is not None:
            shutil.rmtree(self._work)
            self._work = None

    def _is_mine(self, item: pytest.Item) -> bool:
        return self._directory in item.path.parents

    def _end(self, release: str) -> None:
        if (machine := self._machines.pop(release, None)) is not None:
            machine.close()

    def _reports(self, item: pytest.Item) -> Iterator[pytest.TestReport]:
        if not qemu.may_run():
            yield _report(item, "setup", "skipped", "Skipped: making a virtual machine needs root")
            return
        release = release_of(item)
        if self._failures[release] >= _MOST_FAILURES:
            yield _report(item, "call", "failed", "it was not run: there is no virtual machine that works")
            return
        try:
            qemu.check_tools()
            if self._material is None:
                releases = dict.fromkeys(map(release_of, self._left(item)))
                # One that is emulated and finds its own processors taken by others waits for itself most of the time.
                self._processors = max((os.cpu_count() or 1) // len(releases), 1)
                for each in releases:
                    self._begin(each, item)
            elif release not in self._machines:
                self._begin(release, item)
            yield from _reports_of(self._machines[release], item)
        except (qemu.MachineError, subprocess.CalledProcessError) as error:
            self._end(release)
            self._failures[release] += 1
            yield _report(item, "call", "failed", str(error))

    def _left(self, item: pytest.Item) -> list[pytest.Item]:
        """This test, and all others that are to run in a machine after it."""
        return [each for each in item.session.items[item.session.items.index(item) :] if self._is_mine(each)]

    def _begin(self, release: str, item: pytest.Item) -> None:
        """Boot a machine with what is left of its release's tests."""
        if self._work is None:
            self._work = Path(tempfile.mkdtemp(prefix="sendense-vm-"))
        if self._material is None:
            made = self._work / "backups"
            made.mkdir()
            backups.make(made)
            self._material = (project.build_packages(self._work), made)
        tests = tuple(each.nodeid for each in self._left(item) if release_of(each) == release)
        agenda = project.Agenda(release, tests, long=bool(item.config.getoption("--long")))
        directory = Path(tempfile.mkdtemp(dir=self._work, prefix=f"debian-{release}-"))
        base = image.get(release)
        disk = directory / "project.squashfs"
        project.make_disk(disk, *self._material, agenda)
        self._machines[release] = qemu.VirtualMachine(base, disk, directory, processors=self._processors)


def _reports_of(machine: qemu.VirtualMachine, item: pytest.Item) -> Iterator[pytest.TestReport]:
    """Those of one test, which is the next that the machine works on. Raises qemu.MachineError."""
    long = item.get_closest_marker("long") is not None
    patience = project.seconds_for_a_test(long=long) + _BEYOND_A_TEST
    started = rebooting = False
    while True:
        # An emulated kernel may hang before anything of ours runs, and a long test has an hour.
        message = machine.message(silence=_A_START if rebooting else patience)
        rebooting = message["event"] == "reboot"
        started |= message["event"] == "boot" and message["again"]
        if message.get("test") != item.nodeid:
            if message["event"] in {"report", "end", "done"}:
                raise qemu.MachineError(f"the virtual machine went on to {message}\n{machine.last_words()}")
            continue
        if message["event"] == "report":
            report = _report(item, message["when"], message["outcome"], message["text"])
            report.duration = message["duration"]
            report.sections = [(name, text) for name, text in message["sections"]]
            if started and report.failed:  # a panic's trace may be there alone: the journal had no time to write it
                report.sections.append(("console", machine.last_words()))
            if message["expected"] is not None:
                report.wasxfail = message["expected"]
            yield report
        elif message["event"] == "end":
            return


def release_of(item: pytest.Item) -> str:
    """The Debian release that a test is to run on."""
    return str(cast("pytest.Function", item).callspec.params["debian"])


def _report(item: pytest.Item, when: str, outcome: str, text: str) -> pytest.TestReport:
    path, line, _ = item.location
    longrepr: Any = (path, line or 0, text) if outcome == "skipped" else text or None
    return pytest.TestReport(
        nodeid=item.nodeid,
        location=item.location,
        keywords=dict.fromkeys(item.keywords, 1),
        outcome=cast("Literal['passed', 'failed', 'skipped']", outcome),
        longrepr=longrepr,
        when=cast("Literal['setup', 'call', 'teardown']", when),
    )
