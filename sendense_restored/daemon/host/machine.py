"""The host as a session sees it: the seam between what a mount is and how this kernel makes one.

A session builds its layers through a ``Machine`` and knows nothing of FUSE, loop or NBD. Tests of the bus, the
command line and the sessions themselves put a simulator with the same methods here.
"""

from __future__ import annotations

import asyncio
import logging
import os
import stat
from dataclasses import replace
from typing import TYPE_CHECKING, Self, TypeVar
from weakref import WeakSet

from sendense_restored import errors, linux

from . import attach, filesystem, holders, image, keeper, leftovers, resources, shell, volumes
from .attach import Attacher
from .keeper import Keeper
from .process import Tools
from .readers import Readers
from .resources import Resources
from .threads import Threads
from .workplace import Workplace, remove_forgotten

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from pathlib import Path
    from typing import Literal

    from sendense_restored.config import Config

    from .attach import Attachment
    from .filesystem import Mounted
    from .holders import Holding
    from .image import Image
    from .loop import BlockDevice
    from .reader import Reader
    from .udev import BlockEvents
    from .volumes import Volume

log = logging.getLogger(__name__)

_T = TypeVar("_T")

_REQUIRED = {
    **keeper.REQUIRED_TOOLS,
    **attach.REQUIRED_TOOLS,
    **volumes.REQUIRED_TOOLS,
    **filesystem.REQUIRED_TOOLS,
    **shell.REQUIRED_TOOLS,
}


class Machine:
    """The real one."""

    def __init__(self, config: Config, events: BlockEvents, tools: Tools, keeping: Keeper) -> None:
        self._config, self._events, self._keeper = config, events, keeping
        self._tools = replace(tools, held=keeping.held)
        self._readers = Readers(self._tools, config)
        self._threads = Threads()
        self._attacher = Attacher(self._tools, config, events, self._threads)
        # Those of mounts that are gone leave by themselves; their own way to end is ``close``.
        self._workplaces: WeakSet[Workplace] = WeakSet()
        self._shells = shell.Shells(self._tools, config.mounts.directory)
        self.lost = keeping.lost
        """Done, with a reason, when the daemon cannot go on and must be started anew."""

    @classmethod
    async def start(cls, config: Config, events: BlockEvents) -> Self:
        """Find the programs and start what watches over the mount namespace. Raises process.ToolMissingError."""
        tools = Tools.find(_REQUIRED, (*attach.OPTIONAL_TOOLS, *filesystem.OPTIONAL_TOOLS, *shell.OPTIONAL_TOOLS))
        return cls(config, events, tools, await Keeper.start(tools))

    @property
    def backend(self) -> str:
        """How disks become block devices: ``nbd`` or ``fuse``."""
        return self._attacher.backend

    async def close(self) -> None:
        """End what ``start`` started; everything else must be closed before."""
        await self._shells.close()
        await self._attacher.close()
        await self._keeper.close()

    def check_room(self, mounts: int, disks: int) -> None:
        """See whether there is enough for so many mounts with so many disks in all. Raises NoSpace, LimitReached."""
        resources.check_room(
            mounts,
            disks,
            depth=self._config.image.chain_depth,
            uids_free=self._readers.uids_free,
            overlay_dir=self._config.attach.overlay_dir,
        )

    async def resources(self) -> Resources:
        """What is used and what there is."""
        overlays = [workplace.used() for workplace in self._workplaces]
        used, most = (sum(sizes) for sizes in zip((0, 0), *overlays, strict=True))
        return Resources(
            memory=await asyncio.to_thread(resources.memory, os.getpid()),
            available_memory=resources.available_memory(),
            open_fds=resources.open_fds(),
            fds_limit=resources.fds_limit(),
            overlay_used=used,
            overlay_limit=most,
            uids_free=self._readers.uids_free,
            devices=tuple(self._attacher.devices()),
        )

    async def holders(self, mount_ids: Collection[int]) -> list[Holding]:
        """Who outside has files of these mounts open."""
        ours = {os.getpid(), *self._readers.pids}
        return await asyncio.to_thread(lambda: holders.holders(mount_ids, exclude=ours))

    def sweep(self, live: Collection[str]) -> list[str]:
        """Take away what belongs to no mount of ``live``, at once; sentences about what was found."""
        said = leftovers.sweep(self._config.paths.runtime, self._config.mounts.directory, live)
        if self._config.attach.overlay_dir is not None:
            try:
                owners = {0, *self._config.attach.uids}
                said += remove_forgotten(self._config.attach.overlay_dir, live, owners)
            except OSError as error:
                said.append(f"attach.overlay_dir cannot be looked through: {error}")
        return said

    def workplace(self, mount_id: str) -> Workplace:
        """The mount's own directory; nothing is made yet."""
        attach = self._config.attach
        workplace = Workplace(self._config.paths.runtime / mount_id, attach.overlay_size, attach.overlay_dir)
        self._workplaces.add(workplace)
        return workplace

    def mount_path(self, mount_id: str) -> Path:
        """The directory that the volumes are mounted below."""
        return self._config.mounts.directory / mount_id

    async def open_image(self, repository: Path, path: str) -> Image:
        """Open and check a disk's chain; see ``image.open_chain``."""
        depth, allowed = self._config.image.chain_depth, self._config.image.repositories
        try:
            return await self._threads.run(
                str(repository),
                lambda: image.open_chain(repository, path, depth=depth, allowed=allowed),
                seconds=self._config.attach.timeout,
                discard=image.Image.close,
            )
        except TimeoutError:
            raise errors.Timeout("the repository did not answer in time; check its storage and try again") from None

    async def look(self, repository: Path, function: Callable[[], _T], *, seconds: float | None) -> _T:
        """Run a function that reads a repository's storage. Raises errors.Timeout, Unavailable."""
        try:
            return await self._threads.run(str(repository), function, seconds=seconds)
        except TimeoutError:
            raise errors.Timeout("the repository did not answer in time; check its storage and try again") from None

    async def attach(self, images: Sequence[Image], workplace: Workplace, made: list[Attachment]) -> None:
        """Serve all chains of a mount as block devices; see ``attach.Attacher.attach``."""
        await self._attacher.attach(images, workplace, made)

    async def discover(
        self, attachment: Attachment, workplace: Workplace, index: int, prefix: str
    ) -> tuple[Volume, ...]:
        """What is on a disk; see ``volumes.discover``."""
        device = await attachment.slice(0, attachment.size, writable=False)
        node = workplace.path / f"probe-{index}"
        try:
            # A node of its own lets the probing tools open just this device, without any privilege.
            os.mknod(node, stat.S_IFBLK | 0o400, device.path.stat().st_rdev)
            os.chown(node, self._config.attach.probe_uid, self._config.attach.probe_uid)
            return await volumes.discover(self._tools, self._config, node, attachment.size, prefix=prefix)
        finally:
            node.unlink(missing_ok=True)
            try:
                await device.close()
            except errors.Busy as error:  # the host's own hands; it is freed when they let go
                log.warning("after probing disk %d: %s", index, error)

    async def slice(
        self, volume: Volume, attachment: Attachment, journal: Literal["replay", "as-crashed"]
    ) -> BlockDevice:
        """The block device of one volume."""
        writable = filesystem.needs_writable(volume, journal)
        return await attachment.slice(volume.start, volume.size, writable=writable)

    async def mount(
        self, volume: Volume, device: BlockDevice, where: Path, journal: Literal["replay", "as-crashed"]
    ) -> Mounted:
        """Mount a volume; see ``filesystem.mount``."""
        return await filesystem.mount(self._tools, self._config, volume, device, where, journal=journal)

    async def shell(self, terminal: int, *, term: str = "") -> int:
        """Run a root shell where the mounts are; see ``shell.Shells.run``."""
        return await self._shells.run(terminal, term=term)

    async def start_reader(self, mount_id: str) -> Reader:
        """Start the process that will touch the mount's files."""
        return await self._readers.start(mount_id)


def enter_private_namespace(config: Config) -> None:
    """Give this process a mount namespace of its own, with a tmpfs over each of our two directories.

    Whatever is mounted from here on ends with the last process in the namespace. Mounts that the host makes later
    (a repository on NFS, say) still come in: propagation is one way, MS_SLAVE (mount_namespaces(7)). To be called
    before any thread starts. Raises OSError; EINVAL means that ``/`` is no mount point (a plain chroot), where no
    mount of ours could be kept private.
    """
    linux.unshare(linux.CLONE_NEWNS)
    linux.mount("none", "/", None, linux.MS_REC | linux.MS_SLAVE)
    # The jailed tools of any mount pass through the first, to nodes of their own; nobody but root enters the second,
    # where the guests' files are.
    for directory, mode in ((config.paths.runtime, "0711"), (config.mounts.directory, "0700")):
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        linux.mount(leftovers.SOURCE, directory, "tmpfs", linux.MS_NOSUID | linux.MS_NOEXEC, f"size=4m,mode={mode}")
