"""A mount's own directory, and where its overlays lie.

``Workplace`` owns a tmpfs in the daemon's mount namespace, from ``make`` to ``close``, for exports and probe nodes.
An overlay takes what journal replay writes. It lies in that tmpfs, whose size bounds all overlays of the mount
together; or, with ``attach.overlay_dir``, on a disk, each bounded by a limit of its image server (RLIMIT_FSIZE).
Either way it is a file without a name: it ends with the last descriptor, whoever is killed.

Only where the disk's file system cannot make such a file, it has a name for a moment. What a daemon leaves that is
killed in that moment, ``remove_forgotten`` takes away.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import stat
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from sendense_restored import errors, linux

from .leftovers import SOURCE, is_mount_id

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

log = logging.getLogger(__name__)

_UNABLE: Final = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL})
"""What file systems answer that know no files without a name; open(2), O_TMPFILE."""


class Workplace:
    """One mount's. ``size`` is in bytes, of all overlays in memory or of each on a disk."""

    def __init__(self, path: Path, size: int, overlay_dir: Path | None = None) -> None:
        self.path = path
        self._size = size
        self._overlay_dir = overlay_dir
        self._made = False
        self._overlays: list[int] = []

    @property
    def overlay_limit(self) -> int | None:
        """Bytes that the server of an overlay must be held to, None if its storage is bounded itself."""
        return self._size if self._overlay_dir is not None else None

    def make(self) -> None:
        """Create the directory and mount a tmpfs of the given size there. Raises OSError."""
        self.path.mkdir(mode=0o711)
        options = f"size={self._size},mode=0711"
        linux.mount(SOURCE, self.path, "tmpfs", linux.MS_NOSUID | linux.MS_NOEXEC, options)
        self._made = True

    def open_overlay(self, index: int) -> int:
        """A new and empty file for disk ``index``, which no name leads to; the descriptor is the caller's.

        Raises errors.Unavailable if the directory for overlays cannot be used, OSError.
        """
        if self._overlay_dir is None:
            return _make_nameless(os.fspath(self.path), f"overlay-{index}")
        try:
            overlay = _open_nameless(self._overlay_dir, f"sendense-{self.path.name}-{index}")
        except OSError as error:
            log.error("attach.overlay_dir: %s: %s", self._overlay_dir, error.strerror)  # noqa: TRY400
            raise errors.Unavailable(
                "the directory for overlays cannot be used; check attach.overlay_dir and try again"
            ) from None
        self._overlays.append(os.dup(overlay))  # to be asked what it takes
        return overlay

    def used(self) -> tuple[int, int]:
        """Bytes that its overlays take, and how many they may."""
        if not self._made:
            return 0, 0
        if self._overlay_dir is not None:
            taken = sum(os.fstat(overlay).st_blocks * 512 for overlay in self._overlays)
            return taken, self._size * len(self._overlays)
        counts = os.statvfs(self.path)
        return (counts.f_blocks - counts.f_bfree) * counts.f_frsize, self._size

    def close(self) -> None:
        """Unmount and remove it, as far as it was made. Raises OSError (EBUSY: an export is mounted there)."""
        while self._overlays:
            os.close(self._overlays.pop())
        if not self.path.exists():
            return
        if self.path.is_mount():
            linux.umount(self.path)
        self._made = False
        self.path.rmdir()


def _open_nameless(directory: Path, name: str) -> int:
    """A file in ``directory`` that has no name; ``name`` is for where it needs one to begin with."""
    flags = os.O_TMPFILE | os.O_RDWR | os.O_EXCL | os.O_CLOEXEC  # EXCL: nor can it be given one
    try:
        return os.open(directory, flags, 0o600)
    except OSError as error:
        if error.errno not in _UNABLE:
            raise
    return _make_nameless(os.fspath(directory), name)


def _make_nameless(directory: str, name: str) -> int:
    path = f"{directory}/{name}"
    overlay = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with suppress(BlockingIOError):  # somebody looks whether it is forgotten
            fcntl.flock(overlay, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with suppress(FileNotFoundError):
            os.unlink(path)  # noqa: PTH108 - as the line that made it
        fcntl.flock(overlay, fcntl.LOCK_UN)  # on NFS it would be in the way of QEMU's own locks
    except BaseException:
        os.close(overlay)
        raise
    return overlay


def remove_forgotten(directory: Path, live: Collection[str], owners: Collection[int]) -> list[str]:
    """Remove the overlays that killed daemons have left in ``directory``; a sentence about each.

    What is not a regular file with one name, of one of ``owners``, named as overlays are, after a mount that is not
    in ``live``, and locked by nobody, is not ours to remove. Raises OSError if there is no such directory.
    """
    said = []
    place = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in sorted(os.listdir(place)):  # noqa: PTH208 - a descriptor has no path
            match = re.fullmatch(r"sendense-([0-9a-f-]{36})-\d+", name)
            if match is None or not is_mount_id(match[1]) or match[1] in live:
                continue
            try:
                removed = _remove_if_forgotten(place, name, owners)
            except OSError as error:
                said.append(f"{directory / name} stays: {error.strerror}")
            else:
                if removed:
                    said.append(f"removed {directory / name}, which belonged to no mount")
    finally:
        os.close(place)
    return said


def _remove_if_forgotten(place: int, name: str, owners: Collection[int]) -> bool:
    if not _may_be_ours(os.stat(name, dir_fd=place, follow_symlinks=False), owners):  # before it is opened
        return False
    file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=place)
    try:
        if not _may_be_ours(os.fstat(file), owners):
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        os.unlink(name, dir_fd=place)
    finally:
        os.close(file)
    return True


def _may_be_ours(status: os.stat_result, owners: Collection[int]) -> bool:
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and status.st_uid in owners
