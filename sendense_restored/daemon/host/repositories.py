"""Which directories root opens as repositories of backups.

A catalogue names them, and its writers need not be root: a repository ``/`` would make a backup of every image of the
host, and the raw base of a chain of every file. So a repository lies below one of the directories that the
configuration allows (``image.repositories``), or, where it names none, anywhere but in the host's own directories and
those that hold them. What is judged is where the directory really lies, by its descriptor, after all links.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from sendense_restored import errors, linux

if TYPE_CHECKING:
    from collections.abc import Sequence

HOSTS_OWN = tuple(
    PurePosixPath(path)
    for path in (
        *("/bin", "/boot", "/dev", "/etc", "/home", "/lib", "/lib32", "/lib64", "/libx32", "/proc", "/root", "/run"),
        *("/sbin", "/sys", "/usr", "/var/lib/sendense-restore"),
    )
)


def open_root(path: Path, allowed: Sequence[Path] | None, flags: int = os.O_PATH) -> tuple[int, PurePosixPath]:
    """Open a repository's directory; also where it really lies. Raises OSError, and ImageRefused if it may not be."""
    if allowed is None and _is_hosts_own(PurePosixPath(path)):
        raise _refused()
    # Not through links of /proc, which lead to other namespaces' files.
    how = linux.RESOLVE_NO_MAGICLINKS
    fd = linux.openat2(-1, os.fsencode(path), flags | os.O_DIRECTORY, resolve=how)
    try:
        real = PurePosixPath(os.readlink(f"/proc/self/fd/{fd}"))  # noqa: PTH115  # a text, not a path to follow
        if _is_hosts_own(real) if allowed is None else not _is_below(real, allowed):
            raise _refused()
    except BaseException:
        os.close(fd)
        raise
    return fd, real


def _is_hosts_own(path: PurePosixPath) -> bool:
    return any(path.is_relative_to(own) or own.is_relative_to(path) for own in HOSTS_OWN)


def _is_below(real: PurePosixPath, allowed: Sequence[Path]) -> bool:
    # The administrator's own links are followed: whoever names a directory means what is behind it.
    return any(real.is_relative_to(directory.resolve()) for directory in allowed)


def _refused() -> errors.ImageRefused:
    return errors.ImageRefused(
        "the repository's directory is not one that backups are read from; "
        "the administrator can allow it with the key image.repositories of the configuration"
    )
