"""Mounting and unmounting with this kernel and the real programs, on images made here.

A dirty journal is made as a snapshot of a running machine makes one: the image is copied while it is mounted, after
an fsync that so far has reached the journal only.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sendense_restored import errors, linux
from sendense_restored.config import Config, parse
from sendense_restored.daemon.host import filesystem, mountinfo
from sendense_restored.daemon.host.filesystem import MountRefused
from sendense_restored.daemon.host.process import ToolError, Tools
from sendense_restored.daemon.host.signatures import VolumeState
from sendense_restored.daemon.host.volumes import Volume

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sendense_restored.daemon.host.filesystem import Mounted
    from sendense_restored.daemon.host.policy import Journal
    from sendense_restored.daemon.host.process import Completed, Jail

MIB = 1 << 20
SIZES = {"xfs": 320 * MIB, "btrfs": 128 * MIB}
PLACE = Path("/run/filesystem")
WHERE = PLACE / "m"
JOURNALING = ("ext3", "ext4", "xfs", "btrfs")


@dataclass(frozen=True)
class Loop:
    """The device of a volume, as ``attach`` gives one."""

    path: Path
    read_only: bool

    def set_read_only(self, *, refuse: bool) -> None:
        run("blockdev", "--setro" if refuse else "--setrw", self.path)

    def sectors_written(self) -> int:
        return int(Path("/sys/block", self.path.name, "stat").read_text(encoding="ascii").split()[6])

    def is_freed(self) -> bool:
        raise AssertionError

    async def freed(self) -> None:
        raise AssertionError

    async def close(self) -> None:
        raise AssertionError("the device is not the file system's to close")

    @property
    def bound(self) -> bool:
        return Path("/sys/block", self.path.name, "loop").exists()


def run(*command: str | Path) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def place() -> Iterator[Path]:
    """Goes away with everything in it, so that one failed test does not make the others fail."""
    PLACE.mkdir()
    linux.mount("tmpfs", PLACE, "tmpfs")
    yield PLACE
    linux.umount(PLACE, linux.MNT_DETACH)
    PLACE.rmdir()


@pytest.fixture
def attach(place: Path) -> Iterator[Callable[..., Loop]]:
    """Makes loop devices, and checks at the end that each is free at once when it is given back."""
    assert place.is_dir()
    loops: list[Loop] = []

    def make(image: Path, *, read_only: bool = False) -> Loop:
        options = ("--read-only",) if read_only else ()
        loops.append(Loop(Path(run("losetup", "--find", "--show", *options, image).strip()), read_only))
        return loops[-1]

    yield make
    for loop in loops:
        run("losetup", "--detach", loop.path)
    assert [loop.path for loop in loops if loop.bound] == []


@pytest.fixture
def tools() -> Tools:
    return Tools.find(filesystem.REQUIRED_TOOLS, filesystem.OPTIONAL_TOOLS)


@contextlib.contextmanager
def written(image: Path, kind: str) -> Iterator[Path]:
    """The file system in ``image``, mounted for writing as its own machine would have it."""
    inside = image.with_name("inside")
    inside.mkdir()
    run(*(("ntfs-3g",) if kind == "ntfs" else ("mount", "-o", "loop")), image, inside)
    try:
        yield inside
    finally:
        run("umount", inside)
        inside.rmdir()


def make(kind: str, image: Path) -> Path:
    """An image with a file ``hello``."""
    with image.open("wb") as file:
        file.truncate(SIZES.get(kind, 32 * MIB))
    if kind in {"squashfs", "iso9660"}:
        tree = image.with_name("tree")
        tree.mkdir()
        (tree / "hello").write_text("world", encoding="ascii")
        image.unlink()
        if kind == "squashfs":
            run("mksquashfs", tree, image, "-quiet")
        else:
            run("genisoimage", "-quiet", "-o", image, tree)
        return image
    run(*{"ntfs": ("mkntfs", "-q", "-F"), "btrfs": ("mkfs.btrfs", "-q")}.get(kind, (f"mkfs.{kind}",)), image)
    if kind not in {"vfat", "exfat"}:
        with written(image, kind) as inside:
            (inside / "hello").write_text("world", encoding="ascii")
    return image


def make_dirty(kind: str, image: Path) -> Path:
    """An image with ``hello``, and a file ``late`` that is in the journal only."""
    clean = make(kind, image.with_name("running.img"))
    with written(clean, kind) as inside:
        os.sync()
        with (inside / "late").open("wb") as file:
            file.write(b"journal")
            file.flush()
            os.fsync(file.fileno())
        shutil.copyfile(clean, image)
    return image


def volume(kind: str, image: Path) -> Volume:
    return Volume("disk", 0, 0, image.stat().st_size, kind, "", "", VolumeState.MOUNTABLE, "")


def checksum(image: Path) -> str:
    with image.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


async def mount(
    tools: Tools, kind: str, loop: Loop, *, journal: Journal = "replay", where: Path = WHERE, seconds: float = 20
) -> Mounted:
    config = parse({"attach": {"timeout": seconds}})
    image = Path(Path("/sys/block", loop.path.name, "loop/backing_file").read_text(encoding="utf-8").strip())
    return await filesystem.mount(tools, config, volume(kind, image), loop, where, journal=journal)


def read(mounted: Mounted, name: str) -> bytes:
    descriptor = linux.openat2(mounted.root, name.encode(), os.O_RDONLY, resolve=linux.RESOLVE_IN_ROOT)
    with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor
        return file.read()


# --- the view


@pytest.mark.parametrize("kind", ["ext2", *JOURNALING, "squashfs", "ntfs"])
async def test_what_was_left_cleanly_is_clean_and_stays_as_it_was(
    attach: Callable[..., Loop], tools: Tools, kind: str
) -> None:
    image = make(kind, PLACE / "disk.img")
    before = checksum(image)
    loop = attach(image)
    mounted = await mount(tools, kind, loop)
    try:
        assert mounted.view == "clean"
        assert read(mounted, "hello") == b"world"
        found = mountinfo.mounted_on(WHERE)
        assert found is not None
        assert found.id == mounted.mount_id == linux.mount_id(mounted.root)
        assert found.options >= {"ro", "nodev", "nosuid", "noexec"}
        assert "ro" in found.super_options
        assert run("blockdev", "--getro", loop.path).strip() == "0"
    finally:
        await mounted.unmount()
    assert not WHERE.exists()
    assert mounted.root == -1
    if kind != "xfs":  # which closes its log once more when it is unmounted from a device that is writable by then
        assert checksum(image) == before


@pytest.mark.parametrize("kind", JOURNALING)
async def test_a_dirty_journal_is_replayed(attach: Callable[..., Loop], tools: Tools, kind: str) -> None:
    mounted = await mount(tools, kind, attach(make_dirty(kind, PLACE / "disk.img")))
    try:
        assert mounted.view == "replayed"
        assert read(mounted, "late") == b"journal"
    finally:
        await mounted.unmount()


@pytest.mark.parametrize("kind", JOURNALING)
async def test_as_crashed_leaves_the_journal_and_the_image_alone(
    attach: Callable[..., Loop], tools: Tools, kind: str
) -> None:
    image = make_dirty(kind, PLACE / "disk.img")
    before = checksum(image)
    mounted = await mount(tools, kind, attach(image, read_only=True), journal="as-crashed")
    try:
        assert mounted.view == "as-crashed"
        with pytest.raises(FileNotFoundError):
            read(mounted, "late")
    finally:
        await mounted.unmount()
    assert checksum(image) == before


def unclean_log() -> bytes:
    """Two restart pages of an NTFS log in use, as Windows leaves them when it is not shut down."""
    header = struct.pack("<4sHHQIIHHH", b"RSTR", 0x1E, 9, 0, 4096, 4096, 0x30, 1, 1)
    area = struct.pack("<QHHHHIHHQIHHI", 0x107DED, 1, 0xFFFF, 0, 0, 45, 224, 64, 2 * MIB, 0x70, 0x30, 0x40, 1)
    client = struct.pack("<QQHHH6xI128s", 0x107DE2, 0x107DED, 0xFFFF, 0xFFFF, 0, 8, "NTFS".encode("utf-16-le"))
    page = bytearray(4096)
    page[: len(header)] = header
    page[0x30 : 0x30 + len(area)] = area
    page[0x70 : 0x70 + len(client)] = client
    # The update sequence: its number stands at the end of each sector, and what stood there is kept beside it (zero).
    struct.pack_into("<H", page, 0x1E, 1)
    for sector in range(8):
        struct.pack_into("<H", page, sector * 512 + 510, 1)
    return bytes(page) * 2


async def test_an_ntfs_whose_log_was_not_closed_is_as_crashed(attach: Callable[..., Loop], tools: Tools) -> None:
    image = make("ntfs", PLACE / "disk.img")
    log = int(run("ntfscluster", "-q", "-I", "2", image).split()[-2]) * 4096
    with image.open("r+b") as file:
        file.seek(log)
        file.write(unclean_log())
    before = checksum(image)
    mounted = await mount(tools, "ntfs", attach(image))
    try:
        assert mounted.view == "as-crashed"
        assert read(mounted, "hello") == b"world"
    finally:
        await mounted.unmount()
    assert checksum(image) == before


async def test_the_ntfs_of_a_hibernated_windows_is_as_crashed(attach: Callable[..., Loop], tools: Tools) -> None:
    image = make("ntfs", PLACE / "disk.img")
    with written(image, "ntfs") as inside:
        (inside / "hiberfil.sys").write_bytes(b"hibr" + bytes(8192))
    mounted = await mount(tools, "ntfs", attach(image))
    try:
        assert mounted.view == "as-crashed"
        assert read(mounted, "hello") == b"world"
    finally:
        await mounted.unmount()


async def test_a_read_only_device_gives_an_ntfs_as_crashed(attach: Callable[..., Loop], tools: Tools) -> None:
    image = make("ntfs", PLACE / "disk.img")
    mounted = await mount(tools, "ntfs", attach(image, read_only=True), journal="as-crashed")
    assert mounted.view == "as-crashed"
    await mounted.unmount()


@pytest.fixture
def full_copy(place: Path) -> Iterator[Callable[[Path], Path]]:
    """Copies an image to where, as in an overlay that is used up, no write finds a new block.

    The copy shares its blocks with another file, so each write needs one; reading goes on.
    """
    small, inside = place / "small.img", place / "small"
    with small.open("wb") as file:
        file.truncate(3 * SIZES["xfs"])
    run("mkfs.xfs", "-m", "reflink=1", small)
    inside.mkdir()
    run("mount", "-o", "loop", small, inside)

    def copy(image: Path) -> Path:
        shutil.copyfile(image, inside / "first")
        run("cp", "--reflink=always", inside / "first", inside / "second")
        os.sync()
        with (inside / "rest").open("wb") as rest:
            for step in (16 * MIB, MIB, 65536, 4096):
                with contextlib.suppress(OSError):
                    while True:
                        os.posix_fallocate(rest.fileno(), os.fstat(rest.fileno()).st_size, step)
        assert os.statvfs(inside).f_bavail < 8  # which is less than a write asks for
        return inside / "second"

    yield copy
    run("umount", inside)


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
async def test_without_room_to_replay_as_crashed_is_left(
    full_copy: Callable[[Path], Path], attach: Callable[..., Loop], tools: Tools, kind: str
) -> None:
    """XFS would try for ever, in a process that nobody can kill, were it not told to give up."""
    full = full_copy(make_dirty(kind, PLACE / "dirty.img"))
    with pytest.raises(MountRefused) as refusal:
        await mount(tools, kind, attach(full))
    assert refusal.value.state == VolumeState.DAMAGED
    assert refusal.value.retry_as_crashed
    assert not WHERE.exists()
    mounted = await mount(tools, kind, attach(full, read_only=True), journal="as-crashed")
    assert read(mounted, "hello") == b"world"
    await mounted.unmount()


# --- what cannot be mounted


def kernel_has(driver: str) -> bool:
    if f"\t{driver}\n" in Path("/proc/filesystems").read_text(encoding="ascii"):
        return True
    modprobe = shutil.which("modprobe")
    return modprobe is not None and subprocess.run([modprobe, "-q", "-n", driver], check=False).returncode == 0


@pytest.mark.parametrize("kind", ["vfat", "exfat", "iso9660"])
async def test_a_driver_that_the_kernel_lacks_is_named(attach: Callable[..., Loop], tools: Tools, kind: str) -> None:
    loop = attach(make(kind, PLACE / "disk.img"), read_only=kind == "iso9660")
    if kernel_has({"iso9660": "isofs"}.get(kind, kind)) or kernel_has(kind):
        mounted = await mount(tools, kind, loop)
        assert (mounted.driver, mounted.view) == (kind, "clean")
        await mounted.unmount()
        return
    with pytest.raises(MountRefused) as refusal:
        await mount(tools, kind, loop)
    assert refusal.value.state == VolumeState.UNSUPPORTED
    assert f"no driver for {kind}" in refusal.value.reason
    assert not refusal.value.retry_as_crashed
    assert not WHERE.exists()


# The group descriptors, superblocks, and the first records of the MFT (by mkntfs in the fourth cluster).
@pytest.mark.parametrize(("kind", "at"), [("ext4", 2048), ("xfs", 0), ("btrfs", 65536), ("ntfs", 16384)])
async def test_a_damaged_file_system_is_refused_and_nothing_is_left(
    attach: Callable[..., Loop], tools: Tools, kind: str, at: int
) -> None:
    image = make(kind, PLACE / "disk.img")
    with image.open("r+b") as file:
        file.seek(at)
        file.write(b"\xa5" * 8192)
    loop = attach(image)
    with pytest.raises(MountRefused) as refusal:
        await mount(tools, kind, loop)
    assert refusal.value.state == VolumeState.DAMAGED
    assert "restore the whole disk and repair a copy of it" in refusal.value.reason
    assert not WHERE.exists()
    assert run("blockdev", "--getro", loop.path).strip() == "0"


@pytest.fixture
def hanging(tools: Tools, place: Path) -> Tools:
    """A mount(8) that never ends."""
    program = place / "mount"
    program.write_text("#!/bin/sh\nexec sleep infinity\n", encoding="ascii")
    program.chmod(0o755)
    return Tools({**tools.paths, "mount": str(program)})


async def test_a_mount_that_hangs_is_given_up(attach: Callable[..., Loop], hanging: Tools) -> None:
    loop = attach(make("ext4", PLACE / "disk.img"))
    with pytest.raises(MountRefused, match="did not finish in time"):
        await mount(hanging, "ext4", loop, seconds=0.3)
    assert not WHERE.exists()


async def test_a_mount_can_be_cancelled(attach: Callable[..., Loop], hanging: Tools) -> None:
    loop = attach(make("ext4", PLACE / "disk.img"))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):  # long before the deadline of the mount itself
            await mount(hanging, "ext4", loop)
    assert not WHERE.exists()
    assert run("blockdev", "--getro", loop.path).strip() == "0"


async def test_an_ntfs_3g_that_dies_while_it_starts_is_no_mount(
    attach: Callable[..., Loop], tools: Tools, place: Path
) -> None:
    program = place / "ntfs-3g"
    program.write_text("#!/bin/sh\necho broken >&2\nexit 13\n", encoding="ascii")
    program.chmod(0o755)
    loop = attach(make("ntfs", PLACE / "disk.img"))
    with pytest.raises(MountRefused, match="the NTFS is damaged"):
        await mount(Tools({**tools.paths, "ntfs-3g": str(program)}), "ntfs", loop)
    assert not WHERE.exists()


# --- the end


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "ntfs"])
async def test_an_open_file_makes_unmount_busy_and_the_mount_goes_on(
    attach: Callable[..., Loop], tools: Tools, kind: str
) -> None:
    mounted = await mount(tools, kind, attach(make(kind, PLACE / "disk.img")))
    holder = os.open("hello", os.O_RDONLY, dir_fd=mounted.root)
    try:
        with pytest.raises(errors.Busy, match="still open"):
            await mounted.unmount()
        assert read(mounted, "hello") == b"world"
        assert linux.mount_id(mounted.root) == mounted.mount_id
        assert not mounted.lost.done()
    finally:
        os.close(holder)
        await mounted.unmount()
    assert mountinfo.mounted_on(WHERE) is None
    assert not WHERE.exists()


@pytest.mark.parametrize("kind", ["ext4", "ntfs"])
async def test_by_force_a_mount_ends_under_an_open_file(attach: Callable[..., Loop], tools: Tools, kind: str) -> None:
    mounted = await mount(tools, kind, attach(make(kind, PLACE / "disk.img")))
    holder = os.open("hello", os.O_RDONLY, dir_fd=mounted.root)
    try:
        await mounted.abandon()
        await mounted.abandon()
        assert mountinfo.mounted_on(WHERE) is None
        assert not WHERE.exists()
        assert mounted.lost.cancelled()
        if kind == "ntfs":  # nobody serves it any more
            with pytest.raises(OSError, match=r"\[Errno (107|103|5)\]"):
                os.pread(holder, 4096, 0)
    finally:
        with contextlib.suppress(OSError):  # closing is one more request that nobody answers
            os.close(holder)


async def test_unmounting_again_does_nothing(attach: Callable[..., Loop], tools: Tools) -> None:
    mounted = await mount(tools, "ext4", attach(make("ext4", PLACE / "disk.img")))
    await mounted.unmount()
    await mounted.unmount()
    await mounted.abandon()


async def test_the_death_of_ntfs_3g_is_news(attach: Callable[..., Loop], tools: Tools) -> None:
    mounted = await mount(tools, "ntfs", attach(make("ntfs", PLACE / "disk.img")))
    (pid,) = (int(path.parent.name) for path in Path("/proc").glob("[0-9]*/comm") if serves(path, mounted))
    os.kill(pid, 9)
    async with asyncio.timeout(60):
        assert "mount the backup again" in await mounted.lost
    await mounted.unmount()
    assert not WHERE.exists()


def serves(comm: Path, mounted: Mounted) -> bool:
    try:
        arguments = comm.with_name("cmdline").read_bytes()
        return comm.read_text(encoding="utf-8") == "ntfs-3g\n" and os.fsencode(mounted.path) in arguments
    except FileNotFoundError:
        return False


async def test_a_named_stream_of_an_ntfs_is_opened_as_windows_writes_it(
    attach: Callable[..., Loop], tools: Tools
) -> None:
    image = make("ntfs", PLACE / "disk.img")
    with written(image, "ntfs") as inside:
        os.setxattr(inside / "hello", "user.note", b"beside it")  # how ntfs-3g makes one by default
    mounted = await mount(tools, "ntfs", attach(image))
    try:
        assert read(mounted, "hello:note") == b"beside it"
    finally:
        await mounted.unmount()


async def test_a_reader_with_another_uid_may_read_an_ntfs(attach: Callable[..., Loop], tools: Tools) -> None:
    mounted = await mount(tools, "ntfs", attach(make("ntfs", PLACE / "disk.img")))
    try:
        reader = await asyncio.create_subprocess_exec(
            *("setpriv", f"--reuid={Config().readers.uids[0]}", "--clear-groups", "--inh-caps=-all"),
            *("cat", f"/proc/self/fd/{mounted.root}/hello"),
            stdout=asyncio.subprocess.PIPE,
            pass_fds=(mounted.root,),
        )
        assert (await reader.communicate())[0] == b"world"
    finally:
        await mounted.unmount()


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
async def test_two_backups_of_one_machine_are_open_at_once(
    attach: Callable[..., Loop], tools: Tools, kind: str
) -> None:
    first, second = make(kind, PLACE / "first.img"), PLACE / "second.img"
    with written(first, kind) as inside:
        (inside / "which").write_text("first", encoding="ascii")
    shutil.copyfile(first, second)
    with written(second, kind) as inside:
        (inside / "which").write_text("second", encoding="ascii")
    one = await mount(tools, kind, attach(first))
    two = await mount(tools, kind, attach(second), where=PLACE / "m2")
    try:
        assert (read(one, "which"), read(two, "which")) == (b"first", b"second")
    finally:
        await two.unmount()
        await one.unmount()


@pytest.fixture
def refused_once(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A kernel before 6.7 that has a copy of the file system mounted: it refuses until its identity is another one.

    The programs that were run.
    """
    running, ran = Tools.run, []

    async def run_or_refuse(tools: Tools, jail: Jail, name: str, *arguments: str, **more: Any) -> Completed:  # noqa: ANN401
        ran.append(name)
        if ran == ["mount"]:
            raise ToolError(["mount"], 32, "mount(2) system call failed: File exists.")
        return await running(tools, jail, name, *arguments, **more)

    monkeypatch.setattr(Tools, "run", run_or_refuse)
    return ran


@pytest.mark.parametrize(("journal", "view"), [("replay", "replayed"), ("as-crashed", "as-crashed")])
async def test_a_btrfs_whose_copy_is_mounted_gets_another_identity(
    attach: Callable[..., Loop], tools: Tools, refused_once: list[str], journal: Journal, view: str
) -> None:
    image = make_dirty("btrfs", PLACE / "disk.img")
    before = image.read_bytes()
    identity = run("blkid", "-p", "-o", "value", "-s", "UUID", image).strip()
    loop = attach(image)
    mounted = await mount(tools, "btrfs", loop, journal=journal)
    try:
        assert refused_once == ["mount", sys.executable, "mount"]
        assert mounted.view == view
        assert run("blkid", "-p", "-o", "value", "-s", "UUID", loop.path).strip() != identity
        assert read(mounted, "hello") == b"world"
        if journal == "replay":
            assert read(mounted, "late") == b"journal"
        else:
            with pytest.raises(FileNotFoundError):
                read(mounted, "late")
    finally:
        await mounted.unmount()
    if journal == "as-crashed":
        after = image.read_bytes()
        changed = [at for at in range(0, len(after), 4096) if after[at : at + 4096] != before[at : at + 4096]]
        assert changed == [65536], "the superblock alone"


async def test_one_that_was_left_cleanly_stays_clean_under_another_identity(
    attach: Callable[..., Loop], tools: Tools, refused_once: list[str]
) -> None:
    mounted = await mount(tools, "btrfs", attach(make("btrfs", PLACE / "disk.img")))
    try:
        assert mounted.view == "clean"
        assert len(refused_once) == 3
    finally:
        await mounted.unmount()


@pytest.mark.parametrize(("kind", "read_only", "ran"), [
    ("ext4", False, ["mount"]),
    ("btrfs", True, ["mount"]),
])  # fmt: skip
async def test_no_other_gets_one(
    attach: Callable[..., Loop], tools: Tools, refused_once: list[str], kind: str, *, read_only: bool, ran: list[str]
) -> None:
    loop = attach(make(kind, PLACE / "disk.img"), read_only=read_only)
    with pytest.raises(MountRefused, match="unmount the other backup"):
        await mount(tools, kind, loop)
    assert refused_once == ran


async def test_a_btrfs_that_cannot_have_another_identity_says_so(
    attach: Callable[..., Loop], tools: Tools, refused_once: list[str]
) -> None:
    image = PLACE / "disk.img"
    with image.open("wb") as file:
        file.truncate(SIZES["btrfs"])
    run("mkfs.btrfs", "-q", "--csum", "xxhash", image)
    with pytest.raises(MountRefused, match="cannot be given another identity"):
        await mount(tools, "btrfs", attach(image))
    assert refused_once == ["mount", sys.executable]
