"""From a checked image chain to a block device: FUSE and loop.

``qemu-storage-daemon`` exports the chain, with a throw-away overlay on top, as one regular file through FUSE; loop
devices over that file carry the volumes. The overlay takes what journal replay writes, so the images stay as they
are. A disk's ``Attachment`` owns the server; each ``LoopDevice`` owns one loop. Everything here ends with the daemon
even if it is killed: the server has a parent-death signal, the overlay has no name (``workplace``), and loops clear
themselves. An overlay that is full is an I/O error to whoever writes to the device.

The server has a mount namespace of its own, which holds its export and none of the file systems above it. Were it in
the daemon's, it could be the last one there after a crash and would have to unmount, while dying, a file system that
waits for the server's answer (XFS writes its log even then): both would hang for ever. The daemon reaches the export
through ``/proc/PID/root`` (proc_pid_root(5)).

``qemu-storage-daemon`` runs as root because QEMU mounts FUSE by itself, which needs CAP_SYS_ADMIN; its bounding set
holds that and CAP_DAC_READ_SEARCH (to reopen images of other owners through ``/proc/self/fd``), nothing else.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

from sendense_restored import errors

from . import image as images
from . import mountinfo
from .loop import LoopDevice
from .process import Jail, ToolError, internal
from .workplace import Workplace

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sendense_restored.config import Config

    from .image import Image
    from .loop import BlockDevice
    from .process import Child, Tools
    from .threads import Threads
    from .udev import BlockEvents

__all__ = ["REQUIRED_TOOLS", "Attachment", "FuseAttachment", "Workplace"]

log = logging.getLogger(__name__)

_T = TypeVar("_T")

REQUIRED_TOOLS: Final = {
    "qemu-img": "qemu-utils",
    "qemu-storage-daemon": "qemu-system-common on Debian 12, qemu-utils on 13",
    "sh": "dash",
    "mount": "mount",
    "umount": "mount",
}

_FULL = ("No space left", "File too large", "Disk quota exceeded", "image size is too large")
"""What programs say of ENOSPC, EFBIG and EDQUOT; the last is what qemu-img makes of EFBIG."""
_MOST_GREETING = 64 << 10  # bytes; QEMU's has a few hundred

# Sub-clusters keep the overlay small: a 4 KiB journal write allocates 4 KiB, not a whole cluster.
_OVERLAY_OPTIONS = "extended_l2=on,cluster_size=128k"
# On a disk the length is what is bounded, holes included, and it grows by whole clusters: 2000 scattered writes of
# 4 KiB make a file of 31 MiB with these options and of 222 MiB with the others, 8 MiB of which are on the disk.
# Disks may have up to 64 TiB with them.
_OVERLAY_OPTIONS_ON_DISK = "extended_l2=on,cluster_size=16k"

# Run by the server's process before it becomes QEMU: lets go of the daemon's mounts, whose copies came with the new
# namespace (their places stand from $3 on, up to a dash), and makes the file $2 in $1 that the export is mounted on.
# SIGXFSZ is ignored so that a full overlay on a disk is an error (EFBIG) to QEMU and not its end.
_PREPARE = """
trap '' XFSZ
place=$1 file=$2
shift 2
while [ "$1" != - ]; do
    umount -i -n --lazy "$1"
    shift
done
shift
mount -i -n -t tmpfs -o nosuid,nodev,noexec,size=64k,mode=0700 sendense "$place"
: > "$place/$file"
exec "$@"
"""

_SERVER_CAPABILITIES = frozenset({"sys_admin", "dac_read_search"})
_SERVER_MEMORY = 4 << 30  # QEMU keeps up to 32 MiB of metadata cache for each layer of a chain


class Attachment(Protocol):
    """One disk of a backup, readable as block devices."""

    @property
    def size(self) -> int:
        """Bytes of the disk."""

    @property
    def lost(self) -> asyncio.Future[str]:
        """Done, with a reason, when the image server ended though nobody closed it."""

    async def slice(self, start: int, size: int, *, writable: bool) -> BlockDevice:
        """A device over ``size`` bytes from ``start``; writes go to the overlay."""

    async def close(self) -> None:
        """End the image server and free everything; all slices must be closed before."""

    def kill(self) -> None:
        """End the image server at once: reads that nobody answers become EIO."""


class FuseAttachment:
    """A disk served by ``qemu-storage-daemon`` as a file of a FUSE mount; see ``Attachment``."""

    def __init__(self, tools: Tools, config: Config, events: BlockEvents, threads: Threads) -> None:
        self._tools, self._config, self._events, self._threads = tools, config, events, threads
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.size = 0
        self._server: Child | None = None
        self._watch: asyncio.Task[None] | None = None
        self._export = Path()
        self._closing = False

    @classmethod
    async def open(
        cls,
        tools: Tools,
        config: Config,
        events: BlockEvents,
        threads: Threads,
        image: Image,
        workplace: Workplace,
        index: int,
    ) -> FuseAttachment:
        """Serve ``image`` as disk ``index`` of the mount that ``workplace`` belongs to.

        Raises errors.ImageRefused, Timeout, NoSpace or Failed; nothing is left then.
        """
        attachment = cls(tools, config, events, threads)
        try:
            await attachment._open(image, workplace, index)
        except BaseException:
            await attachment.close()
            raise
        return attachment

    async def _open(self, image: Image, workplace: Workplace, index: int) -> None:
        self.size = image.virtual_size
        # In the server's own namespace, where nothing else is; the name tells people whose it is.
        export = workplace.path.parent / f"{workplace.path.name}-disk-{index}"
        overlay = await self._make_overlay(workplace, index)
        try:
            node: dict[str, object] = {
                "driver": "qcow2",
                "node-name": "disk",
                "file": {"driver": "file", "filename": f"/proc/self/fd/{overlay}"},
                "backing": images.blockdev(image),
            }
            fds = (overlay, *(layer.fd for layer in image.layers))
            server = await self._start(node, export, fds, workplace.overlay_limit)
            # From here on QEMU's own locks keep writers out; whoever wrote before that was not kept out by the walk.
            if await self._ask(lambda: images.changed(image), bool):
                raise errors.BackupNotReady("an image was changed while it was being opened; try again")
        finally:
            os.close(overlay)
        self._export = Path(f"/proc/{server.pid}/root", export.relative_to("/"))

    async def _make_overlay(self, workplace: Workplace, index: int) -> int:
        """An empty qcow2 file of the disk's size without a backing name; returns it open.

        qemu-img never sees the chain: with ``-b`` it would open whatever the base's header names.
        """
        options = _OVERLAY_OPTIONS if workplace.overlay_limit is None else _OVERLAY_OPTIONS_ON_DISK
        overlay = workplace.open_overlay(index)
        try:
            os.fchown(overlay, self._config.attach.server_uid, self._config.attach.server_uid)
            target = f"/proc/self/fd/{overlay}"
            await self._tools.run(
                Jail(self._config.attach.server_uid, file_size=workplace.overlay_limit),
                "qemu-img",
                *("create", "-q", "-f", "qcow2", "-o", options, target, str(self.size)),
                seconds=self._config.attach.timeout,
                fds=(overlay,),
            )
            os.fchown(overlay, 0, 0)
        except ToolError as error:
            os.close(overlay)
            if any(reason in error.stderr for reason in _FULL):
                raise errors.NoSpace("the overlay does not fit; raise attach.overlay_size") from None
            raise internal("making the overlay", error) from None
        except BaseException:
            os.close(overlay)
            raise
        return overlay

    async def _start(
        self, node: dict[str, object], export: Path, fds: Sequence[int], overlay_limit: int | None
    ) -> Child:
        ours, theirs = socket.socketpair(type=socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        with ours:
            with theirs:
                number = theirs.fileno()
                places = (export.parent, self._config.mounts.directory)
                there = [str(place) for place in places if mountinfo.mounted_on(place) is not None]
                self._server = await self._tools.spawn(
                    Jail(
                        uid=0,
                        capabilities=_SERVER_CAPABILITIES,
                        own_mounts=True,
                        memory=_SERVER_MEMORY,
                        cpu=None,
                        files=4096,
                        file_size=overlay_limit,
                    ),
                    "sh",
                    *("-euc", _PREPARE, "sh", str(export.parent), export.name, *there, "-"),
                    self._tools.paths["qemu-storage-daemon"],
                    *("--blockdev", json.dumps(node)),
                    *(
                        "--export",
                        f"type=fuse,id=disk,node-name=disk,mountpoint={export},writable=on,allow-other=off",
                    ),
                    # Last, so that the monitor talks only after the export stands.
                    *("--chardev", f"socket,id=monitor,fd={number}", "--monitor", "chardev=monitor"),
                    fds=(number, *fds),
                )
            try:
                async with asyncio.timeout(self._config.attach.timeout):
                    ready = await _monitor_answers(ours)
            except TimeoutError:
                raise errors.Timeout("the image server did not start in time; try again") from None
            if not ready:
                await self._server.close()
                raise _refusal(self._server)
            self._watch = asyncio.create_task(self._follow(self._server), name=f"watch {export.name}")
            return self._server

    async def _follow(self, server: Child) -> None:
        status = await server.wait()
        if not self._closing and not self.lost.done():
            log.warning("image server %d ended with %d: %s", server.pid, status, server.stderr)
            self.lost.set_result("the image server ended unexpectedly")

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

    async def slice(self, start: int, size: int, *, writable: bool) -> LoopDevice:
        """See ``Attachment``. Raises errors.NoDevice, Timeout or Failed."""
        return await self._ask(lambda: self._bind(start, size, writable=writable), LoopDevice.drop)

    def _bind(self, start: int, size: int, *, writable: bool) -> LoopDevice:
        # Not kept open: every close of a FUSE file waits for its server, and each program that the daemon starts
        # closes what it inherits, with the daemon waiting for it (vfork(2)). A hung server would stop it whole.
        file = _open_export(self._export)
        try:
            return LoopDevice.bind(file, start, size, self._events, writable=writable)
        finally:
            os.close(file)

    def kill(self) -> None:
        """See ``Attachment``."""
        if self._server is not None:
            self._server.kill()

    async def close(self) -> None:
        """See ``Attachment``; may be called again. Raises errors.Busy."""
        self._closing = True
        # Killed, not asked: nothing that it holds outlives the mount, and a hung one would not answer.
        if self._server is not None and not await self._server.close():
            raise errors.Busy("the image server cannot be ended, because the repository's storage does not answer")
        if self._watch is not None:
            await self._watch
        self.lost.cancel()


def _open_export(path: Path) -> int:
    """The file that a server exports, open for reading and writing. Raises OSError if it is anything else."""
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


async def _monitor_answers(monitor: socket.socket) -> bool:
    """Shake hands with QEMU's monitor (docs/interop/qmp-spec); False if QEMU closes it, which means that it ended.

    Its main loop answers only after every option on the command line was carried out, the export among them.
    """
    loop = asyncio.get_running_loop()
    try:
        await loop.sock_sendall(monitor, b'{"execute": "qmp_capabilities"}\n')
        received = b""
        while b'"return"' not in received:
            chunk = await loop.sock_recv(monitor, 4096)
            if not chunk or len(received) > _MOST_GREETING:
                return False
            received += chunk
    except ConnectionError:
        return False
    return True


def _refusal(server: Child) -> errors.RestoreError:
    """What an image server that did not come up means for the caller; the details go to the journal."""
    log.error("image server ended while starting: %s", server.stderr)
    if "Failed to get" in server.stderr and "lock" in server.stderr:
        return errors.BackupNotReady("the backup is being written by another program; try again when it is done")
    if any(reason in server.stderr for reason in _FULL):
        return errors.NoSpace("the overlay does not fit; raise attach.overlay_size")
    return errors.ImageRefused("QEMU cannot open the image; check the chain with 'qemu-img check'")
