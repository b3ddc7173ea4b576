"""A mount namespace of our own, so that nothing mounted here is seen by the machine or outlives us."""

from __future__ import annotations

import os
from pathlib import Path

from sendense_restored import linux

# A directory that is always there, below a mount of its own, and that nobody here needs to see.
_ANCHOR = Path("/proc/driver")
_PRIVATE = linux.MS_PRIVATE | linux.MS_REC


def enter() -> None:
    """Move this process into a private mount namespace with an empty ``/run`` and an empty ``/mnt``.

    Root and single-threaded callers only. The working directory stays.
    """
    directory = Path.cwd()
    linux.unshare(linux.CLONE_NEWNS)
    if is_mount_point(Path("/")):
        linux.mount("", "/", None, _PRIVATE)
    else:
        _make_root_a_mount()
        os.chdir(directory)
    for place in ("/run", "/mnt"):
        linux.mount("tmpfs", place, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "mode=755")


def publish(directory: Path, at: Path) -> None:
    """Show ``directory`` at ``at`` as well: for users who may not pass the directories above it (``/root``, say)."""
    at.mkdir(mode=0o755)
    linux.mount(str(directory), at, None, linux.MS_BIND)


def is_mount_point(path: Path) -> bool:
    """Whether something is mounted on ``path``, as far as this process' root lets it see."""
    lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    return any(line.split()[4] == str(path) for line in lines)


def _make_root_a_mount() -> None:
    """Give a process in a chroot a root that is a mount: without one, the daemon can neither make its mounts private.

    nor pivot. The mount that the chroot lies in may be shared with the machine, and cannot be made private from in
    here, having no name in here. So the copy is hung below /proc, which has one: private first, it passes nothing on.
    """
    linux.mount("", "/proc", None, linux.MS_PRIVATE)
    linux.mount("/", _ANCHOR, None, linux.MS_BIND | linux.MS_REC)
    linux.mount("", _ANCHOR, None, _PRIVATE)
    os.chroot(_ANCHOR)
    os.chdir("/")
