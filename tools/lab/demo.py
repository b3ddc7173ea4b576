"""The demo: one restore from the making of the guest's disk to the proof that nothing is left.

This process stays outside and counts what the machine has before and after. The story itself is told by a second
process (``story.py``) in a mount namespace of its own; whatever that one should leave running becomes a child of
this one, and is found.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from . import leftovers

_ACCOUNTS = (Path("/etc/passwd"), Path("/etc/group"))
_PLACES = (Path("/run/sendense-restore"), Path("/mnt/sendense"), Path("/var/lib/sendense-restore"))


def main() -> None:
    """Tell the story, then look for what it left."""
    with leftovers.alone_on_the_machine():
        machine, own, files = leftovers.of_the_machine(), leftovers.of_this_process(), _files()
        leftovers.adopt_orphans()
        status = _tell()
        _reap()
        left = leftovers.left_on_the_machine(machine) + leftovers.left_by_this_process(own)
        left += [f"{name} has changed" for name, content in _files().items() if content != files[name]]
    if left:
        print("\nLEFT BEHIND:", *left, sep="\n  ")
        status = status or 1
    else:
        print("\nThe machine is as it was: no mount, no loop device, no process, no user, no file is left.")
    sys.exit(status)


def _tell() -> int:
    """Run the story to its end; Ctrl-C and SIGTERM end the story, not the look at what it left."""
    story = subprocess.Popen([sys.executable, "-m", "tools.lab.story"])
    signal.signal(signal.SIGINT, lambda *_: None)  # the terminal sends it to both
    signal.signal(signal.SIGTERM, lambda *_: story.terminate())
    return story.wait()


def _reap() -> None:
    """Take in orphans that have ended, so that only those still running count."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _files() -> dict[str, str]:
    """What must be the same afterwards: the accounts, and the service's own directories."""
    found = {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in _ACCOUNTS}
    return found | {str(place): "there" if place.exists() else "not there" for place in _PLACES}


if __name__ == "__main__":
    main()
