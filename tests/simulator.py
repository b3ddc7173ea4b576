"""A host made of directories: the same seam as ``host.machine.Machine``, without root, devices or child processes.

A backup's image is a directory; each directory in it, named ``NUMBER-STATE-FILESYSTEM``, is a volume. Files are
read by the reader's own code, in this process; those of an NTFS as ``Ntfs`` below has it. What a test wants to go
wrong, it says beforehand (``stop_at``, ``refuse``, ``busy``) or does (``Attachment.die``, ``Reader.die``).
``standing`` tells what has been made and not been taken away, and taking away a thing that another one stands on is
an error, as it would be on a real host.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import struct
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from sendense_restored import errors, linux
from sendense_restored.daemon.host.filesystem import MountRefused
from sendense_restored.daemon.host.reader import Stream
from sendense_restored.daemon.host.resources import Resources
from sendense_restored.daemon.host.volumes import Volume, VolumeState
from sendense_restored.daemon.store import DiskFile, Store
from sendense_restored.reader import ntfs, pages, tree
from sendense_restored.reader.outlet import Outlet
from sendense_restored.reader.stream import opened
from tests.records import open_store

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence

    from sendense_restored.daemon.store import Backup
    from sendense_restored.daemon.volume import Machine
    from sendense_restored.reader.protocol import FileInfo, Filters, Listing, Start, StreamEnd, Usage

_T = TypeVar("_T")

BUILD_STEPS = ("workplace", "open_image", "attach", "discover", "slice", "mount", "reader", "give")
"""The steps in which a mount comes to be."""
CLOSE_STEPS = ("take_back", "unmount", "free", "detach", "end reader")
"""Those in which it ends."""


FILES = {"etc/hostname": b"web01\n", "etc/motd": b"welcome\n"}
"""What lies on each volume that ``add_backup`` makes."""


@dataclass
class Reading:
    """A process that has files of a mount open."""

    pid: int = 4242
    uid: int = 1003
    comm: str = "tar"
    count: int = 1


class Gate:
    """Where a step stops, until ``open``."""

    def __init__(self) -> None:
        self.reached, self._opened = asyncio.Event(), asyncio.Event()

    def open(self) -> None:
        self._opened.set()

    async def passed(self) -> None:
        self.reached.set()
        await self._opened.wait()


@dataclass
class Simulator:
    """The host; ``mounts`` is where mount points would be.

    A step is known by its name, and by its name with a volume's or a journal view: ``mount``, ``mount partition-1``,
    ``mount replay``.
    """

    mounts: Path
    backend: str = "fuse"
    standing: set[str] = field(default_factory=set)
    steps: list[str] = field(default_factory=list)
    """What has been tried, by name."""
    refuse: dict[str, BaseException] = field(default_factory=dict)
    """A step raises this."""
    busy: set[str] = field(default_factory=set)
    """Volumes that somebody outside has a file open of: by name, or as ``MOUNT_ID/NAME``."""
    outside: list[Reading] = field(default_factory=list)
    """Who outside has files open, when asked."""
    attachments: list[Attachment] = field(default_factory=list)
    readers: list[Reader] = field(default_factory=list)
    mounted: list[Mounted] = field(default_factory=list)
    things: list[_Thing] = field(default_factory=list)
    swept: list[set[str]] = field(default_factory=list)
    """The mounts that were alive when it was swept."""
    room_asked: list[tuple[int, int]] = field(default_factory=list)
    """For how many mounts and disks room was asked."""
    _gates: dict[str, Gate] = field(default_factory=dict)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    @property
    def machine(self) -> Machine:
        """This, for those who take a host: its things have what a session uses of the real ones, and no more."""
        return cast("Machine", self)

    def power_off(self) -> None:
        """Everything ends at once, as after ``kill -9`` of the daemon: the kernel takes it away."""
        for reader in self.readers:
            reader._close_roots()
            reader._stop_streams()
        for mounted in self.mounted:
            mounted.taken_away()
        self.standing.clear()
        for each in self.things:
            each._bears.clear()
        for directory in self.mounts.iterdir():
            directory.rmdir()

    def stop_at(self, step: str) -> Gate:
        """Have a step wait, from now on, before it does anything."""
        self._gates[step] = Gate()
        return self._gates[step]

    def check(self, step: str, *what: str) -> None:
        """Begin a step that cannot wait."""
        self.steps.append(step)
        for name in (step, *(f"{step} {each}" for each in what)):
            if name in self.refuse:
                raise self.refuse[name]

    async def step(self, step: str, *what: str) -> None:
        """Begin a step."""
        for name in (step, *(f"{step} {each}" for each in what)):
            if name in self._gates:
                await self._gates[name].passed()
        self.check(step, *what)

    def workplace(self, mount_id: str) -> Workplace:
        return Workplace(self, self.mounts.parent / f"work-{mount_id}")

    def mount_path(self, mount_id: str) -> Path:
        return self.mounts / mount_id

    async def open_image(self, repository: Path, path: str) -> Image:
        await self.step("open_image")
        if not (repository / path).is_dir():
            raise errors.ImageRefused(f"{path} is missing; bring it back")
        return Image(self, repository / path)

    async def attach(self, images: Sequence[Image], workplace: Workplace, made: list[Attachment]) -> None:
        for index, image in enumerate(images):
            await self.step("attach", str(index))
            made.append(Attachment(self, image, workplace))

    async def discover(
        self, attachment: Attachment, workplace: Workplace, index: int, prefix: str
    ) -> tuple[Volume, ...]:
        del workplace
        await self.step("discover", str(index))
        found = []
        for number, directory in enumerate(attachment.volumes, start=1):
            name = f"{prefix}-partition-{number}" if prefix else f"partition-{number}"
            _, state, filesystem = directory.name.split("-")
            mountable = VolumeState(state) is VolumeState.MOUNTABLE
            reason = "" if mountable else f"the simulator says {state}"
            found.append(Volume(name, number, number, number << 20, filesystem, "", "", VolumeState(state), reason))
        return tuple(found)

    async def slice(self, volume: Volume, attachment: Attachment, journal: str) -> Device:
        await self.step("slice", volume.name, journal)
        return Device(self, attachment, volume)

    async def mount(self, volume: Volume, device: Device, where: Path, journal: str) -> Mounted:
        await self.step("mount", volume.name, journal)
        return Mounted(self, volume.name, device, where, "clean" if journal == "replay" else "as-crashed")

    async def look(self, repository: Path, function: Callable[[], _T], *, seconds: float | None) -> _T:
        del repository, seconds
        return function()

    def check_room(self, mounts: int, disks: int) -> None:
        self.room_asked.append((mounts, disks))
        self.check("room")

    async def holders(self, mount_ids: Collection[int]) -> list[Reading]:
        del mount_ids
        return self.outside

    async def resources(self) -> Resources:
        return Resources(1 << 20, 1 << 30, open_fds=10, fds_limit=1024, overlay_used=0, overlay_limit=0, uids_free=60)

    def sweep(self, live: Collection[str]) -> list[str]:
        self.swept.append(set(live))
        return []

    async def shell(self, terminal: int, *, term: str = "") -> int:
        del term
        return 0 if os.isatty(terminal) else 1

    async def start_reader(self, mount_id: str) -> Reader:
        await self.step("reader")
        self.readers.append(Reader(self, mount_id))
        return self.readers[-1]


class _Thing:
    """Something that stands, on others maybe, until it is taken away."""

    def __init__(self, simulator: Simulator, what: str, *on: _Thing) -> None:
        self.simulator = simulator
        self.what = f"{what} {next(simulator._numbers)}"
        self._on = on
        self._bears: set[str] = set()
        simulator.standing.add(self.what)
        simulator.things.append(self)
        for each in on:
            each._bears.add(self.what)

    @property
    def stands(self) -> bool:
        return self.what in self.simulator.standing

    def gone(self) -> None:
        """Take it away; again is nothing."""
        if self._bears:
            raise AssertionError(f"{self.what} is taken away below {', '.join(sorted(self._bears))}")
        self.simulator.standing.discard(self.what)
        for each in self._on:
            each._bears.discard(self.what)


class Workplace:
    def __init__(self, simulator: Simulator, path: Path) -> None:
        self.path, self._simulator = path, simulator
        self.thing: _Thing | None = None

    def make(self) -> None:
        self._simulator.check("workplace")
        self.thing = _Thing(self._simulator, "workplace")

    def close(self) -> None:
        self._simulator.check("leave workplace")
        if self.thing:
            self.thing.gone()


class Layer(NamedTuple):
    path: str


class Image(_Thing):
    def __init__(self, simulator: Simulator, path: Path) -> None:
        super().__init__(simulator, "image")
        self.path = path
        self.virtual_size = 1 << 30
        self.layers = [Layer(f"{path.parent.name}/{path.name}")]

    def close(self) -> None:
        self.gone()


class Attachment(_Thing):
    def __init__(self, simulator: Simulator, image: Image, workplace: Workplace) -> None:
        assert workplace.thing is not None
        super().__init__(simulator, "attachment", image, workplace.thing)
        self.volumes = sorted(image.path.iterdir())
        self.size = 1 << 30
        self.dead = False
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        simulator.attachments.append(self)

    def kill(self) -> None:
        """The server's end; as nobody closes the attachment yet, it counts as lost."""
        self.die("the image server ended unexpectedly")

    def die(self, reason: str) -> None:
        self.dead = True
        if not self.lost.done():
            self.lost.set_result(reason)

    async def close(self) -> None:
        await self.simulator.step("detach")
        self.gone()
        self.lost.cancel()


class Device(_Thing):
    read_only = True

    def __init__(self, simulator: Simulator, attachment: Attachment, volume: Volume) -> None:
        super().__init__(simulator, "device", attachment)
        self.attachment = attachment
        self.directory = self.path = attachment.volumes[volume.number - 1]
        self.in_use = False
        self._freed = asyncio.Event()

    def sectors_written(self) -> int:
        return 0

    async def close(self) -> None:
        await self.simulator.step("free")
        self.gone()
        if self.in_use:  # as with a loop: it is let go of, and the last user clears it
            raise errors.Busy("the device is still in use; it is freed when its last user lets go")

    def let_go(self) -> None:
        """The last user outside closes it."""
        self.in_use = False
        self._freed.set()

    async def freed(self) -> None:
        await self._freed.wait()


class Mounted(_Thing):
    driver = "simulated"

    def __init__(self, simulator: Simulator, name: str, device: Device, where: Path, view: str) -> None:
        super().__init__(simulator, "mount", device)
        where.mkdir()
        self.name, self.path, self.view = name, where, view
        self._device = device
        self.root = self._open_root()
        self.mount_id = linux.mount_id(self.root)
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        simulator.mounted.append(self)

    @property
    def _busy(self) -> bool:
        return not self.simulator.busy.isdisjoint({self.name, f"{self.path.parent.name}/{self.name}"})

    def _open_root(self) -> int:
        return os.open(self._device.directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    async def unmount(self) -> None:
        await self.simulator.step("unmount", self.name)
        if any(
            self.name in reader.roots for reader in self.simulator.readers if reader.mount == self.path.parent.name
        ):
            raise AssertionError("unmounted while the reader holds the root")
        if self._busy:
            # Trying takes the daemon's own root away, so there is a new one afterwards.
            os.close(self.root)
            self.root = self._open_root()
            raise errors.Busy(f"{self.name} is in use; close its files and try again")
        self._end()

    def kill(self) -> None:
        self.simulator.steps.append(f"kill {self.name}")

    async def abandon(self) -> None:
        await self.simulator.step("abandon", self.name)
        self._device.in_use = self._busy
        self._end()

    def taken_away(self) -> None:
        """By the kernel."""
        if self.stands:
            os.close(self.root)
            self.path.rmdir()

    def _end(self) -> None:
        if self.stands:
            os.close(self.root)
            self.path.rmdir()
            self.lost.cancel()
            self.gone()


class Ntfs(ntfs.Ntfs):
    """A directory as if ntfs-3g served it: ``a:b`` beside ``a`` is its stream ``b``, and ``a.efs`` is encrypted.

    A link to ``unsupported reparse tag 0x80000013`` looks as a reparse point does.
    """

    def _attribute(self, descriptor: int, name: str) -> bytes:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if name == "system.ntfs_attrib_be":
            return struct.pack(">I", 0x4020 if path.suffix == ".efs" else 0x20)
        assert name == "ntfs.streams.list"
        beside = sorted(os.fsencode(each.name) for each in path.parent.iterdir())
        own = os.fsencode(path.name) + b":"
        return b"\0".join(each.removeprefix(own) for each in beside if each.startswith(own))

    def is_stream_of(self, status: os.stat_result, owner: os.stat_result) -> bool:
        return status.st_dev == owner.st_dev


class Reader(_Thing):
    pid, uid = 1, 61000

    def __init__(self, simulator: Simulator, mount: str) -> None:
        super().__init__(simulator, f"reader of {mount}")
        self.mount = mount
        self.roots: dict[str, int] = {}
        self.ntfs: dict[str, Ntfs] = {}
        self.outlets: list[Outlet] = []
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def die(self, reason: str) -> None:
        self._stop_streams()
        self._close_roots()
        if not self.lost.done():
            self.lost.set_result(reason)

    def _stop_streams(self) -> None:
        while self.outlets:
            self.outlets.pop().stop()

    def _close_roots(self) -> None:
        while self.roots:
            os.close(self.roots.popitem()[1])

    def _stream_ended(self, end: asyncio.Future[StreamEnd], result: StreamEnd) -> None:
        died = self.lost.done() and not self.lost.cancelled()  # before it could say what came of it
        _settle(
            end, result, errors.Unavailable("the process that reads this mount's files has stopped") if died else None
        )

    def _check(self) -> None:
        if self.lost.done():
            raise errors.Unavailable("the process that reads this mount's files has stopped; unmount and mount again")

    async def give(
        self, roots: Mapping[str, int], *, ntfs: Collection[str] = (), directory: str = ""
    ) -> dict[str, Usage]:
        await self.simulator.step("give")
        self._check()
        self._close_roots()
        self.roots = {name: os.dup(root) for name, root in roots.items()}
        self.ntfs = {name: Ntfs(f"{directory}/{name}") for name in ntfs}
        return {name: tree.usage(root) for name, root in self.roots.items()}

    async def take_back(self) -> None:
        await self.simulator.step("take_back")
        self._stop_streams()
        self._close_roots()

    async def list(self, volume: str, path: tuple[bytes, ...], *, limit: int, cursor: str) -> Listing:
        await self.simulator.step("list")
        self._check()
        special = self.ntfs.get(volume)
        return pages.list_directory(
            self.roots[volume], path, limit=limit, cursor=cursor, check=lambda: None, ntfs=special
        )

    async def stream(self, starts: Sequence[Start], filters: Filters, out: int, *, stall: float) -> Stream:
        """The reader's own walk, in a thread."""
        await self.simulator.step("stream")
        self._check()
        loop = asyncio.get_running_loop()
        begun: asyncio.Future[None] = loop.create_future()
        end: asyncio.Future[StreamEnd] = loop.create_future()
        outlet = Outlet(os.dup(out), stall=stall)
        roots = {name: os.dup(root) for name, root in self.roots.items()}

        def walk() -> None:
            try:
                lend = contextlib.nullcontext
                with (
                    outlet,
                    opened(starts, filters, lambda volume: lend(roots[volume]), outlet, self.ntfs) as walking,
                ):
                    loop.call_soon_threadsafe(_settle, begun, None, None)
                    result = walking.run()
                loop.call_soon_threadsafe(self._stream_ended, end, result)
            except errors.RestoreError as error:
                loop.call_soon_threadsafe(_settle, begun, None, error)
            finally:
                for root in roots.values():
                    os.close(root)

        self.outlets.append(outlet)
        threading.Thread(target=walk).start()
        try:
            await begun
        except BaseException:
            outlet.stop()
            raise
        return Stream(end, outlet.stop)

    async def stat(self, volume: str, path: tuple[bytes, ...]) -> FileInfo:
        self._check()
        return tree.stat(self.roots[volume], path, ntfs=self.ntfs.get(volume))

    async def open(
        self, volume: str, path: tuple[bytes, ...], *, stream: bytes = b"", most: int | None = None
    ) -> tuple[int, FileInfo]:
        self._check()
        return tree.open_file(self.roots[volume], path, stream=stream, most=most, ntfs=self.ntfs.get(volume))

    async def close(self) -> None:
        await self.simulator.step("end reader")
        self._stop_streams()
        self._close_roots()
        self.lost.cancel()
        self.gone()


@contextlib.asynccontextmanager
async def house(directory: Path, catalog_url: str | None = None) -> AsyncIterator[tuple[Simulator, Store]]:
    """A host, and a database with a repository ``main``, both below ``directory``; nothing may stand at the end.

    With a ``catalog_url``, what is in the catalogue is for the caller to see to.
    """
    repository, mounts = directory / "repository", directory / "mounts"
    repository.mkdir()
    mounts.mkdir()
    simulator = Simulator(mounts)
    async with await open_store(f"sqlite:///{directory}/restore.db", catalog_url) as store:
        if catalog_url is None:
            await store.add_repository("main", str(repository))
        yield simulator, store
    assert not simulator.standing
    assert not list(mounts.iterdir())


async def add_backup(
    store: Store,
    backup_id: str,
    disks: tuple[tuple[str, ...], ...] = (("mountable-ext4",),),
    *,
    vm_name: str = "web",
) -> Backup:
    """Put a backup into the repository ``main``; each disk is its volumes, ``STATE-FILESYSTEM``."""
    files = make_images((await store.repository("main")).root, backup_id, disks)
    return await store.add_backup("main", vm_name, files, backup_id=backup_id)


def make_images(root: Path, backup_id: str, disks: tuple[tuple[str, ...], ...]) -> list[DiskFile]:
    """The images of a backup, below the directory of its repository."""
    files = []
    for index, volumes in enumerate(disks):
        image = root / backup_id / f"disk{index}"
        image.mkdir(parents=True)
        for number, volume in enumerate(volumes, start=1):
            directory = image / f"{number}-{volume}"
            directory.mkdir()
            for path, content in FILES.items() if volume.startswith("mountable") else ():
                (directory / path).parent.mkdir(exist_ok=True)
                (directory / path).write_bytes(content)
        files.append(DiskFile(index, f"{backup_id}/disk{index}", 1 << 30))
    return files


def _settle(future: asyncio.Future[Any], result: object, error: Exception | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)


def refused(*, retry_as_crashed: bool = False) -> MountRefused:
    """What a file system driver says to a volume that it does not like."""
    return MountRefused(VolumeState.DAMAGED, "the driver does not like it", retry_as_crashed=retry_as_crashed)
