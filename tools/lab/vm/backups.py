"""Backups for the virtual machine, made on the host, where it takes seconds and not minutes.

A program of its own, ``python -m tools.lab.vm.backups DIRECTORY``, because the guest's disks are mounted in a mount
namespace that the caller does not want to be in. DIRECTORY gets ``repository`` and ``chain``, which tells what is in
it.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Final, cast

from tools.lab import guest, namespace

from .project import CHECKOUT

REPOSITORY: Final = Path("/srv/backups")
"""Where the machine has them."""


def make(directory: Path) -> None:
    """Make them in a process of its own. Raises CalledProcessError."""
    command = [sys.executable, "-m", "tools.lab.vm.backups", str(directory)]
    subprocess.run(command, cwd=CHECKOUT, check=True, stdin=subprocess.DEVNULL)


class _Unpickler(pickle.Unpickler):
    """Reads what another Python has written: paths of 3.13 are of a module that others do not have."""

    def find_class(self, module: str, name: str) -> object:
        return super().find_class("pathlib" if module == "pathlib._local" else module, name)


def load(directory: Path) -> guest.Chain:
    """What ``make`` has made; the images are looked for in ``REPOSITORY``."""
    with (directory / "chain").open("rb") as file:
        return cast("guest.Chain", _Unpickler(file).load())


def main() -> None:
    """The program."""
    directory = Path(sys.argv[1]).resolve()
    namespace.enter()
    repository = directory / "repository"
    with tempfile.TemporaryDirectory(dir=directory) as work:
        chain = guest.make_chain(repository, Path(work))
    there = [replace(each, image=REPOSITORY / each.image.relative_to(repository)) for each in chain.backups]
    (directory / "chain").write_bytes(pickle.dumps(replace(chain, backups=tuple(there))))


if __name__ == "__main__":
    main()
