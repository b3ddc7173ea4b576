"""A disk as an NBD device: an unprivileged ``qemu-nbd``, and ``nbd-client`` that binds it to ``/dev/nbdX``.

The server gets a listening socket that has no name: the daemon makes it, and nobody but the daemon and its own client
can reach it, through a descriptor. The daemon connects first: QEMU greets once it has opened the whole chain, so what
the server refuses is known before any device is touched. The client stays in the foreground, inside the ioctl that is
the connection (NBD_DO_IT): its death, however it comes, is the disconnection, and can hit no connection but its own.
That is why closing kills the client, and never runs ``nbd-client -d``, which disconnects whoever is on the device by
then.

The server ends with its last connection, which is the daemon's until the client has the device, and then the
client's. So the end of a connection is always noticed, also where the client lives on: the kernel shuts the device
down, without an event, as soon as the client is sent any signal, SIGSTOP for one.

Both children have mount namespaces without the daemon's mounts, and each has a uid that no other process has then
(``attach.uids``), so that a server that a guest has taken over reaches no other. What the server starts ends with it,
as it has a process namespace. It may reopen images of other owners through ``/proc/self/fd`` (CAP_DAC_READ_SEARCH),
but finds no file of the host by name except programs (nor by handle, under the unit's filter of system calls). The
client needs CAP_SYS_ADMIN for the driver's ioctls, and a node of its own for the one device.

nbd-client sets sizes and clears the socket of whatever device it is given before the kernel has a chance to refuse:
on a device that somebody connected a moment ago it would do harm. The last look at ``pid`` is therefore taken in its
own process, right before it starts; what is left of the gap is its talk with the server (``attach.timeout`` at most).
Programs that heed the lock file are safe without that.

``nbd-client -timeout`` bounds how long the kernel waits for an answer: a hung server means EIO, never a process that
cannot be killed. The kernel looks for partitions when the device is opened first (GD_NEED_PART_SCAN), which is done
in a thread here and not left to chance; an open that came back has made the nodes.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import stat
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sendense_restored import errors

from .loop import LoopDevice
from .nbd_node import NbdNode, numbers_of, open_node
from .nbd_socket import connect, listen
from .process import Jail
from .served import SERVER, Served, refusal

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sendense_restored.config import Config

    from .child import Child
    from .image import Image
    from .loop import BlockDevice
    from .nbd_pool import NbdDevice, Pool
    from .process import Tools
    from .threads import Threads
    from .udev import BlockEvents
    from .uids import Uids
    from .workplace import Workplace

log = logging.getLogger(__name__)

TOOLS: Final = {"qemu-nbd": "qemu-utils", "nbd-client": "nbd-client"}

_EXPORT = "disk"
_TAKEN = 75
_LAST_LOOK = f"""
[ ! -e "$1" ] || exit {_TAKEN}
shift
exec "$@"
"""
NOT_OPENED: Final = 2
"""How a shell ends whose redirection fails; it says why."""
_OPEN = 'for each; do : <"/proc/self/fd/$each"; done'
_CLOSED = ("the repository's storage opens the image to root alone", "give others the right to read it")
_GONE = ("the NBD devices that were free are not any more, or cannot be connected", "try again")
_CAPABILITIES = frozenset({"dac_read_search"})
"""A server's: images may have any owner."""
_DEVICES = Path("/dev")
_SERVER_THREADS = 128
"""QEMU has up to 64 that work, and a few more."""
_CLIENT_THREADS = 8
_GRACE = 2.0
"""Seconds for a client to tidy up whose server has gone."""


class NotWithNbdError(Exception):
    """This disk cannot be had this way: ``str()`` says why, ``advice`` what to do for those who want no other."""

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(reason)
        self.advice = advice


class NbdAttachment(Served):
    """A disk on an NBD device; see ``attach.Attachment``. Owns the device from the beginning."""

    def __init__(
        self,
        tools: Tools,
        config: Config,
        events: BlockEvents,
        threads: Threads,
        pool: Pool,
        uids: Uids,
        device: NbdDevice,
    ) -> None:
        """``device`` is one of the ``pool``, which gets it back, and ``uids`` its two, when this is closed."""
        super().__init__(tools, config, events, threads)
        self._pool, self._uids, self.device = pool, uids, device
        self._server_uid, self._client_uid = uids.take(), uids.take()
        self._lent: tuple[int, ...] = (self._server_uid, self._client_uid)
        self._client: Child | None = None
        self._asked: Child | None = None
        self._killed = False
        self._node: Path | None = None

    async def open(self, image: Image, workplace: Workplace, index: int) -> None:
        """Serve ``image`` as disk ``index`` of the mount that ``workplace`` belongs to; once.

        If somebody takes the device meanwhile, it is another one of the pool. Raises NotWithNbdError if there is
        none, or if the image is closed to all but root; errors.ImageRefused, Timeout, NoSpace, BackupNotReady or
        Failed. ``close`` takes away what is left.
        """
        self.size = image.virtual_size
        overlay = await self._make_overlay(workplace, index, owner=self._server_uid)
        with ExitStack() as held:
            held.callback(os.close, overlay)
            node, fds = self._chain(image, overlay)
            directory = os.open(workplace.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            held.callback(os.close, directory)
            listening, door = listen(directory, f"server-{index}")
            held.callback(os.close, door)
            with listening:
                await self._start_server(node, fds, workplace, listening.fileno())
            # From here on only the server and its guards have the socket. They end with it, and so does our waiting.
            try:
                connection = await self._ready(connect(door, _EXPORT))
            except errors.ImageRefused:
                if await self._is_closed(image, workplace):
                    raise NotWithNbdError(*_CLOSED) from None
                raise
            held.enter_context(connection)
            await self._check_unchanged(image)
            tried: set[int] = set()
            while not await self._connect(workplace, directory, door):
                tried.add(self.device.number)
                await self._take_another(tried)
        await self._ask(self.device.settle, lambda _: None)
        log.info("%s serves disk %d of %s", self.device.path, index, self.device.mount)

    # --- the server ---------------------------------------------------------------------------------------------

    async def _start_server(
        self,
        node: dict[str, object],
        fds: tuple[int, ...],
        workplace: Workplace,
        listening: int,
    ) -> None:
        jail = replace(
            SERVER,
            uid=self._server_uid,
            capabilities=_CAPABILITIES,
            without=self._places(workplace),
            bare=workplace.path.parent,
            own_objects=True,
            own_processes=True,
            processes=_SERVER_THREADS,
            file_size=workplace.overlay_limit,
        )
        self._server = await self._tools.spawn_listening(
            jail,
            # Two connections: the daemon's, and the client's.
            *("qemu-nbd", "--shared=2", f"--export-name={_EXPORT}", f"json:{json.dumps(node)}"),
            listening=listening,
            fds=fds,
        )

    async def _is_closed(self, image: Image, workplace: Workplace) -> bool:
        """Whether the kernel denies the server's uid an image's layer, whatever its capabilities (NFS and FUSE do).

        Asked of a shell of ours under that uid, once the server has ended: one that a hostile image has taken over
        would say whatever leads to a server that runs as root. Any other error than EACCES is no reason.
        """
        if self._server is None or not self._server.ended:
            return False
        jail = Jail(
            self._server_uid,
            capabilities=_CAPABILITIES,
            own_mounts=True,
            without=self._places(workplace),
            files=SERVER.files,
        )
        fds = tuple(layer.fd for layer in image.layers)
        asked = self._asked = await self._tools.spawn(jail, "sh", "-euc", _OPEN, "sh", *map(str, fds), fds=fds)
        await asked.ends_within(self._config.attach.timeout)
        if not await asked.close():
            return False
        return await asked.wait() == NOT_OPENED and "Permission denied" in asked.stderr

    # --- the client ---------------------------------------------------------------------------------------------

    async def _connect(self, workplace: Workplace, directory: int, door: int) -> bool:
        """Have a client bind the device; False if it cannot, which need not be the case for another device."""
        assert self._server is not None
        device, seconds = self.device, self._config.attach.timeout
        try:
            self._make_node(workplace)
        except (OSError, ValueError) as error:
            log.warning("not using %s: %s", device.path, error)
            return False
        client = self._client = await self._tools.spawn(
            Jail(
                self._client_uid,
                capabilities=frozenset({"sys_admin"}),
                own_mounts=True,
                own_objects=True,
                without=(*self._places(workplace), _DEVICES),
                memory=64 << 20,
                cpu=None,
                files=64,
                processes=_CLIENT_THREADS,
            ),
            *("sh", "-euc", _LAST_LOOK, "sh", str(device.sysfs / "pid"), self._tools.paths["nbd-client"]),
            *("-nonetlink", "-nofork", "-timeout", str(math.ceil(seconds)), "-N", _EXPORT),
            *("-unix", f"/proc/self/fd/{door}", f"/proc/self/fd/{directory}/{device.path.name}"),
            fds=(door, directory),
            label="nbd-client",
        )
        ready = self._events.until(lambda: device.recognise(client.pid, self.size), seconds=seconds)
        if await _first(ready, client.wait(), self._server.wait()):
            self._watch(client, "device client")
            return True
        if self._server.ended:
            raise refusal(self._server)
        if not client.ended:
            raise errors.Timeout("the device did not appear in time; try again")
        why = "somebody else took it" if await client.wait() == _TAKEN else client.stderr
        log.warning("not using %s: %s", device.path, why)
        await client.close()
        return False

    def _make_node(self, workplace: Workplace) -> None:
        """A node of the client's own: its base name must be the device's, which is how nbd-client knows it."""
        self._remove_node()
        node, uid = workplace.path / self.device.path.name, self._client_uid
        os.mknod(node, stat.S_IFBLK | 0o600, os.makedev(*numbers_of(self.device.sysfs)))
        self._node = node
        os.chown(node, uid, uid)

    def _remove_node(self) -> None:
        if self._node is not None:
            self._node.unlink(missing_ok=True)
            self._node = None

    async def _take_another(self, tried: set[int]) -> None:
        found = self._pool.take(1, self.device.mount, without=tried)
        if found is None:
            raise NotWithNbdError(*_GONE)
        before, self.device = self.device, found[0]
        await self._pool.give_back(before)

    # --- using it, and the end ----------------------------------------------------------------------------------

    async def slice(self, start: int, size: int, *, writable: bool) -> BlockDevice:
        """See ``Attachment``: a node of the kernel's where it has one for these bytes, else a loop over the device.

        Raises errors.NoDevice, Timeout or Failed.
        """
        return await self._ask(lambda: self._bind(start, size, writable=writable), _drop)

    def _bind(self, start: int, size: int, *, writable: bool) -> BlockDevice:
        device = self.device
        if (start, size) == (0, self.size):
            return NbdNode.open(device.path, device.sysfs, None, self._close_node, writable=writable)
        if (found := device.node_of(start, size)) is not None:
            try:
                return NbdNode.open(*found, (start, size), self._close_node, writable=writable)
            except (OSError, ValueError) as error:  # the kernel has just looked anew, or never made the node
                log.warning("not using %s: %s", found[0], error)
        file = open_node(device.path, numbers_of(device.sysfs), os.O_RDWR)
        try:
            return LoopDevice.bind(file, start, size, self._events, writable=writable)
        finally:
            os.close(file)

    async def _close_node(self, close: Callable[[], None]) -> None:
        # The last one to close a device writes what is left in the cache, and waits for the server.
        await self._ask(close, lambda _: None)

    def kill(self) -> None:
        """See ``Attachment``. The client then ends by itself, and answers what waits with errors on its way."""
        self._killed = True
        super().kill()

    async def close(self) -> NbdDevice | None:
        """See ``Attachment``; may be called again. Raises errors.Busy."""
        self._closing = True
        if self._client is not None and self._killed:
            # Killed between the end of its ioctl and its last words to the kernel, it would leave requests that were
            # on their way to wait until their time is up.
            await self._client.ends_within(_GRACE)
        ended = self._client is None or await self._client.close()
        await self._end_server()
        if self._asked is not None and not await self._asked.close():
            raise errors.Busy("an image cannot be let go of, because the repository's storage does not answer")
        # What it waited for may have been the server.
        if not ended and self._client is not None and not await self._client.close():
            raise errors.Busy("the device's client cannot be ended, because the device does not answer")
        await self._all_ended()
        self._remove_node()
        for uid in self._lent:
            self._uids.give_back(uid)
        self._lent = ()
        return await self._pool.give_back(self.device)


async def _first(wanted: Awaitable[bool], *ends: Awaitable[object]) -> bool:
    """Whether ``wanted`` comes true before any of ``ends`` does."""
    waiting = asyncio.ensure_future(wanted)
    others = [asyncio.ensure_future(end) for end in ends]
    try:
        await asyncio.wait({waiting, *others}, return_when=asyncio.FIRST_COMPLETED)
        return waiting.done() and waiting.result()
    finally:
        for each in (waiting, *others):
            each.cancel()
        await asyncio.wait({waiting, *others})


def _drop(device: BlockDevice) -> None:
    """Let go of a slice that came too late."""
    assert isinstance(device, LoopDevice | NbdNode)
    device.drop()
