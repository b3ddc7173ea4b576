"""NBD for real: what the kernel, qemu-nbd and nbd-client do when disks come, go, hang, and are held by others."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import uuid
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sendense_restored import config, errors, linux
from sendense_restored.daemon.host import image as images
from sendense_restored.daemon.host.attach import OPTIONAL_TOOLS, REQUIRED_TOOLS, Attacher, FuseAttachment
from sendense_restored.daemon.host.leftovers import SOURCE
from sendense_restored.daemon.host.loop import LoopDevice
from sendense_restored.daemon.host.machine import Machine
from sendense_restored.daemon.host.nbd import NbdAttachment
from sendense_restored.daemon.host.nbd_node import NbdNode
from sendense_restored.daemon.host.nbd_pool import NbdDevice, Pool
from sendense_restored.daemon.host.process import Tools
from sendense_restored.daemon.host.threads import Threads
from sendense_restored.daemon.host.udev import BlockEvents
from sendense_restored.daemon.host.workplace import Workplace
from sendense_restored.daemon.session import Session, Wish
from sendense_restored.daemon.store import Backup, BackupDisk, Repository
from tests.vm import udev
from tools.lab.children import guarded

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from sendense_restored.daemon.host.attach import Attachment
    from tests.vm.appliance import Appliance
    from tools.lab import guest

PLACE = Path("/run/nbd-tests")
MIB = 1 << 20
SIZE = 8 * MIB
FIRST, SECOND = (MIB, 2 * MIB), (4 * MIB, 3 * MIB)
"""The partitions of the plain disk: where they begin, and their sizes."""
SECONDS = 60
"""Only so that a failing test ends."""


# --- the machine ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def namespace() -> None:
    """A mount namespace as the daemon has one; what the machine mounts later still comes in."""
    if not Path("/sys/module/nbd").exists():
        subprocess.run(["modprobe", "nbd", "nbds_max=16", "max_part=31"], check=True)
    linux.unshare(linux.CLONE_NEWNS)
    linux.mount("none", "/", None, linux.MS_REC | linux.MS_SLAVE)


@pytest.fixture
def settings() -> Iterator[config.Config]:
    assert all(is_free(number) for number in range(4)), "an earlier test has left a device"
    runtime, mounts = PLACE / "runtime", PLACE / "mounts"
    for directory in (runtime, mounts):
        directory.mkdir(parents=True)
        linux.mount(SOURCE, directory, "tmpfs", 0, "size=4m,mode=0711")
    given = {
        "paths": {"runtime": str(runtime)},
        "mounts": {"directory": str(mounts)},
        "attach": {"overlay_size": "64MiB", "timeout": "20s", "nbd_devices": "0-2"},
    }
    yield config.parse(given)
    left = [*runtime.iterdir(), *mounts.iterdir()]
    for directory in (runtime, mounts):
        linux.umount(directory, linux.MNT_DETACH)
    shutil.rmtree(PLACE)
    assert left == []


@pytest.fixture
async def events() -> AsyncIterator[BlockEvents]:
    listening = BlockEvents()
    yield listening
    listening.close()


@pytest.fixture
async def attacher(settings: config.Config, events: BlockEvents) -> AsyncIterator[Attacher]:
    attacher = Attacher(Tools.find(REQUIRED_TOOLS, OPTIONAL_TOOLS), settings, events, Threads())
    assert attacher.backend == "nbd"
    yield attacher
    await attacher.close()


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full backup with two partitions in a GPT, each full of its own byte, and an increment; root's alone."""
    directory = tmp_path_factory.mktemp("disk")
    raw, base, top = (directory / name for name in ("raw", "full.qcow2", "inc.qcow2"))
    with raw.open("wb") as file:
        file.truncate(SIZE)
    table = "label: gpt\n" + "".join(f"start={start // 512},size={size // 512}\n" for start, size in (FIRST, SECOND))
    subprocess.run(["sfdisk", "-q", raw], input=table.encode(), check=True)
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", raw, base], check=True)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", base.name, "-F", "qcow2", top], check=True)
    fill = [f"write -P {byte} {start} {size}" for byte, (start, size) in ((0x11, FIRST), (0x22, SECOND))]
    for command in fill:
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", command, top], check=True, capture_output=True)
    for each in (base, top):
        each.chmod(0o600)
    return top


class Disks:
    """What one mount has attached."""

    def __init__(self, attacher: Attacher, settings: config.Config) -> None:
        self.attacher = attacher
        self.workplace = Workplace(settings.paths.runtime / str(uuid.uuid4()), 64 * MIB)
        self.made: list[Attachment] = []
        self._images: list[images.Image] = []
        self.workplace.make()

    async def attach(self, *paths: Path) -> None:
        self._images += [images.open_chain(path.parent, path.name, depth=8) for path in paths]
        await self.attacher.attach(self._images, self.workplace, self.made)

    @property
    def nbd(self) -> NbdAttachment:
        """The first one."""
        assert isinstance(self.made[0], NbdAttachment)
        return self.made[0]

    @property
    def server(self) -> int:
        assert self.nbd._server is not None
        return guarded(self.nbd._server.pid)

    @property
    def client(self) -> int:
        assert self.nbd._client is not None
        return self.nbd._client.pid

    async def close(self) -> None:
        while self.made:
            await self.made[-1].close()
            self.made.pop()
        while self._images:
            self._images.pop().close()
        self.workplace.close()


@asynccontextmanager
async def attached(attacher: Attacher, settings: config.Config, *paths: Path) -> AsyncIterator[Disks]:
    disks = Disks(attacher, settings)
    try:
        await disks.attach(*paths)
        yield disks
    finally:
        await disks.close()


def is_free(number: int) -> bool:
    directory = Path(f"/sys/block/nbd{number}")
    return not (directory / "pid").exists() and (directory / "size").read_text() == "0\n"


def states(attacher: Attacher) -> list[str]:
    return [each.state for each in attacher.devices()]


async def read(path: Path, count: int, *, offset: int = 0) -> bytes:
    """In a thread, past the cache of earlier reads as far as there is none yet."""

    def reading() -> bytes:
        with path.open("rb", buffering=0) as node:
            node.seek(offset)
            return node.read(count)

    return await asyncio.to_thread(reading)


@asynccontextmanager
async def foreign(number: int, directory: Path, events: BlockEvents) -> AsyncIterator[int]:
    """Another program that uses a device; its process."""
    content = directory / f"foreign-{number}"
    content.write_bytes(b"\x77" * MIB)
    node, sysfs = f"/dev/nbd{number}", Path(f"/sys/block/nbd{number}")
    connecting = await asyncio.create_subprocess_exec("qemu-nbd", "-f", "raw", "-c", node, content)
    assert await connecting.wait() == 0  # it goes on in the background
    assert await events.until(lambda: (sysfs / "size").read_text() == f"{MIB // 512}\n", seconds=SECONDS)
    try:
        yield int((sysfs / "pid").read_text())
    finally:
        disconnecting = await asyncio.create_subprocess_exec(
            "qemu-nbd", "-d", node, stdout=asyncio.subprocess.DEVNULL
        )
        await disconnecting.wait()
        assert await events.until(lambda: is_free(number), seconds=SECONDS)


# --- coming and going -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [20, pytest.param(200, marks=pytest.mark.long)])
async def test_disks_come_and_go_and_nothing_is_left(
    attacher: Attacher, settings: config.Config, disk: Path, rounds: int
) -> None:
    for _ in range(rounds):
        async with attached(attacher, settings, disk) as disks:
            assert states(attacher) == ["ours", "free", "free"]
            device = await disks.nbd.slice(*FIRST, writable=False)
            assert isinstance(device, NbdNode), "the partition's node came late: a loop is in its place"
            assert await read(device.path, 4096) == b"\x11" * 4096
            await device.close()
        assert states(attacher) == ["free"] * 3
        assert is_free(0)


async def test_who_serves_and_connects_has_no_more_than_it_needs(
    attacher: Attacher, settings: config.Config, disk: Path
) -> None:
    async with attached(attacher, settings, disk) as disks:
        uids: set[str] = set()
        for pid, capability in ((disks.server, linux.CAP_DAC_READ_SEARCH), (disks.client, linux.CAP_SYS_ADMIN)):
            status = dict(
                line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
            )
            (uid,) = set(status["Uid"].split())
            assert int(uid) in settings.attach.uids
            assert set(status["Gid"].split()) == {uid}
            uids.add(uid)
            assert {int(status[name], 16) for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {1 << capability}
            assert status["NoNewPrivs"] == "1"
            mounts = Path(f"/proc/{pid}/mountinfo").read_text()
            assert str(settings.paths.runtime) not in mounts
            assert str(settings.mounts.directory) not in mounts
            assert not Path(f"/proc/{pid}/root/dev/nbd9").exists(), "the backup side's devices"
            assert Path(f"/proc/{pid}/root/etc").exists() == (pid == disks.client), "and no file of the host"
        assert len(uids) == 2, "one could end the other, or look into it"
        assert Path("/sys/block/nbd0/pid").read_text() == f"{disks.client}\n"
        assert [each.name for each in disks.workplace.path.iterdir()] == ["nbd0"], "no socket, no overlay"


async def test_a_partition_has_the_kernel_s_node_where_it_agrees_and_a_loop_where_it_does_not(
    attacher: Attacher, settings: config.Config, disk: Path
) -> None:
    async with attached(attacher, settings, disk) as disks:
        expected = {
            (0, SIZE): ("/dev/nbd0", NbdNode),
            FIRST: ("/dev/nbd0p1", NbdNode),
            SECOND: ("/dev/nbd0p2", NbdNode),
            (FIRST[0], FIRST[1] - 512): ("/dev/loop", LoopDevice),
            (FIRST[0] + 512, FIRST[1]): ("/dev/loop", LoopDevice),
        }
        for (start, size), (path, kind) in expected.items():
            device = await disks.nbd.slice(start, size, writable=False)
            assert str(device.path).startswith(path)
            assert isinstance(device, kind)
            whole = await read(Path("/dev/nbd0"), 512, offset=start)
            assert await read(device.path, 512) == whole
            assert (await asyncio.to_thread(device.path.read_bytes))[size - 1 :] != b"", "as long as it was asked for"
            udev.settle()
            assert udev.left_alone(str(device.path)), udev.properties(str(device.path))
            await device.close()


async def test_the_host_leaves_loops_over_an_image_server_alone(
    settings: config.Config, events: BlockEvents, disk: Path
) -> None:
    """The real ones, whose backing file lies in the mount namespace of a server."""
    fuse = replace(
        settings,
        attach=replace(settings.attach, backend="fuse"),
        paths=replace(settings.paths, runtime=Path("/run/sendense-restore/test")),
    )
    attacher = Attacher(Tools.find(REQUIRED_TOOLS, OPTIONAL_TOOLS), fuse, events, Threads())
    fuse.paths.runtime.mkdir()
    try:
        async with attached(attacher, fuse, disk) as disks:
            device = await disks.made[0].slice(*FIRST, writable=False)
            assert isinstance(device, LoopDevice)
            udev.settle()
            assert udev.left_alone(str(device.path)), udev.properties(str(device.path))
            await device.close()
    finally:
        await attacher.close()
        fuse.paths.runtime.rmdir()


async def test_writes_go_to_the_overlay_and_are_counted_and_the_images_stay(
    attacher: Attacher, settings: config.Config, disk: Path
) -> None:
    chain = (disk, disk.parent / "full.qcow2")
    before = [hashlib.sha256(path.read_bytes()).digest() for path in chain]
    async with attached(attacher, settings, disk) as disks:
        device = await disks.nbd.slice(*SECOND, writable=True)
        written = device.sectors_written()

        def write() -> None:
            with device.path.open("r+b", buffering=0) as node:
                node.write(b"\x33" * 4096)
                os.fsync(node.fileno())

        await asyncio.to_thread(write)
        assert device.sectors_written() - written == 8
        assert await read(device.path, 8192) == b"\x33" * 4096 + b"\x22" * 4096
        device.set_read_only(refuse=True)
        with pytest.raises(PermissionError):
            await asyncio.to_thread(write)
        device.set_read_only(refuse=False)
        await asyncio.to_thread(write)
        await device.close()
        refusing = await disks.nbd.slice(*SECOND, writable=False)
        assert refusing.read_only
        with pytest.raises(PermissionError):
            await asyncio.to_thread(write)
        await refusing.close()
        await asyncio.to_thread(write)  # the flag is nobody's any more
    assert [hashlib.sha256(path.read_bytes()).digest() for path in chain] == before


async def test_a_disk_whose_size_is_no_whole_number_of_sectors(
    attacher: Attacher, settings: config.Config, tmp_path: Path
) -> None:
    odd = tmp_path / "odd.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", odd, str(SIZE)], check=True)  # noqa: ASYNC221
    with odd.open("r+b") as file:
        file.seek(24)
        file.write((SIZE - 100).to_bytes(8, "big"))  # field "size" of the header
    async with attached(attacher, settings, odd) as disks:
        device = await disks.nbd.slice(0, disks.nbd.size, writable=False)
        assert device.path == Path("/dev/nbd0")
        await device.close()


# --- others ---------------------------------------------------------------------------------------------------------


async def test_a_device_of_somebody_else_is_skipped_reported_and_left_alone(
    attacher: Attacher, settings: config.Config, disk: Path, events: BlockEvents, tmp_path: Path
) -> None:
    async with foreign(0, tmp_path, events) as pid, attached(attacher, settings, disk) as disks:
        assert states(attacher) == ["foreign", "ours", "free"]
        assert disks.nbd.device.path == Path("/dev/nbd1")
        assert await read(Path("/dev/nbd0"), 512) == b"\x77" * 512
        await disks.close()
        assert Path("/sys/block/nbd0/pid").read_text() == f"{pid}\n"
        assert await read(Path("/dev/nbd0"), 512, offset=4096) == b"\x77" * 512


async def test_a_device_that_somebody_takes_between_look_and_start_is_left_alone(
    attacher: Attacher,
    settings: config.Config,
    disk: Path,
    events: BlockEvents,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    look = Pool._is_free
    monkeypatch.setattr(Pool, "_is_free", lambda self, number: number == 0 or look(self, number))
    async with foreign(0, tmp_path, events), attached(attacher, settings, disk) as disks:
        assert disks.nbd.device.path == Path("/dev/nbd1")
        assert await read(Path("/dev/nbd0"), 512) == b"\x77" * 512
        assert Path("/sys/block/nbd0/size").read_text() == f"{MIB // 512}\n"


@pytest.mark.long
async def test_disks_of_a_backup_get_devices_together_or_go_through_fuse_together(
    attacher: Attacher, settings: config.Config, disk: Path
) -> None:
    async with attached(attacher, settings, disk, disk) as two:
        assert [type(each) for each in two.made] == [NbdAttachment, NbdAttachment]
        assert states(attacher) == ["ours", "ours", "free"]
        async with attached(attacher, settings, disk, disk) as more:
            assert [type(each) for each in more.made] == [FuseAttachment, FuseAttachment]
            device = await more.made[1].slice(*SECOND, writable=False)
            assert await read(device.path, 512) == b"\x22" * 512
            await device.close()
            async with attached(attacher, settings, disk) as last:
                assert last.nbd.device.path == Path("/dev/nbd2")
    async with attached(attacher, settings, disk, disk, disk) as three:
        assert all(isinstance(each, NbdAttachment) for each in three.made)


async def test_nbd_and_nothing_else_is_no_device_when_the_pool_is_empty(
    settings: config.Config, events: BlockEvents, disk: Path
) -> None:
    only = replace(settings, attach=replace(settings.attach, backend="nbd", nbd_devices=range(1)))
    attacher = Attacher(Tools.find(REQUIRED_TOOLS, OPTIONAL_TOOLS), only, events, Threads())
    with pytest.raises(errors.NoDevice):
        async with attached(attacher, only, disk, disk):
            pass
    async with attached(attacher, only, disk):
        pass
    await attacher.close()


# --- death and hanging ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["server", "client", "device"])
async def test_a_killed_program_is_noticed_readers_get_eio_and_the_device_is_freed(
    attacher: Attacher, settings: config.Config, disk: Path, which: str
) -> None:
    async with attached(attacher, settings, disk) as disks:
        device = await disks.nbd.slice(*FIRST, writable=False)
        if which == "device":  # disconnected by somebody who may
            quiet = asyncio.subprocess.DEVNULL
            disconnecting = await asyncio.create_subprocess_exec("qemu-nbd", "-d", "/dev/nbd0", stdout=quiet)
            assert await disconnecting.wait() == 0
        else:
            os.kill(disks.server if which == "server" else disks.client, signal.SIGKILL)
        async with asyncio.timeout(SECONDS):
            assert "ended" in await disks.nbd.lost
        with pytest.raises(OSError, match="Input/output error"):
            await read(device.path, 4096)
        await device.close()
    assert states(attacher) == ["free"] * 3


async def test_a_hung_server_is_eio_in_time_and_the_event_loop_goes_round_meanwhile(
    attacher: Attacher, settings: config.Config, disk: Path
) -> None:
    async with attached(attacher, settings, disk) as disks:
        device, turns = await disks.nbd.slice(*FIRST, writable=False), 0
        patience = disks.nbd.device.sysfs / "queue/io_timeout"
        assert int(patience.read_text()) == 1000 * settings.attach.timeout
        patience.write_text("3000")  # what attach.timeout would be is long for a test and short for a server's start
        os.kill(disks.server, signal.SIGSTOP)
        reading = asyncio.create_task(read(device.path, 4096))
        async with asyncio.timeout(SECONDS):
            while not reading.done():
                await asyncio.wait({reading}, timeout=0.05)
                turns += 1
            with pytest.raises(OSError, match="Input/output error"):
                await reading
            assert turns > 10
            await disks.nbd.lost
        await device.close()
    assert states(attacher) == ["free"] * 3


async def test_a_hung_server_can_be_closed(attacher: Attacher, settings: config.Config, disk: Path) -> None:
    async with attached(attacher, settings, disk) as disks:
        os.kill(disks.server, signal.SIGSTOP)
    assert states(attacher) == ["free"] * 3


async def test_a_stopped_client_can_be_closed(attacher: Attacher, settings: config.Config, disk: Path) -> None:
    """The kernel takes the stop for an interruption of the connection: the disk is gone, and closes as usual.

    Nothing tells of that but the end of the server, whose last connection it was.
    """
    async with attached(attacher, settings, disk) as disks:
        os.kill(disks.client, signal.SIGSTOP)
        async with asyncio.timeout(SECONDS):
            assert "image server ended" in await disks.nbd.lost
    assert states(attacher) == ["free"] * 3


async def test_a_device_that_is_held_abroad_drains_and_is_freed_by_the_kernel_s_event(
    attacher: Attacher, settings: config.Config, disk: Path
) -> None:
    disks = Disks(attacher, settings)
    await disks.attach(disk)
    abroad = os.open("/dev/nbd0p1", os.O_RDONLY | os.O_CLOEXEC)
    disks.nbd.kill()
    left = await disks.nbd.close()
    disks.made.clear()
    assert isinstance(left, NbdDevice)
    assert not left.is_freed()
    assert states(attacher) == ["draining", "free", "free"]
    async with attached(attacher, settings, disk) as others:
        assert others.nbd.device.path == Path("/dev/nbd1")
    freed = asyncio.create_task(left.freed())
    await asyncio.wait({freed}, timeout=0.2)  # the time that a wrong answer has to come
    assert not freed.done()
    os.close(abroad)
    async with asyncio.timeout(SECONDS):
        await freed
    assert is_free(0)
    await disks.close()
    async with attached(attacher, settings, disk) as again:
        assert again.nbd.device.path == Path("/dev/nbd0")


DAEMON = """
import asyncio, sys
from pathlib import Path
from sendense_restored import config, linux
from sendense_restored.daemon.host import image
from sendense_restored.daemon.host.attach import OPTIONAL_TOOLS, REQUIRED_TOOLS, Attacher, Workplace
from sendense_restored.daemon.host.process import Tools
from sendense_restored.daemon.host.threads import Threads
from sendense_restored.daemon.host.udev import BlockEvents
async def main(disk, place):
    linux.unshare(linux.CLONE_NEWNS)
    linux.mount("none", "/", None, linux.MS_REC | linux.MS_SLAVE)
    work = Workplace(place, 64 << 20)
    work.make()
    tools = Tools.find(REQUIRED_TOOLS, OPTIONAL_TOOLS)
    attacher = Attacher(tools, config.Config(), BlockEvents(), Threads())
    made = []
    await attacher.attach([image.open_chain(disk.parent, disk.name, depth=8)], work, made)
    device = await made[0].slice(1 << 20, 2 << 20, writable=True)
    print(made[0]._server.pid, made[0]._client.pid, made[0].device.number, device.path, flush=True)
    await asyncio.Event().wait()
asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2])))
"""


async def test_a_daemon_that_is_killed_leaves_no_program_and_no_device(
    settings: config.Config, events: BlockEvents, disk: Path, tmp_path: Path
) -> None:
    del settings
    daemon = await asyncio.create_subprocess_exec(
        sys.executable, "-c", DAEMON, disk, tmp_path / "work", stdout=asyncio.subprocess.PIPE
    )
    assert daemon.stdout is not None
    guard, client, number, path = (await daemon.stdout.readline()).split()
    assert path.startswith(b"/dev/nbd")
    children = [os.pidfd_open(int(pid)) for pid in (guard, guarded(int(guard)), client)]
    daemon.kill()
    await daemon.wait()
    assert await events.until(lambda: is_free(int(number)), seconds=SECONDS)
    for child in children:
        ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(child, ended.set)
        async with asyncio.timeout(SECONDS):
            await ended.wait()
        asyncio.get_running_loop().remove_reader(child)
        os.close(child)


# --- a whole mount --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chain(appliance: Appliance) -> guest.Chain:
    """File systems with dirty journals, made outside: that takes a minute in here."""
    return appliance.chain


@pytest.fixture
async def host(settings: config.Config, events: BlockEvents) -> AsyncIterator[Machine]:
    machine = await Machine.start(settings, events)
    yield machine
    await machine.close()


def session_of(chain: guest.Chain, host: Machine) -> Session:
    image = chain.backups[-1].image
    disk = BackupDisk(1, 0, str(image), 1, "completed")
    backup = Backup("b", "vm", "r", "full", "completed", None, 1, 1, datetime.now(UTC), None, None, (disk,))
    repository = Repository("r", "r", "local", enabled=True, root=image.parent.parent, immutable=False)
    wish = Wish(backup, repository, (disk,), all_disks=False, journal="replay")
    return Session(str(uuid.uuid4()), wish, host, created_at=0)


async def test_dirty_journals_are_replayed_on_the_kernel_s_nodes_and_the_images_stay_as_they_are(
    chain: guest.Chain, host: Machine
) -> None:
    session = session_of(chain, host)
    await session.build()
    late = chain.backups[-1].journal_only
    found: dict[str, tuple[str, str]] = {}
    for name, volume in session.volumes.items():
        assert volume.mounted is not None, volume.reason
        assert volume.device is not None
        found[name] = (str(volume.device.path), volume.mounted.view)
        descriptor, _ = await session.open((name.encode(), late))
        assert os.read(descriptor, 100) == b"synced, then the power went\n"
        os.close(descriptor)
    assert found == {
        "partition-1": ("/dev/nbd0p1", "replayed"),
        "partition-2": ("/dev/nbd0p2", "replayed"),
        "partition-3": ("/dev/nbd0p3", "replayed"),
    }
    (first, *_) = (await host.resources()).devices
    assert first == ("/dev/nbd0", "ours", session.id)
    await session.close()
    assert [each.state for each in (await host.resources()).devices] == ["free"] * 3
    assert chain.unchanged()


async def test_by_force_the_device_drains_while_a_file_is_open_and_is_freed_with_it(
    chain: guest.Chain, host: Machine
) -> None:
    session = session_of(chain, host)
    await session.build()
    descriptor, _ = await session.open((b"partition-2", b"etc", b"hostname"))
    await session.force()
    assert not session.standing
    (device,) = session.draining
    assert (device.path, device.is_freed()) == (Path("/dev/nbd0"), False)
    (first, *_) = (await host.resources()).devices
    assert first == ("/dev/nbd0", "draining", session.id)
    os.close(descriptor)
    async with asyncio.timeout(SECONDS):
        await device.freed()
    assert is_free(0)


async def test_a_server_that_dies_below_a_mount_fails_it_and_frees_the_device(
    chain: guest.Chain, host: Machine
) -> None:
    session = session_of(chain, host)
    await session.build()
    (attachment,) = session._attachments
    assert isinstance(attachment, NbdAttachment)
    assert attachment._server is not None
    os.kill(guarded(attachment._server.pid), signal.SIGKILL)
    async with asyncio.timeout(SECONDS):
        assert "ended" in await session.lost
    await session.force()
    assert session.draining == []
    assert is_free(0)


async def test_a_hung_server_below_a_mount_does_not_keep_it_from_being_taken_down(
    chain: guest.Chain, host: Machine
) -> None:
    session = session_of(chain, host)
    await session.build()
    (attachment,) = session._attachments
    assert isinstance(attachment, NbdAttachment)
    assert attachment._server is not None
    os.kill(guarded(attachment._server.pid), signal.SIGSTOP)
    async with asyncio.timeout(SECONDS):
        await session.force()
    assert session.draining == []
    assert is_free(0)
