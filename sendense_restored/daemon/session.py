"""One mount: its layers, its reader, its state.

A session is built once, bottom up: workplace, directory, reader process, images, attachments, volumes, roots in the
reader's hands. Each layer is noted before it is made, and knows how to take away whatever part of it came to be.
They close in reverse and stop at the first that refuses, because cutting a device under a busy file system is worse
than a mount that stays; what is left stays noted and the next attempt goes on from there.

Busy is the truth, asked rightly: the reader gives its roots back first, so an EBUSY of umount can only come from
outside. The roots are then handed out again and the mount goes on as if nobody had asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

from sendense_restored import errors, names
from sendense_restored.reader.protocol import Entry, FileInfo, Listing, Start

from .host.volumes import VolumeState
from .volume import SessionVolume

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sendense_restored.reader.protocol import Filters

    from .host.attach import Attachment, Workplace
    from .host.image import Image
    from .host.loop import Drain
    from .host.reader import Reader, Stream
    from .store import Backup, BackupDisk, Repository
    from .volume import Journal, Machine

log = logging.getLogger(__name__)


class State(StrEnum):
    """Of a mount, as clients see it."""

    MOUNTING = "mounting"
    MOUNTED = "mounted"
    UNMOUNTING = "unmounting"
    FAILED = "failed"


class Key(NamedTuple):
    """What makes two requests ask for the same mount."""

    backup_id: str
    disks: tuple[int, ...]
    all_disks: bool
    journal: Journal


@dataclass(frozen=True)
class Wish:
    """What is to be mounted, read from the catalogue."""

    backup: Backup
    repository: Repository
    disks: tuple[BackupDisk, ...]
    all_disks: bool
    journal: Journal

    @property
    def key(self) -> Key:
        """The mount's key."""
        return Key(self.backup.id, tuple(disk.index for disk in self.disks), self.all_disks, self.journal)


class _Layer(NamedTuple):
    name: str
    close: Callable[[], Awaitable[None]]


class Session:
    """One mount, from its wish to its end. ``Mounts`` owns it."""

    def __init__(self, mount_id: str, wish: Wish, machine: Machine, *, created_at: int) -> None:
        """``created_at``: when it was asked for (unix seconds)."""
        self.id = mount_id
        self.wish = wish
        self.state = State.MOUNTING
        self.error = ""
        self.busy = False
        """Whether the last attempt to unmount it met an open file."""
        self.created_at = created_at
        self.path = machine.mount_path(mount_id)
        self.volumes: dict[str, SessionVolume] = {}
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Done, with a reason, when something below the mount ended by itself."""
        self._machine = machine
        self._workplace: Workplace
        self._layers: list[_Layer] = []
        self._attachments: list[Attachment] = []
        self._left: list[Drain] = []
        self._images: list[Image] = []
        self._reader: Reader | None = None
        self._starting: asyncio.Task[Reader] | None = None

    # --- building ---------------------------------------------------------------------------------------------

    async def build(self) -> None:
        """Make all layers. Raises a RestoreError, or OSError; the caller closes what was made either way.

        One that was closed whole may be built again.
        """
        self.state, self.error = State.MOUNTING, ""
        self.volumes.clear()
        self._left.clear()
        self._reader = self._starting = None
        if self.lost.done():
            self.lost = asyncio.get_running_loop().create_future()
        self._workplace = self._machine.workplace(self.id)
        self._note("workplace", self._close_workplace)
        self._workplace.make()
        self._note("directory", self._close_directory)
        self.path.mkdir(mode=0o711)
        self._note("reader", self._close_reader)
        # Its start takes as long as attaching does, so both go on at once.
        self._starting = asyncio.create_task(self._machine.start_reader(self.id), name=f"start reader {self.id}")
        self._note("images", self._close_images)
        for disk in self.wish.disks:
            image = await self._machine.open_image(self.wish.repository.root, disk.qcow2_path)
            self._images.append(image)
        self._note("attachments", self._close_attachments)
        await self._machine.attach(self._images, self._workplace, self._attachments)
        for attachment in self._attachments:
            attachment.lost.add_done_callback(self._part_lost)
        self._note("devices", self._close_devices)
        self._note("volumes", self._unmount_volumes)
        await self._mount_volumes()
        self._reader = await self._starting
        self._reader.lost.add_done_callback(self._part_lost)
        self._note("roots", self._take_roots_back)
        await self._give_roots()
        if self.lost.done():
            raise errors.Unavailable(f"{self.lost.result()}; try again")
        self.state = State.MOUNTED

    def _note(self, name: str, close: Callable[[], Awaitable[None]]) -> None:
        self._layers.append(_Layer(name, close))

    def _part_lost(self, lost: asyncio.Future[str]) -> None:
        if not lost.cancelled() and not self.lost.done():
            self.lost.set_result(lost.result())

    async def _mount_volumes(self) -> None:
        for index, (disk, attachment) in enumerate(zip(self.wish.disks, self._attachments, strict=True)):
            prefix = f"disk-{disk.index}" if self.wish.all_disks else ""
            for found in await self._machine.discover(attachment, self._workplace, index, prefix):
                self.volumes[found.name] = SessionVolume(self._machine, found, attachment, self.path / found.name)
        mounting = [volume.mount(self.wish.journal) for volume in self.volumes.values()]
        # gather waits for all of them even if one fails or the build is cancelled, so none mounts behind our back.
        for failure in await asyncio.gather(*mounting, return_exceptions=True):
            if failure is not None:
                raise failure
        if not any(volume.mounted for volume in self.volumes.values()):
            reasons = "; ".join(f"{volume.name}: {volume.reason}" for volume in self.volumes.values())
            raise errors.NoMountableVolume(f"nothing on the disk can be mounted ({reasons or 'it is empty'})")

    async def _give_roots(self) -> None:
        assert self._reader is not None
        roots = {}
        for volume in self.volumes.values():
            if volume.mounted:
                roots[volume.name] = volume.mounted.root
                volume.mounted.lost.add_done_callback(self._part_lost)
        ntfs = [name for name in roots if self.volumes[name].is_ntfs]
        for name, usage in (await self._reader.give(roots, ntfs=ntfs, directory=str(self.path))).items():
            self.volumes[name].usage = usage

    @property
    def standing(self) -> bool:
        """Whether any layer of it is there."""
        return bool(self._layers)

    @property
    def draining(self) -> list[Drain]:
        """Devices that were let go of while somebody abroad still used them."""
        return [*self._left, *(device for volume in self.volumes.values() for device in volume.draining)]

    @property
    def mount_ids(self) -> set[int]:
        """The kernel's ids of what is mounted for it."""
        return {volume.mounted.mount_id for volume in self.volumes.values() if volume.mounted}

    def in_use(self) -> list[str]:
        """The files of its chains, relative to their repository."""
        return [layer.path for image in self._images for layer in image.layers]

    # --- closing ----------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Take all layers away, top down.

        Raises errors.Busy when somebody still uses the mount: it is whole again then if it could be made so. Anything
        else that refuses (a device that does not answer, an OSError of the kernel) leaves it ``unmounting``, and the
        next ``close`` goes on from there.
        """
        self.state = State.UNMOUNTING
        while self._layers:
            try:
                await self._layers[-1].close()
            except errors.Busy:
                self.busy = True
                await self._reopen()
                raise
            self._layers.pop()
        self.busy = False
        self.lost.cancel()

    async def _reopen(self) -> None:
        """After a refused unmount: mount again what was unmounted before it, and hand the roots out again.

        Not after a refusal of what lies below: a device that was given back must not be used any more.
        """
        if self._layers[-1].name != "volumes" or self.lost.done():
            return
        for volume in self.volumes.values():
            if volume.mounted is None and volume.state is VolumeState.MOUNTABLE:
                await volume.mount(self.wish.journal)
        self._note("roots", self._take_roots_back)
        await self._give_roots()
        self.state = State.MOUNTED

    async def force(self) -> None:
        """Take all layers away whoever uses them: servers first, then the reader, then the rest.

        Servers first because a reader that waits for one in the kernel cannot be killed. Descriptors abroad answer
        EIO from then on; a device that they hold is freed by the kernel when they close.
        """
        self.state = State.UNMOUNTING
        for attachment in self._attachments:
            attachment.kill()
        for volume in self.volumes.values():
            volume.kill()
        if self._starting is not None:
            await self._close_reader()
        for volume in self.volumes.values():
            await volume.abandon()
        self._layers = [
            layer for layer in self._layers if layer.name not in {"reader", "devices", "volumes", "roots"}
        ]
        await self.close()

    async def _take_roots_back(self) -> None:
        if self._reader is not None and not self._reader.lost.done():
            await self._reader.take_back()

    async def _unmount_volumes(self) -> None:
        # All volumes are unmounted before any device goes, so that a refusal can be undone. gather waits for all of
        # them; of several refusals any will do, but one that is no Busy stops the mount from being made whole again.
        attempts = [volume.unmount() for volume in self.volumes.values()]
        refusals = [found for found in await asyncio.gather(*attempts, return_exceptions=True) if found is not None]
        for refusal in sorted(refusals, key=lambda refusal: isinstance(refusal, errors.Busy)):
            raise refusal

    async def _close_devices(self) -> None:
        for volume in self.volumes.values():
            await volume.close()

    async def _close_attachments(self) -> None:
        while self._attachments:
            left = await self._attachments[-1].close()
            self._attachments.pop()
            if left is not None:
                self._left.append(left)

    async def _close_images(self) -> None:
        while self._images:
            self._images.pop().close()

    async def _close_reader(self) -> None:
        if self._starting is None:
            return
        self._starting.cancel()
        await asyncio.wait([self._starting])
        if not self._starting.cancelled() and self._starting.exception() is None:
            await self._starting.result().close()
        self._reader = None

    async def _close_directory(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.path.rmdir()

    async def _close_workplace(self) -> None:
        self._workplace.close()

    # --- serving ----------------------------------------------------------------------------------------------

    def _reading(self) -> Reader:
        """The reader, of a mount that is whole. Raises errors.Unavailable."""
        if self.state is State.MOUNTING or self.state is State.UNMOUNTING:
            raise errors.Unavailable(f"the mount is {self.state}; try again in a moment")
        if self.state is State.FAILED or self._reader is None:
            raise errors.Unavailable(f"the mount has failed ({self.error}); unmount it and mount the backup again")
        return self._reader

    def _volume(self, name: bytes) -> tuple[Reader, str]:
        """The reader and the name of the volume that a path leads into."""
        reader = self._reading()
        text = names.to_text(name)
        volume = self.volumes.get(text)
        if volume is None:
            raise errors.PathNotFound(f"there is no volume {text!r}; list '/' to see the volumes")
        if volume.mounted is None:
            raise errors.VolumeUnavailable(f"{text} is {volume.state}: {volume.reason}")
        return reader, text

    async def list(self, path: tuple[bytes, ...], *, limit: int, cursor: str) -> Listing:
        """A page of a directory; ``()`` lists the volumes."""
        if path:
            reader, volume = self._volume(path[0])
            return await reader.list(volume, path[1:], limit=limit, cursor=cursor)
        self._reading()
        after = sorted(name for name in self.volumes if name > cursor)
        entries = [self._volume_entry(self.volumes[name]) for name in after[:limit]]
        return Listing(entries, entries[-1].name if len(after) > limit else "")

    def _volume_entry(self, volume: SessionVolume) -> Entry:
        extras: dict[str, str | int | bool] = {"display_name": volume.display_name}
        if volume.mounted is None:
            extras["unreadable"] = f"{volume.state}: {volume.reason}"
        created = self.created_at * 1_000_000_000
        return Entry(volume.name, "volume", volume.found.size, 0o555, created, "", extras)

    async def stream(self, path: tuple[bytes, ...], filters: Filters, out: int, *, stall: float) -> Stream:
        """Have a directory written to the pipe ``out`` as ``protocol`` says; the caller keeps and closes its own end.

        Returns once it has begun. ``stall``: seconds after which a stream that nobody reads from ends.
        """
        if path:
            reader, volume = self._volume(path[0])
            return await reader.stream([Start(volume, path[1:])], filters, out, stall=stall)
        starts = [
            Start(name, (), self._volume_entry(volume), open=volume.mounted is not None)
            for name, volume in sorted(self.volumes.items())
        ]
        return await self._reading().stream(starts, filters, out, stall=stall)

    async def stat(self, path: tuple[bytes, ...]) -> FileInfo:
        """What is known of one file."""
        if path:
            reader, volume = self._volume(path[0])
            info = await reader.stat(volume, path[1:])
            return info if len(path) > 1 else info._replace(kind="volume")
        self._reading()
        created = self.created_at * 1_000_000_000
        return FileInfo(
            "directory", 0, 0, 0o555, 0, 0, created, created, created, len(self.volumes) + 2, "", [], [], ""
        )

    async def open(
        self, path: tuple[bytes, ...], *, stream: bytes = b"", most: int | None = None
    ) -> tuple[int, FileInfo]:
        """A read-only descriptor of a regular file, or of an alternate stream, of at most so many bytes.

        It belongs to the caller.
        """
        if not path:
            raise errors.NotAFile("'/' is a directory")
        reader, volume = self._volume(path[0])
        if stream and not self.volumes[volume].is_ntfs:
            raise errors.InvalidOption(f"{volume} is no NTFS, and its files have no streams; leave out 'stream'")
        return await reader.open(volume, path[1:], stream=stream, most=most)
