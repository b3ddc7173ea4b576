"""The disk with what is tested: the packages, the tests, and which of them are to run, in this order.

And what both sides have to agree on: where that disk is, what the channel is called, how long a test may take.

Our own modules are not on it: what runs in there is what the packages have installed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Self

CHECKOUT = Path(__file__).resolve().parents[3]
AGENDA = "agenda.json"
MOUNTED: Final = Path("/srv/project")
"""Where the machine has the disk."""
PORT: Final = "org.sendense.tests"
"""The channel on which the machine tells what it does."""

# pytest in there is the release's own, and needs no more than this.
_PYTEST = """[pytest]
asyncio_mode = auto
pythonpath = .
addopts = -q --strict-markers --import-mode=importlib -p tools.lab.vm.inside -p no:cacheprovider -p no:faulthandler
"""
PARTS: Final = ("tests/conftest.py", "tests/vm", "tools/__init__.py", "tools/lab", "README.md", "examples")
"""Of this checkout, on the disk."""


def seconds_for_a_test(*, long: bool) -> float:
    """After which it is ended in there; the machine is given more."""
    return 3600.0 if long else 300.0


@dataclass(frozen=True)
class Agenda:
    """What the machine is to do."""

    release: str
    tests: tuple[str, ...]
    """Node ids, as pytest has them."""
    long: bool

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Of the disk that is mounted on ``directory``."""
        fields = json.loads((directory / AGENDA).read_text(encoding="utf-8"))
        return cls(fields["release"], tuple(fields["tests"]), long=fields["long"])


def build_packages(directory: Path) -> Path:
    """The Debian packages of this checkout, in a new directory below ``directory``. Raises CalledProcessError."""
    packages = directory / "packages"
    packages.mkdir()
    subprocess.run([CHECKOUT / "tools/deb", packages], check=True, stdin=subprocess.DEVNULL)
    return packages


def make_disk(disk: Path, packages: Path, backups: Path, agenda: Agenda) -> None:
    """Write the squashfs image ``disk``, with what ``build_packages`` and ``backups.make`` have made."""
    stage = disk.with_suffix(".stage")
    stage.mkdir()
    for part in PARTS:
        source, target = CHECKOUT / part, stage / part
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    shutil.copytree(packages, stage / "packages")
    shutil.copytree(backups, stage / "backups")
    (stage / AGENDA).write_text(json.dumps(asdict(agenda)), encoding="utf-8")
    (stage / "pytest.ini").write_text(_PYTEST, encoding="utf-8")
    subprocess.run(
        ["mksquashfs", stage, disk, "-quiet", "-no-progress", "-all-root", "-comp", "zstd"],  # noqa: S607
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    shutil.rmtree(stage)
