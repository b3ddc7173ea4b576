"""From checked image chains to block devices: NBD where there is enough of it, FUSE and loop where there is not.

Which way a backup takes is decided for all of its disks together, so that one mount has one kind of device: ``nbd``
has a pool of devices (``nbd_pool``), and a backup whose disks do not all find a free one there, or one whose storage
opens images to root alone, goes through ``fuse``, unless the configuration wants NBD and nothing else.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final, Protocol

from sendense_restored import errors

from . import fuse, nbd
from .fuse import FuseAttachment
from .nbd import NbdAttachment, NotWithNbdError
from .nbd_pool import Pool
from .uids import Uids
from .workplace import Workplace

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Sequence

    from sendense_restored.config import Config

    from .image import Image
    from .loop import BlockDevice, Drain
    from .nbd_pool import NbdDevice
    from .process import Tools
    from .resources import Device
    from .threads import Threads
    from .udev import BlockEvents

__all__ = ["OPTIONAL_TOOLS", "REQUIRED_TOOLS", "Attacher", "Attachment", "FuseAttachment", "Workplace"]

log = logging.getLogger(__name__)

REQUIRED_TOOLS: Final = fuse.REQUIRED_TOOLS
OPTIONAL_TOOLS: Final = tuple(nbd.TOOLS)


class Attachment(Protocol):
    """One disk of a backup, readable as block devices."""

    @property
    def size(self) -> int:
        """Bytes of the disk."""

    @property
    def lost(self) -> asyncio.Future[str]:
        """Done, with a reason, when what serves it ended though nobody closed it."""

    async def slice(self, start: int, size: int, *, writable: bool) -> BlockDevice:
        """A device over ``size`` bytes from ``start``; writes go to the overlay."""

    async def close(self) -> Drain | None:
        """End the image server and free everything; all slices must be closed before. May be called again.

        Returns what somebody abroad still holds: it is not used again before the kernel has freed it. Raises
        errors.Busy if something cannot be ended.
        """

    def kill(self) -> None:
        """End the image server at once: reads that nobody answers become EIO."""


class Attacher:
    """Makes attachments; owns the pool of NBD devices."""

    def __init__(self, tools: Tools, config: Config, events: BlockEvents, threads: Threads) -> None:
        self._parts = (tools, config, events, threads)
        self._only = config.attach.backend
        self._uids = Uids(config.attach.uids)
        self._pool = self._find_pool(tools, config) if self._only != "fuse" else None

    def _find_pool(self, tools: Tools, config: Config) -> Pool | None:
        _, _, events, threads = self._parts
        # With "auto" a machine without NBD is no reason to complain; who wrote "nbd" wants to know what is missing.
        level = logging.WARNING if self._only == "nbd" else logging.INFO
        if missing := [f"{name} (package {nbd.TOOLS[name]})" for name in nbd.TOOLS if not tools.has(name)]:
            log.log(level, "no NBD: not installed: %s", ", ".join(missing))
            return None
        pool = Pool(config.attach.nbd_devices, events, threads)
        if not pool.numbers:
            log.log(level, "no NBD: the kernel has none of the devices of attach.nbd_devices; is the module loaded?")
            return None
        log.info("NBD devices %s, up to %d partitions each", pool.numbers, pool.max_part)
        return pool

    @property
    def backend(self) -> str:
        """``nbd`` or ``fuse``: what a mount goes through if nothing is in the way."""
        return "nbd" if self._pool is not None or self._only == "nbd" else "fuse"

    def devices(self) -> list[Device]:
        """The NBD devices, whoever uses them."""
        return self._pool.states() if self._pool is not None else []

    async def attach(self, images: Sequence[Image], workplace: Workplace, made: list[Attachment]) -> None:
        """Serve all disks of a mount, in the same way.

        Each is in ``made`` before anything of it is; the caller closes what is in there, also after an error. Raises
        errors.NoDevice, ImageRefused, BackupNotReady, Timeout, NoSpace or Failed; Busy if what was begun with NBD
        cannot be ended.
        """
        why = "not enough devices are free"
        if self._pool is not None and (taken := self._pool.take(len(images), workplace.path.name)) is not None:
            try:
                await self._with_nbd(self._pool, taken, images, workplace, made)
            except NotWithNbdError as error:
                while made:
                    await made[-1].close()
                    made.pop()
                if self._only == "nbd":
                    raise errors.NoDevice(f"{error}; {error.advice}, or have attach.backend set to auto") from None
                why = str(error)
            else:
                return
        if self._only == "nbd":
            raise errors.NoDevice(
                "this service has no NBD, its journal says what is missing; an administrator can install that, or set"
                " attach.backend to auto"
                if self._pool is None
                else f"not enough NBD devices are free for {len(images)} disk(s); unmount something and try again, or"
                " see attach.nbd_devices and attach.backend"
            )
        if self._pool is not None:
            log.info("FUSE and loop instead of NBD for mount %s: %s", workplace.path.name, why)
        for index, image in enumerate(images):
            attachment = FuseAttachment(*self._parts)
            made.append(attachment)
            await attachment.open(image, workplace, index)

    async def _with_nbd(
        self,
        pool: Pool,
        taken: list[NbdDevice],
        images: Sequence[Image],
        workplace: Workplace,
        made: list[Attachment],
    ) -> None:
        try:
            for index, image in enumerate(images):
                # From here on the device is the attachment's, and that the caller's, whatever comes of it.
                attachment = NbdAttachment(*self._parts, pool, self._uids, taken.pop(0))
                made.append(attachment)
                await attachment.open(image, workplace, index)
        finally:
            for device in taken:
                await pool.give_back(device)

    async def close(self) -> None:
        """Let go of the devices; all attachments must be closed before."""
        if self._pool is not None:
            await self._pool.close()
