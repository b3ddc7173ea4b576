"""polkit as it runs on the machine: rules that a site adds, ways to break it, and what is said on the message bus."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self

from tests.vm.appliance import TIMEOUT, output, run, unit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

UNIT = "polkit.service"
RULES = Path("/etc/polkit-1/rules.d")
_RULE = RULES / "10-test.rules"
"""Sorted before the one of the package."""
QUESTION = "type='method_call',interface='org.freedesktop.PolicyKit1.Authority',member='CheckAuthorization'"
TAKEN_BACK = "type='method_call',interface='org.freedesktop.PolicyKit1.Authority',member='CancelCheckAuthorization'"
CHANGED = "type='signal',interface='org.freedesktop.PolicyKit1.Authority',member='Changed'"


class Ear:
    """Hears what is said on the system bus that fits the match rule; a context manager."""

    def __init__(self, match: str) -> None:
        self._command = ["/usr/bin/busctl", f"--match={match}", "monitor"]
        self._heard = b""

    def __enter__(self) -> Self:
        self._program = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert self._program.stderr is not None
        begin = self._program.stderr.readline()  # it does not say this with --json
        assert b"Monitoring" in begin, begin
        return self

    def __exit__(self, *_: object) -> None:
        self._program.kill()
        self._program.communicate()

    def wait_for(self, text: str) -> None:
        """Until a message has this in one of its lines, as busctl prints them."""
        assert self._program.stdout is not None
        wanted = text.encode()
        while wanted not in self._heard:
            readable, _, _ = select.select([self._program.stdout], [], [], TIMEOUT)
            assert readable, f"nobody said {text} but {self._heard!r}"
            data = os.read(self._program.stdout.fileno(), 1 << 16)
            assert data, "the monitor has ended"
            self._heard += data
        _, _, self._heard = self._heard.partition(wanted)


@contextmanager
def prepared(text: str) -> Iterator[Callable[[], None]]:
    """A rule of the site's, which polkit has read after a call of what this yields; it forgets it afterwards."""
    wake()
    new = _RULE.with_suffix(".new")
    new.write_text(text, encoding="utf-8")
    new.chmod(0o644)

    def appear() -> None:
        new.rename(_RULE)
        ear.wait_for("Member=Changed")

    try:
        with Ear(CHANGED) as ear:
            yield appear
    finally:
        new.unlink(missing_ok=True)
        if _RULE.exists():
            with Ear(CHANGED) as ear:
                _RULE.unlink()
                ear.wait_for("Member=Changed")


@contextmanager
def rule(text: str) -> Iterator[None]:
    """A rule of the site's, as long as this lasts."""
    with prepared(text) as appear:
        appear()
        yield


def wake() -> None:
    """Have it run, whatever was done to it."""
    if unit(UNIT, "LoadState") == "masked":
        output("/usr/bin/systemctl", "unmask", "--runtime", UNIT)
    if unit(UNIT, "ActiveState") == "active":
        output("/usr/bin/systemctl", "kill", "--signal=CONT", UNIT)
    output("/usr/bin/systemctl", "start", UNIT)


def pid() -> int:
    return int(unit(UNIT, "MainPID"))


@contextmanager
def stopped(process: int) -> Iterator[None]:
    """It is there and does nothing, until it is told to go on (SIGCONT) or to the end."""
    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process, signal.SIGCONT)


@contextmanager
def masked() -> Iterator[None]:
    """It is not there and cannot be started."""
    run("/usr/bin/systemctl", "mask", "--runtime", "--now", UNIT)
    try:
        yield
    finally:
        wake()
