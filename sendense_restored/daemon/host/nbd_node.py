"""Nodes in /dev that the kernel makes for an NBD device and its partitions."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
from typing import TYPE_CHECKING, Final

from .loop import BLKROSET

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

SECTOR: Final = 512
"""Bytes; sysfs counts in these whatever the device does."""


def open_node(path: Path, device: tuple[int, int], flags: int) -> int:
    """Open a block special file that is the device of these numbers, nothing else. Raises OSError.

    Blocks as long as the device's server does: for a thread.
    """
    node = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    status = os.fstat(node)
    if not stat.S_ISBLK(status.st_mode) or (os.major(status.st_rdev), os.minor(status.st_rdev)) != device:
        os.close(node)
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), str(path))
    return node


def numbers_of(directory: Path) -> tuple[int, int]:
    """The major and minor number of a block device in sysfs. Raises OSError, ValueError."""
    major, _, minor = (directory / "dev").read_text(encoding="ascii").strip().partition(":")
    return int(major), int(minor)


class NbdNode:
    """A node of the kernel's, for the whole device or for one partition, while one volume uses it.

    The descriptor is held all the time: as long as a partition is open, the kernel does not look for partitions anew
    and take the node away (bdev_disk_changed).
    """

    def __init__(
        self,
        path: Path,
        sysfs: Path,
        descriptor: int,
        close: Callable[[Callable[[], None]], Awaitable[None]],
        *,
        read_only: bool,
    ) -> None:
        self.path, self.read_only = path, read_only
        self._sysfs, self._descriptor, self._close = sysfs, descriptor, close

    @classmethod
    def open(
        cls,
        path: Path,
        sysfs: Path,
        where: tuple[int, int] | None,
        close: Callable[[Callable[[], None]], Awaitable[None]],
        *,
        writable: bool,
    ) -> NbdNode:
        """``where``: beginning and size in bytes that a partition must have, looked at once it cannot change.

        For a thread. Raises OSError, ValueError.
        """
        descriptor = open_node(path, numbers_of(sysfs), os.O_RDONLY)
        try:
            if where is not None:
                there = tuple(int((sysfs / name).read_text(encoding="ascii")) * SECTOR for name in ("start", "size"))
                if there != where:
                    raise ValueError(f"it has moved to {there}")
            fcntl.ioctl(descriptor, BLKROSET, struct.pack("i", not writable))
        except BaseException:
            os.close(descriptor)
            raise
        return cls(path, sysfs, descriptor, close, read_only=not writable)

    def set_read_only(self, *, refuse: bool) -> None:
        """See ``BlockDevice``."""
        fcntl.ioctl(self._descriptor, BLKROSET, struct.pack("i", refuse))

    def sectors_written(self) -> int:
        """See ``BlockDevice``; field 7 of the stat file."""
        return int((self._sysfs / "stat").read_text(encoding="ascii").split()[6])

    def drop(self) -> None:
        """Let go of it, as it was. May be called again; for a thread."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with contextlib.suppress(OSError):  # the flag of a whole device is the next user's, who sets it anew
                fcntl.ioctl(descriptor, BLKROSET, struct.pack("i", 0))
            os.close(descriptor)

    async def close(self) -> None:
        """See ``BlockDevice``; it is the device below that others may still hold. Raises errors.Timeout, Failed."""
        await self._close(self.drop)

    def is_freed(self) -> bool:
        """See ``BlockDevice``."""
        return self._descriptor < 0

    async def freed(self) -> None:
        """See ``BlockDevice``."""
