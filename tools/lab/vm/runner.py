"""Runs the tests in the virtual machine: the program of its unit ``sendense-tests``.

It starts pytest with what is left of the agenda, and again if pytest did not come to its end: because a test hung,
took pytest down with it, or has started the machine anew. What is done stands in a file, so it goes on after a new
start, asked for or not.
"""

from __future__ import annotations

import os
import subprocess
import sys

from .inside import INSTALLED, REBOOTING, RUNNING, STATE, TRACE, done, flight_record, leave, left, tell
from .project import MOUNTED, Agenda

_BEGUN = STATE / "begun"
_OUTPUT = STATE / "output"
_LAST_WORDS = 20_000
_SERVICE = "sendense-restored.service"


def main() -> None:
    """Work off the agenda."""
    agenda = Agenda.read(MOUNTED)
    STATE.mkdir(exist_ok=True)
    tell(event="boot", again=_BEGUN.exists())
    if not _BEGUN.exists():
        leave(agenda.tests)
        _BEGUN.touch()
        # As a user does it. Nothing can be fetched: what they depend on is in the image, or this fails.
        packages = sorted(map(str, (MOUNTED / "packages").glob("*.deb")))
        if status := _run("/usr/bin/apt-get", "install", "-y", *packages):
            for each in left():
                _fail(each, f"installing the packages failed with {status}\n{_said()}")
        _run("/usr/bin/systemctl", "show", "--property=ActiveState,SubState,Result,MainPID", _SERVICE)
        INSTALLED.write_text(_said(), encoding="utf-8")
    elif not REBOOTING.exists():
        _fail(_running() or left()[0], "the machine was started anew, and no test had asked for it")
    REBOOTING.unlink(missing_ok=True)
    options = [f"--debian={agenda.release}", *(["--long"] if agenda.long else [])]
    while tests := left():
        status = _run(sys.executable, "-m", "pytest", "-c", "pytest.ini", *options, *tests)
        if REBOOTING.exists():
            return
        if test := _running():
            trace = TRACE.read_text(encoding="utf-8")
            _fail(test, f"pytest ended with {status} in the midst of it\n{trace}\n{_said()}")
        else:  # none that pytest has not seen is left, unless it could not even collect them
            for each in left():
                _fail(each, f"pytest ended with {status} without running it\n{_said()}")
    tell(event="done")


def _run(*command: str) -> int:
    """Run a program to its end; what it prints is kept for ``_said``."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with _OUTPUT.open("wb") as output:
        return subprocess.run(
            command, cwd=MOUNTED, check=False, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
        ).returncode


def _said() -> str:
    return _OUTPUT.read_text(encoding="utf-8", errors="replace")[-_LAST_WORDS:]


def _running() -> str:
    return RUNNING.read_text(encoding="utf-8") if RUNNING.exists() else ""


def _fail(test: str, why: str) -> None:
    tell(
        event="report", test=test, when="call", outcome="failed", duration=0.0, text=why, expected=None,
        sections=flight_record(),
    )  # fmt: skip
    done(test)


if __name__ == "__main__":
    main()
