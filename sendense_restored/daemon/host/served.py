"""What all image servers of one disk have in common, whatever the kernel makes of them.

A QEMU program serves the chain, spelled out layer by layer, with a throw-away overlay on top. The overlay takes what
journal replay writes, so the images stay as they are; it has no name (``workplace``) and ends with the server. An
overlay that is full is an I/O error to whoever writes to the device.

A server has a mount namespace of its own without the daemon's mounts: were it in the daemon's, it could be the last
one there after a crash and would have to unmount, while dying, a file system that waits for the server's answer (XFS
writes its log even then), and both would hang for ever.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING, Final, TypeVar

from sendense_restored import errors

from . import image as images
from .process import Jail, ToolError, internal

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from sendense_restored.config import Config

    from .child import Child
    from .image import Image
    from .process import Tools
    from .threads import Threads
    from .udev import BlockEvents
    from .workplace import Workplace

log = logging.getLogger(__name__)

_T = TypeVar("_T")

_FULL = ("No space left", "File too large", "Disk quota exceeded", "image size is too large")
"""What programs say of ENOSPC, EFBIG and EDQUOT; the last is what qemu-img makes of EFBIG."""

# Sub-clusters keep the overlay small: a 4 KiB journal write allocates 4 KiB, not a whole cluster.
_OVERLAY_OPTIONS = "extended_l2=on,cluster_size=128k"
# On a disk the length is what is bounded, holes included, and it grows by whole clusters: 2000 scattered writes of
# 4 KiB make a file of 31 MiB with these options and of 222 MiB with the others, 8 MiB of which are on the disk.
# Disks may have up to 64 TiB with them.
_OVERLAY_OPTIONS_ON_DISK = "extended_l2=on,cluster_size=16k"

SERVER: Final = Jail(uid=0, own_mounts=True, memory=4 << 30, cpu=None, files=4096)
"""What the jails of all servers have in common; ``uid`` is FUSE's, NBD has others.

QEMU caches up to 32 MiB of metadata for each layer of a chain.
"""


class Served:
    """One disk with its image server; what becomes of it is for those who derive from this."""

    def __init__(self, tools: Tools, config: Config, events: BlockEvents, threads: Threads) -> None:
        self._tools, self._config, self._events, self._threads = tools, config, events, threads
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.size = 0
        self._server: Child | None = None
        self._watches: list[asyncio.Task[None]] = []
        self._closing = False

    async def _make_overlay(self, workplace: Workplace, index: int, owner: int) -> int:
        """An empty qcow2 file of the disk's size without a backing name; returns it open.

        It is made by, and belongs to, uid ``owner``, which is the server's.

        qemu-img never sees the chain: with ``-b`` it would open whatever the base's header names.
        """
        options = _OVERLAY_OPTIONS if workplace.overlay_limit is None else _OVERLAY_OPTIONS_ON_DISK
        overlay = workplace.open_overlay(index)
        try:
            os.fchown(overlay, owner, owner)
            target = f"/proc/self/fd/{overlay}"
            await self._tools.run(
                # Under a uid that nobody else has: whoever has it could open the overlay now and write to it later,
                # when its header names a file that QEMU opens.
                Jail(owner, own_mounts=True, without=self._places(workplace), file_size=workplace.overlay_limit),
                "qemu-img",
                *("create", "-q", "-f", "qcow2", "-o", options, target, str(self.size)),
                seconds=self._config.attach.timeout,
                fds=(overlay,),
            )
        except ToolError as error:
            os.close(overlay)
            if any(reason in error.stderr for reason in _FULL):
                raise errors.NoSpace("the overlay does not fit; raise attach.overlay_size") from None
            raise internal("making the overlay", error) from None
        except BaseException:
            os.close(overlay)
            raise
        return overlay

    @staticmethod
    def _chain(image: Image, overlay: int) -> tuple[dict[str, object], tuple[int, ...]]:
        """The block node of the chain with the overlay on top, and the descriptors that it takes."""
        node: dict[str, object] = {
            "driver": "qcow2",
            "file": {"driver": "file", "filename": f"/proc/self/fd/{overlay}"},
            "backing": images.blockdev(image),
        }
        return node, (overlay, *(layer.fd for layer in image.layers))

    def _places(self, workplace: Workplace) -> tuple[Path, ...]:
        """Where the daemon has mounts that a server must not hold."""
        return (workplace.path.parent, self._config.mounts.directory)

    async def _check_unchanged(self, image: Image) -> None:
        """Once the server has opened the chain, QEMU's own locks keep writers out; see that none came before.

        Raises errors.BackupNotReady.
        """
        if await self._ask(lambda: images.changed(image), bool):
            raise errors.BackupNotReady("an image was changed while it was being opened; try again")

    async def _ready(self, answer: Awaitable[_T | None]) -> _T:
        """Wait until the server answers, which it does when it has opened everything; it is watched from then on.

        Returns what ``answer`` does. Raises errors.Timeout, or, if that is None, what ``refusal`` makes of the
        server, which is closed then.
        """
        assert self._server is not None
        try:
            async with asyncio.timeout(self._config.attach.timeout):
                result = await answer
        except TimeoutError:
            raise errors.Timeout("the image server did not start in time; try again") from None
        if result is None:
            await self._server.close()
            raise refusal(self._server)
        self._watch(self._server, "image server")
        return result

    def _watch(self, child: Child, what: str) -> None:
        """Follow a child: its end, if nobody closes the disk, means that the disk is lost."""
        self._watches.append(asyncio.create_task(self._follow(child, what), name=f"watch {what} {child.pid}"))

    async def _follow(self, child: Child, what: str) -> None:
        status = await child.wait()
        if not self._closing and not self.lost.done():
            log.warning("%s %d ended with %d: %s", what, child.pid, status, child.stderr)
            self.lost.set_result(f"the {what} ended unexpectedly")

    async def _ask(self, function: Callable[[], _T], discard: Callable[[_T], object]) -> _T:
        """Run ``function``, which blocks as long as the server takes, in a thread.

        When time is up or the caller is cancelled the server is killed: the kernel then answers in its place, the
        thread comes back, and what it brought is given to ``discard``.
        """
        came_back = False
        try:
            result = await self._threads.run(
                f"server {self._server.pid if self._server else 0}",
                function,
                seconds=self._config.attach.timeout,
                discard=discard,
            )
            came_back = True
        except TimeoutError:
            raise errors.Timeout("the image server did not answer in time; try again") from None
        except OSError as error:
            came_back = True
            raise internal("attaching the disk", error) from None
        except errors.RestoreError:
            came_back = True
            raise
        finally:
            if not came_back:
                self.kill()
        return result

    def kill(self) -> None:
        """See ``Attachment``."""
        if self._server is not None:
            self._server.kill()

    async def _end_server(self) -> None:
        """Raises errors.Busy; may be called again."""
        # Killed, not asked: nothing that it holds outlives the mount, and a hung one would not answer.
        if self._server is not None and not await self._server.close():
            raise errors.Busy("the image server cannot be ended, because the repository's storage does not answer")

    async def _all_ended(self) -> None:
        """Once all children have ended; may be called again."""
        if self._watches:
            await asyncio.wait(self._watches)
        self.lost.cancel()


def refusal(server: Child) -> errors.RestoreError:
    """What it means for the caller that an image server ended before its disk was there; logs the details."""
    # No error yet: there may be another way.
    log.warning("image server ended before its disk was there: %s", server.stderr or "(no message)")
    # QEMU's own lines only: the jail's tools speak of other files, and "No space left" of unshare is a limit.
    said = "\n".join(line for line in server.stderr.split("\n") if line.startswith("qemu-"))
    if not said:  # its jail could not be made, or it was killed or crashed: nothing says that the image is damaged
        return errors.Failed(
            "the image server ended before its disk was there; the service's journal has the details"
        )
    if "Failed to get" in said and "lock" in said:
        return errors.BackupNotReady("the backup is being written by another program; try again when it is done")
    if any(reason in said for reason in _FULL):
        return errors.NoSpace("the overlay does not fit; raise attach.overlay_size")
    return errors.ImageRefused("QEMU cannot read the image; check the chain with 'qemu-img check'")
