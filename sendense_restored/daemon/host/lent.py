"""The volumes that a reader was lent: no way out for it, and nothing else to be had from it.

A reader may have been taken over by what it reads. So no root is lent to it that is not below its own, from where
``..`` would lead out; and a file that it hands over is only taken if it lies in the volume that it was asked for.
"""

from __future__ import annotations

import fcntl
import os
import stat
from typing import TYPE_CHECKING

from sendense_restored import linux
from sendense_restored.reader.protocol import ProtocolError

from .process import internal

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sendense_restored.reader.protocol import FileInfo


class Lent:
    """The volumes of one reader, by their names. Owns ``root``, a descriptor of what the process has as its root."""

    def __init__(self, root: int) -> None:
        self._root: int | None = root
        self._mount_ids: dict[str, int] = {}

    def add(self, roots: Mapping[str, int]) -> None:
        """Note volumes whose roots will be lent; Failed, and none is noted, if one is not below the process' own."""
        self._mount_ids.update({volume: self._mount_below(volume, root) for volume, root in roots.items()})

    def _mount_below(self, volume: str, root: int) -> int:
        assert self._root is not None, "the process is gone"
        number = linux.mount_id(root)
        resolve = linux.RESOLVE_BENEATH | linux.RESOLVE_NO_SYMLINKS
        try:
            below = linux.openat2(self._root, volume.encode(), os.O_PATH, resolve=resolve)
        except OSError as failure:
            raise internal("handing out a volume", failure) from None
        try:
            if linux.mount_id(below) != number:
                raise internal("handing out a volume", ValueError(f"{volume} is not in the mount's directory"))
        finally:
            os.close(below)
        return number

    def clear(self) -> None:
        """The process has given all of them back."""
        self._mount_ids.clear()

    def check_file(self, volume: str, info: FileInfo, fds: Sequence[int]) -> None:
        """Refuse everything but one read-only regular file of the volume. Raises ProtocolError or OSError.

        Asks only the kernel's memory, never the file system: its driver may be a hung program. The mount id cannot
        have been reused, as the reader's root, or the owner's, holds the mount.
        """
        if len(fds) != 1 or info.kind != "file":
            raise ProtocolError("no file where one was asked for")
        flags = fcntl.fcntl(fds[0], fcntl.F_GETFL)
        if flags & os.O_PATH or flags & os.O_ACCMODE != os.O_RDONLY:
            raise ProtocolError("a descriptor that is not for reading")
        if not stat.S_ISREG(linux.file_type(fds[0])):
            raise ProtocolError("a descriptor of something that is no regular file")
        if linux.mount_id(fds[0]) != self._mount_ids.get(volume):
            raise ProtocolError("a file of another place than the volume it was asked from")
        # Off with O_NONBLOCK, which the reader opened it with, and with what a hostile one may have set (O_ASYNC).
        fcntl.fcntl(fds[0], fcntl.F_SETFL, 0)

    def close(self) -> None:
        """Let go of the root: the process is gone. May be called again."""
        if self._root is not None:
            os.close(self._root)
            self._root = None
