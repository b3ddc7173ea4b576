"""Loop devices: a part of a file as a block device (loop(4)).

A ``LoopDevice`` owns one binding, from ``bind`` to ``close``. The kernel clears it when its last user is gone
(LO_FLAGS_AUTOCLEAR, set in the same ioctl that binds it), so there is no moment in which a killed daemon could leave
one behind. ``close`` does not take that for granted: it looks.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from sendense_restored import errors

if TYPE_CHECKING:
    from .udev import BlockEvents

# <linux/fs.h>
BLKROSET = 0x125D
# <linux/loop.h>
_LOOP_CTL_GET_FREE = 0x4C82
_LOOP_CONFIGURE = 0x4C0A
_LO_FLAGS_READ_ONLY = 1
_LO_FLAGS_AUTOCLEAR = 4
_LOOP_CONFIG = struct.Struct("=II QQQQQ IIII 64s 64s 32s QQ 64x")

# Other programs take loop devices too: between asking for a free one and binding it, somebody may have it.
_LOOP_TRIES = 64


class Drain(Protocol):
    """A block device that was let go of, and that somebody abroad may still hold."""

    @property
    def path(self) -> Path:
        """The node, such as ``/dev/loop3``."""

    def is_freed(self) -> bool:
        """Whether the kernel has cleared it; a look at sysfs, which waits for nobody."""

    async def freed(self) -> None:
        """Wait, however long that takes, until the kernel has cleared it: for what ``close`` found busy."""


class BlockDevice(Drain, Protocol):
    """A block device that carries one volume (or a whole disk, for probing)."""

    @property
    def read_only(self) -> bool:
        """Whether the kernel refuses to write to it."""

    def set_read_only(self, *, refuse: bool) -> None:
        """Have the kernel refuse writes to it from now on, or not any more. Raises OSError."""

    def sectors_written(self) -> int:
        """Sectors of 512 bytes written through this node, by its earlier uses too: compare two readings."""

    async def close(self) -> None:
        """Give it back, and see that it is free.

        Raises errors.Busy while somebody else still uses it; the kernel frees it when they let go, and another
        ``close`` looks again. It must not be used any more either way.
        """


class LoopDevice:
    """A loop device over a part of a file, bound and cleared by us."""

    def __init__(self, number: int, descriptor: int, events: BlockEvents, *, read_only: bool) -> None:
        self.path = Path(f"/dev/loop{number}")
        self.read_only = read_only
        self._sysfs = Path(f"/sys/block/loop{number}")
        self._descriptor = descriptor
        self._sequence = self._read("diskseq")
        self._events = events

    @classmethod
    def bind(cls, file: int, start: int, size: int, events: BlockEvents, *, writable: bool) -> LoopDevice:
        """Bind a free loop device to ``size`` bytes from ``start`` of the open ``file``.

        Blocks as long as the file's server takes. Raises errors.NoDevice, or OSError.
        """
        flags = _LO_FLAGS_AUTOCLEAR | (0 if writable else _LO_FLAGS_READ_ONLY)
        name = os.fsencode(Path(f"/proc/self/fd/{file}").readlink())[-63:]
        config = _LOOP_CONFIG.pack(file, 0, 0, 0, 0, start, size, 0, 0, 0, flags, name, b"", b"", 0, 0)
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
        try:
            for _ in range(_LOOP_TRIES):
                number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
                device = os.open(f"/dev/loop{number}", os.O_RDWR | os.O_CLOEXEC)
                try:
                    if not stat.S_ISBLK(os.fstat(device).st_mode):
                        raise OSError(errno.ENOTBLK, os.strerror(errno.ENOTBLK), f"/dev/loop{number}")
                    fcntl.ioctl(device, _LOOP_CONFIGURE, config)
                    if writable:  # the flag outlives its device: who was killed in the midst of a mount leaves it set
                        fcntl.ioctl(device, BLKROSET, struct.pack("i", 0))
                except OSError as error:
                    os.close(device)
                    if error.errno != errno.EBUSY:
                        raise
                else:
                    return cls(number, device, events, read_only=not writable)
        finally:
            os.close(control)
        raise errors.NoDevice("no loop device is free; unmount something and try again")

    def set_read_only(self, *, refuse: bool) -> None:
        """See ``BlockDevice``. A flag of the kernel's: whoever serves the device has no part in it."""
        fcntl.ioctl(self._descriptor, BLKROSET, struct.pack("i", refuse))

    def sectors_written(self) -> int:
        """See ``BlockDevice``; field 7 of the stat file."""
        return int(self._read("stat").split()[6])

    def _read(self, attribute: str) -> str:
        return (self._sysfs / attribute).read_text(encoding="ascii").strip()

    def is_freed(self) -> bool:
        """See ``BlockDevice``: unbound, or bound anew (ABI/testing/sysfs-block, diskseq)."""
        try:
            return not (self._sysfs / "loop").exists() or self._read("diskseq") != self._sequence
        except FileNotFoundError:  # between the two looks, the device itself was removed
            return True

    async def freed(self) -> None:
        """See ``BlockDevice``."""
        await self._events.until(self.is_freed, seconds=None)

    def drop(self) -> None:
        """Let go of the device; the kernel clears it when nobody else uses it. May be called again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    async def close(self) -> None:
        """Let go of the device and see that the kernel cleared it; see ``BlockDevice``."""
        self.drop()
        if not await self._events.until(self.is_freed, seconds=2.0):
            raise errors.Busy(f"{self.path.name} is still in use; it is freed when its last user lets go")
