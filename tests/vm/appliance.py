"""The machine as an appliance: backups in a repository, people who may restore and people who may not.

Everything is done through what the packages installed: the command line, ``busctl``, ``systemctl``.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.lab import guest, leftovers
from tools.lab.vm import backups
from tools.lab.vm.project import MOUNTED

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SERVICE = "sendense-restored.service"
BUS_NAME = "com.sendense.Restore1"
GROUP = "sendense-restore"
MEMBER, STRANGER, ADMIN = "anna", "bob", "carol"
"""In the group; nobody in particular; in the group ``sudo``, whose members administer a Debian machine."""
PASSWORD = "open sesame"
"""Of each of them."""
_MATERIAL = MOUNTED / "backups"
TIMEOUT = 120.0
"""Seconds after which a command has hung; far more than any takes, because every instruction is emulated."""


def run(*command: str | Path, user: str = "root", check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, as ``user`` with that user's groups. Raises CalledProcessError with what it said."""
    if user != "root":
        command = ("/usr/sbin/runuser", "-u", user, "--", *command)
    done = subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False, timeout=TIMEOUT
    )
    if check and done.returncode != 0:
        error = subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
        error.add_note(done.stdout + done.stderr)
        raise error
    return done


def output(*command: str | Path, user: str = "root") -> str:
    """What a program prints."""
    return run(*command, user=user).stdout


def tool(name: str, *arguments: str, check: bool = True) -> str:
    """What a program prints, wherever the release has it."""
    path = shutil.which(name, path="/usr/sbin:/usr/bin")
    assert path is not None, f"{name} is not installed"
    return run(path, *arguments, check=check).stdout


def restore(*arguments: str, user: str = MEMBER) -> Any:  # noqa: ANN401 - what JSON has
    """Run the command line and read its answer (``--json``)."""
    text = output("/usr/bin/sendense-restore", *arguments, "--json", user=user)
    return json.loads(text) if text.strip() else None


MANAGER = ("/com/sendense/Restore1", "com.sendense.Restore1.Manager")
"""The object and the interface."""


def mount_object(mount: str) -> tuple[str, str]:
    """The object of a mount, and its interface."""
    return f"/com/sendense/Restore1/mounts/{mount.replace('-', '_')}", "com.sendense.Restore1.Mount"


def call(target: tuple[str, str], method: str, *arguments: str, user: str = "root") -> list[Any]:
    """Call a method with ``busctl``, which starts in no time here; ``arguments`` begin with their signature.

    What comes back, as ``--json`` has it. A descriptor among it is closed when busctl ends.
    """
    prefix = ("/usr/bin/busctl", f"--timeout={TIMEOUT:.0f}", "--json=short", "call", BUS_NAME, *target, method)
    text = output(*prefix, *arguments, user=user)
    return list(json.loads(text)["data"]) if text.strip() else []


def mounts() -> list[str]:
    """The ids of all mounts."""
    (paths,) = call(MANAGER, "ListMounts", "a{sv}", "0")
    return [str(path).rpartition("/")[2].replace("_", "-") for path in paths]


def unit(name: str, prop: str) -> str:
    """A property of a unit, as ``systemctl show`` has it."""
    return output("/usr/bin/systemctl", "show", "--property", prop, "--value", name).strip()


def journal_since(begun: float) -> str:
    """What the service, and systemd about it, have said since then (seconds of the epoch)."""
    return output("/usr/bin/journalctl", "--unit", SERVICE, "--no-pager", f"--since=@{int(begun)}")


def census() -> leftovers.Census:
    """Block devices in use, and what is mounted where everybody sees it."""
    found = leftovers.mounts_of(1)
    for name in ("loop*/loop/backing_file", "nbd*/pid", "dm-*/dm/name", "md*/md/array_state"):
        for file in Path("/sys/block").glob(name):
            found[f"device {file.parts[3]}"] = f"{file.parts[3]} ({file.read_text(encoding='utf-8').strip()})"
    for file in Path("/sys/block").glob("nbd*/size"):
        if file.read_text(encoding="ascii") != "0\n":
            found[f"size {file.parts[3]}"] = f"{file.parts[3]}, which has a size"
    return found


def main_pid() -> int:
    """The daemon's process; 0 if it does not run."""
    return int(unit(SERVICE, "MainPID"))


@dataclass(frozen=True)
class Appliance:
    """What is on it."""

    chain: guest.Chain
    backups: Sequence[str]
    """Ids of the chain's backups in the catalogue, oldest first."""

    def mount(self, number: int = -1, *, user: str = MEMBER) -> str:
        """Mount a backup of the chain; the mount's id."""
        (path,) = call(MANAGER, "Mount", "sa{sv}", self.backups[number], "0", user=user)
        return str(path).rpartition("/")[2].replace("_", "-")


@contextlib.contextmanager
def repository(name: str, directory: Path) -> Iterator[str]:
    """A directory as one more repository, its id; afterwards it, its mounts and its files are gone."""
    known = ""
    try:
        known = restore("catalog", "add-repository", name, str(directory), user="root")["repository_id"]
        restore("catalog", "scan", known, user="root")
        yield known
    finally:
        for mount in mounts():  # with mounts of it, it could not be removed
            unmount(mount)
        if known:
            restore("catalog", "remove-repository", known, user="root")
        shutil.rmtree(directory)


def unmount(mount: str) -> None:
    """By force."""
    call(mount_object(mount), "Unmount", "a{sv}", "1", "force", "b", "true")


def set_up() -> Appliance:
    """What is on it; made if it is not there yet, which it is after a new start of the machine."""
    if not backups.REPOSITORY.exists():
        _make()
    found = restore("backups", user="root")
    return Appliance(
        backups.load(_MATERIAL),
        sorted(backup["backup_id"] for backup in found),  # the chain's names begin with their dates
    )


def _make() -> None:
    """Users and a repository, and have the catalogue know it."""
    for name, *groups in ((MEMBER, "--groups", GROUP), (STRANGER,), (ADMIN, "--groups", "sudo")):
        run("/usr/sbin/useradd", "--create-home", "--shell", "/bin/bash", *groups, name)
        subprocess.run(["/usr/sbin/chpasswd"], input=f"{name}:{PASSWORD}\n", text=True, check=True)
    shutil.copytree(_MATERIAL / "repository", backups.REPOSITORY)
    repository = restore("catalog", "add-repository", "nightly", str(backups.REPOSITORY), user="root")[
        "repository_id"
    ]
    restore("catalog", "scan", repository, user="root")
