"""A disk without NBD: FUSE and loop.

``qemu-storage-daemon`` exports the chain as one regular file through FUSE; loop devices over that file carry the
volumes. The attachment owns the server; each ``LoopDevice`` owns one loop. Everything here ends with the daemon even
if it is killed: the server has a parent-death signal, and loops clear themselves. The export is mounted in the
server's own mount namespace, and the daemon reaches it through ``/proc/PID/root`` (proc_pid_root(5)).

``qemu-storage-daemon`` runs as root because QEMU mounts FUSE by itself, which needs CAP_SYS_ADMIN; its bounding set
holds that and CAP_DAC_READ_SEARCH (to reopen images of other owners through ``/proc/self/fd``), nothing else.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
import stat
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from .loop import LoopDevice
from .served import SERVER, Served

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sendense_restored.config import Config

    from .child import Child
    from .image import Image
    from .process import Tools
    from .threads import Threads
    from .udev import BlockEvents
    from .workplace import Workplace

REQUIRED_TOOLS: Final = {
    "qemu-img": "qemu-utils",
    "qemu-storage-daemon": "qemu-system-common on Debian 12, qemu-utils on 13",
    "sh": "dash",
    "mount": "mount",
    "umount": "mount",
}

_MOST_GREETING = 64 << 10  # bytes; QEMU's has a few hundred

# Run by the server's process before it becomes QEMU: makes the file $2 in $1 that the export is mounted on.
_PREPARE = """
place=$1 file=$2
shift 2
mount -i -n -t tmpfs -o nosuid,nodev,noexec,size=64k,mode=0700 sendense "$place"
: > "$place/$file"
exec "$@"
"""

_SERVER_CAPABILITIES = frozenset({"sys_admin", "dac_read_search"})


class FuseAttachment(Served):
    """A disk served by ``qemu-storage-daemon`` as a file of a FUSE mount; see ``attach.Attachment``."""

    def __init__(self, tools: Tools, config: Config, events: BlockEvents, threads: Threads) -> None:
        super().__init__(tools, config, events, threads)
        self._export = Path()

    async def open(self, image: Image, workplace: Workplace, index: int) -> None:
        """Serve ``image`` as disk ``index`` of the mount that ``workplace`` belongs to; once.

        Raises errors.ImageRefused, BackupNotReady, Timeout, NoSpace or Failed; ``close`` takes away what is left.
        """
        self.size = image.virtual_size
        # In the server's own namespace, where nothing else is; the name tells people whose it is.
        export = workplace.path.parent / f"{workplace.path.name}-disk-{index}"
        overlay = await self._make_overlay(workplace, index, owner=0)
        try:
            node, fds = self._chain(image, overlay)
            server = await self._start(node | {"node-name": "disk"}, export, fds, workplace)
            await self._check_unchanged(image)
        finally:
            os.close(overlay)
        self._export = Path(f"/proc/{server.pid}/root", export.relative_to("/"))

    async def _start(self, node: dict[str, object], export: Path, fds: Sequence[int], workplace: Workplace) -> Child:
        ours, theirs = socket.socketpair(type=socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        with ours:
            with theirs:
                number = theirs.fileno()
                self._server = await self._tools.spawn(
                    replace(
                        SERVER,
                        capabilities=_SERVER_CAPABILITIES,
                        without=self._places(workplace),
                        file_size=workplace.overlay_limit,
                    ),
                    "sh",
                    *("-euc", _PREPARE, "sh", str(export.parent), export.name),
                    self._tools.paths["qemu-storage-daemon"],
                    *("--blockdev", json.dumps(node)),
                    *(
                        "--export",
                        f"type=fuse,id=disk,node-name=disk,mountpoint={export},writable=on,allow-other=off",
                    ),
                    # Last, so that the monitor talks only after the export stands.
                    *("--chardev", f"socket,id=monitor,fd={number}", "--monitor", "chardev=monitor"),
                    fds=(number, *fds),
                    label="qemu-storage-daemon",
                )
            await self._ready(_monitor_answers(ours))
            return self._server

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

    async def close(self) -> None:
        """See ``Attachment``; may be called again. Raises errors.Busy."""
        self._closing = True
        await self._end_server()
        await self._all_ended()


def _open_export(path: Path) -> int:
    """The file that a server exports, open for reading and writing. Raises OSError if it is anything else."""
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


async def _monitor_answers(monitor: socket.socket) -> bytes | None:
    """Shake hands with QEMU's monitor (docs/interop/qmp-spec). What it said; None if it has ended.

    Its main loop answers only after every option on the command line was carried out, the export among them.
    """
    loop = asyncio.get_running_loop()
    try:
        await loop.sock_sendall(monitor, b'{"execute": "qmp_capabilities"}\n')
        received = b""
        while b'"return"' not in received:
            chunk = await loop.sock_recv(monitor, 4096)
            if not chunk or len(received) > _MOST_GREETING:
                return None
            received += chunk
    except ConnectionError:
        return None
    return received
