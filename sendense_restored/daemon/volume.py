"""What a session needs of the host, and one of its volumes: what was found, its device and its mount."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

from sendense_restored import errors, names

from .host.filesystem import MountRefused
from .host.volumes import VolumeState

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Collection, Sequence
    from pathlib import Path

    from sendense_restored.reader.protocol import Usage

    from .host.attach import Attachment
    from .host.filesystem import Mounted
    from .host.holders import Holding
    from .host.image import Image
    from .host.loop import BlockDevice
    from .host.reader import Reader
    from .host.resources import Resources
    from .host.volumes import Volume
    from .host.workplace import Workplace

log = logging.getLogger(__name__)

_T = TypeVar("_T")

Journal = Literal["replay", "as-crashed"]


class Machine(Protocol):
    """What a session needs of the host; ``host.machine.Machine`` is the real one."""

    @property
    def backend(self) -> str:
        """How disks become block devices: ``nbd`` or ``fuse``."""

    lost: asyncio.Future[str]
    """Done, with a reason, when the service cannot go on and must be started anew."""

    def workplace(self, mount_id: str) -> Workplace:
        """The mount's own directory; nothing is made yet."""

    def mount_path(self, mount_id: str) -> Path:
        """The directory that the volumes are mounted below."""

    async def open_image(self, repository: Path, path: str) -> Image:
        """Open and check a disk's chain."""

    async def attach(self, images: Sequence[Image], workplace: Workplace, made: list[Attachment]) -> None:
        """Serve all chains of a mount as block devices; each is in ``made`` as soon as it stands."""

    async def discover(
        self, attachment: Attachment, workplace: Workplace, index: int, prefix: str
    ) -> tuple[Volume, ...]:
        """What is on a disk."""

    async def slice(self, volume: Volume, attachment: Attachment, journal: Journal) -> BlockDevice:
        """The block device of one volume."""

    async def mount(self, volume: Volume, device: BlockDevice, where: Path, journal: Journal) -> Mounted:
        """Mount a volume; raises MountRefused."""

    def check_room(self, mounts: int, disks: int) -> None:
        """See whether there is enough for so many mounts with so many disks in all. Raises NoSpace, LimitReached."""

    async def resources(self) -> Resources:
        """What is used and what there is."""

    async def holders(self, mount_ids: Collection[int]) -> list[Holding]:
        """Who outside has files of these mounts open."""

    def sweep(self, live: Collection[str]) -> list[str]:
        """Take away what belongs to no mount of ``live``, at once; sentences about what was found."""

    async def shell(self, terminal: int, *, term: str = "") -> int:
        """Run a root shell among the mounts, on a terminal; its exit status. Raises InvalidOption, LimitReached."""

    async def start_reader(self, mount_id: str) -> Reader:
        """Start the process that will touch the mount's files."""

    async def look(self, repository: Path, function: Callable[[], _T], *, seconds: float | None) -> _T:
        """Run a function that reads a repository's storage, which may never answer. Raises Timeout, Unavailable."""


class SessionVolume:
    """One volume of a session: what was found, and its device and mount while it has them."""

    def __init__(self, machine: Machine, found: Volume, attachment: Attachment, where: Path) -> None:
        self._machine, self._attachment, self._where = machine, attachment, where
        self.found = found
        self.state = found.state
        self.reason = found.reason
        self.device: BlockDevice | None = None
        self.mounted: Mounted | None = None
        self.usage: Usage | None = None
        self.draining: list[BlockDevice] = []
        """Devices that it let go of while somebody abroad still used them."""

    @property
    def name(self) -> str:
        """Its name, the first component of guest paths."""
        return self.found.name

    @property
    def is_ntfs(self) -> bool:
        """Whether its files can have streams, and may be of a kind that cannot be read faithfully."""
        return self.found.filesystem == "ntfs"

    @property
    def display_name(self) -> str:
        """What a person reads, such as ``Partition 2 (100.4 GB, NTFS "Data")``."""
        what = f"Partition {self.found.number}" if self.found.number else "Disk"
        disk, dash, _ = self.name.removeprefix("disk-").partition("-partition-")
        if self.name.startswith("disk-"):
            what = f"Disk {disk}, partition {self.found.number}" if dash else f"Disk {disk}"
        kind = self.found.filesystem.upper() if self.found.filesystem in {"ntfs", "vfat"} else self.found.filesystem
        label = f' "{names.displayable(self.found.label)}"' if self.found.label else ""
        return f"{what} ({self.found.size / 1e9:.1f} GB{', ' if kind or label else ''}{kind}{label})"

    async def mount(self, journal: Journal) -> None:
        """Mount it if it is of a kind that can be; a refusal becomes its state and reason."""
        if self.found.state is not VolumeState.MOUNTABLE:
            return
        try:
            await self._mount(journal)
        except MountRefused as refusal:
            if not (refusal.retry_as_crashed and journal == "replay"):
                self.state, self.reason = refusal.state, refusal.reason
                return
            log.warning("%s: journal not replayed, using it as it is: %s", self.name, refusal.reason)
            try:
                await self._mount("as-crashed")
            except MountRefused as again:
                self.state, self.reason = again.state, again.reason
                return
            self.reason = f"shown as it was at the moment of the backup: {refusal.reason}"

    async def _mount(self, journal: Journal) -> None:
        if self.device is None:  # it still has one when it is mounted again after a refused unmount
            self.device = await self._machine.slice(self.found, self._attachment, journal)
        try:
            self.mounted = await self._machine.mount(self.found, self.device, self._where, journal)
        except MountRefused:
            await self._let_device_go()
            raise
        self.state = VolumeState.MOUNTED

    async def unmount(self) -> None:
        """Raises errors.Busy, and stays mounted, when somebody still uses it."""
        if self.mounted is not None:
            await self.mounted.unmount()
            self.mounted = None
            self.state = VolumeState.MOUNTABLE

    async def close(self) -> None:
        """Give its device back, once it is unmounted. Raises errors.Busy."""
        if self.device is not None:
            await self.device.close()
            self.device = None

    async def _let_device_go(self) -> None:
        """The same, but not waiting for others: the kernel frees it when the last descriptor abroad is closed."""
        try:
            await self.close()
        except errors.Busy as error:
            log.warning("%s: %s", self.name, error)
            if self.device is not None:
                self.draining.append(self.device)
                self.device = None

    def kill(self) -> None:
        """End the process that serves its files, if there is one."""
        if self.mounted is not None:
            self.mounted.kill()

    async def abandon(self) -> None:
        """Let go of mount and device whoever uses them; their server is dead, so users get EIO."""
        if self.mounted is not None:
            await self.mounted.abandon()
            self.mounted = None
            self.state = VolumeState.MOUNTABLE
        await self._let_device_go()
