"""Runs a program in this checkout as `nobody`: ``python3 -m tools.lab.unprivileged PROGRAM ARGUMENT...``.

The checkout may lie where only root can go (``/root``, say). So it is mounted once more below a ``/run`` of our own,
which everybody can pass, and a home with the temporary files is made below a ``/mnt`` of our own; all of it is gone
with the program. Both the working directory and relative paths of PROGRAM are those of the checkout.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from . import namespace

_NOBODY = 65534
_CHECKOUT = Path("/run/checkout")
_HOME = Path("/mnt/home")  # not below /run, where no repository may lie (daemon/host/repositories.py)


def main() -> None:
    """Become `nobody` and run what the command line says."""
    here = Path(__file__).resolve().parents[2]
    namespace.enter()
    namespace.publish(here, _CHECKOUT)
    _HOME.mkdir()
    os.chown(_HOME, _NOBODY, _NOBODY)
    os.chdir(_CHECKOUT)
    os.setgroups([])
    os.setresgid(_NOBODY, _NOBODY, _NOBODY)
    os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    home = str(_HOME)
    environment = {**os.environ, "HOME": home, "TMPDIR": home, "PYTHONDONTWRITEBYTECODE": "1"}
    environment["HYPOTHESIS_STORAGE_DIRECTORY"] = home
    os.execvpe(sys.argv[1], sys.argv[1:], environment)  # noqa: S606 - its argv is ours


if __name__ == "__main__":
    main()
