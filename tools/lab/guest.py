"""Guest disks and backup chains, made the way a running virtual machine makes them.

A guest boots from the last image of its chain, that is: a new qcow2 layer over it is served by
``qemu-storage-daemon`` and its partitions are mounted read-write, journals replayed. It works, and while it is still
mounted the layer is copied as it is on the storage at that moment. That copy is the backup: what a power cut
would leave, journals dirty, the last synced files in the journal only. Root, inside ``namespace.enter``.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import select
import signal
import socket
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sendense_restored import linux

from . import children, gpt, namespace

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_MIB = 1 << 20
_SECTOR = 512
_MS_SHARED = 1 << 20  # mount(2)
_GAP = _MIB
"""Before the first and after the last partition, for the two partition tables."""


@dataclass(frozen=True)
class Partition:
    """One partition with one file system on it."""

    filesystem: str
    size: int
    """Bytes."""
    make: tuple[str, ...]
    """The command that makes the file system, to which the device is added. Nothing may be left for the kernel to do
    in the background (lazy initialisation), so that a backup's content does not depend on timing."""


# About the smallest that each file system's own tool makes.
EXT4 = Partition(
    "ext4", 64 * _MIB, ("mkfs.ext4", "-q", "-L", "system", "-E", "lazy_itable_init=0,lazy_journal_init=0")
)
XFS = Partition("xfs", 304 * _MIB, ("mkfs.xfs", "-q", "-L", "data"))
BTRFS = Partition("btrfs", 128 * _MIB, ("mkfs.btrfs", "-q", "-L", "home"))


@dataclass(frozen=True)
class GuestFile:
    """A regular file as a restore must give it back."""

    size: int
    mode: int
    """Permission bits."""
    sha256: str


@dataclass(frozen=True)
class Backup:
    """One image of the chain, and what was in the guest when it was taken."""

    image: Path
    sha256: str
    """Of the image file."""
    files: Mapping[str, Mapping[bytes, GuestFile]]
    """Regular files by volume (``partition-1``) and path in the volume (``b"/etc/hostname"``)."""
    journal_only: bytes
    """A file of each volume that is there once the journal is replayed and missing from the bare file system."""


@dataclass(frozen=True)
class Chain:
    """A full backup and its incrementals, oldest first."""

    vm: str
    disk_size: int
    """Bytes."""
    partitions: tuple[Partition, ...]
    backups: tuple[Backup, ...]

    def unchanged(self) -> bool:
        """Whether every image still has the bytes that it was made with."""
        return all(_sha256(backup.image) == backup.sha256 for backup in self.backups)


def make_chain(
    repository: Path, work: Path, *, vm: str = "web01", partitions: tuple[Partition, ...] = (EXT4, XFS, BTRFS)
) -> Chain:
    """Write ``<repository>/<vm>/2026-01-0N-{full,inc1,inc2}.qcow2``; ``work`` is an empty directory."""
    directory = repository / vm
    directory.mkdir(parents=True)
    size = sum(partition.size for partition in partitions) + 2 * _GAP
    backups: list[Backup] = []
    below: Path | None = None
    for number, (name, change) in enumerate((("full", _install), ("inc1", _work), ("inc2", _work_again)), start=1):
        journal_only = f"journal-of-{name}.txt"
        image = directory / f"2026-01-0{number}-{name}.qcow2"
        base = [] if below is None else ["-b", below.name, "-F", "qcow2"]
        children.run("qemu-img", "create", "-q", "-f", "qcow2", *base, str(image), *([] if base else [str(size)]))
        with _served(image, work) as (server, disk):
            if below is None:
                _format(disk, partitions, work)
            with contextlib.ExitStack() as mounted:
                files = {}
                for index, (offset, partition) in enumerate(_layout(partitions), start=1):
                    root = mounted.enter_context(_mounted(disk, offset, partition, work / f"partition-{index}"))
                    change(root)
                    if below is None and index == 1:
                        _crowd(root)
                    files[f"partition-{index}"] = _leave_dirty(root, journal_only)
                copy = _power_cut(server, image)
        copy.replace(image)
        backups.append(Backup(image, _sha256(image), files, b"/" + journal_only.encode()))
        below = image
    return Chain(vm, size, partitions, tuple(backups))


# What the guest does.


def _install(root: Path) -> None:
    for directory in ("etc", "srv/a/b/c/d", "var/log", "dev", "tmp", "links", "données"):
        (root / directory).mkdir(parents=True)
    _write(root / "etc/hostname", b"web01\n")
    _write(root / "etc/secret.key", b"only root may read this\n", mode=0o600)
    _write(root / "etc/empty", b"")
    _write(root / "srv/a/b/c/d/deep.txt", b"five levels down\n", owner=1000)
    _write(root / "srv/large.bin", _noise(1, 5 * _MIB + 123))
    _write(root / "srv/goes.txt", b"deleted before the last backup\n")
    _write(root / "données/été.txt", "déjà vu\n".encode())
    _write(root / os.fsdecode(b"tmp/caf\xe9.txt"), b"a name in Latin-1\n")
    _write(root / "tmp/line\nbreak \x1b[31m.txt", b"a name that a terminal must not see\n")
    _write(root / "var/log/app.log", b"started\n")
    (root / "var/log/app.log.1").hardlink_to(root / "var/log/app.log")
    with (root / "srv/sparse.img").open("wb") as sparse:
        sparse.truncate(64 * _MIB)
        sparse.seek(40 * _MIB)
        sparse.write(b"in the middle of nothing")
    os.setxattr(root / "etc/hostname", "user.comment", b"an attribute")

    (root / "links/relative").symlink_to("../etc/hostname")
    (root / "links/absolute").symlink_to("/etc/hostname")
    (root / "links/outside").symlink_to("../../../../../../etc/passwd")
    (root / "links/dangling").symlink_to("nowhere")
    (root / "links/loop").symlink_to("loop")
    os.mkfifo(root / "tmp/fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        parent = os.open(root / "tmp", os.O_PATH)  # the whole path may be longer than an address can be
        listener.bind(f"/proc/self/fd/{parent}/socket")
        os.close(parent)
    os.mknod(root / "dev/disk", stat.S_IFBLK | 0o660, os.makedev(8, 0))
    os.mknod(root / "dev/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))


def _crowd(root: Path) -> None:
    """More files in one directory than fit on a page of a listing."""
    for number in range(1200):
        (root / f"srv/a/{number:04}").symlink_to("nowhere")


def _work(root: Path) -> None:
    with (root / "var/log/app.log").open("ab") as log:
        log.write(b"worked\n")
    _write(root / "srv/large.bin", _noise(2, 3 * _MIB + 7))
    _write(root / "srv/first-increment.txt", b"new\n")


def _work_again(root: Path) -> None:
    with (root / "var/log/app.log").open("ab") as log:
        log.write(b"worked again\n")
    (root / "srv/goes.txt").unlink()
    _write(root / "srv/second-increment.txt", b"newer\n")


def _noise(seed: int, size: int) -> bytes:
    """Bytes that do not compress and are the same in every run."""
    return random.Random(seed).randbytes(size)  # noqa: S311 - nothing secret about it


def _write(file: Path, content: bytes, *, mode: int = 0o644, owner: int = 0) -> None:
    file.write_bytes(content)
    file.chmod(mode)
    os.chown(file, owner, owner)


def _leave_dirty(root: Path, journal_only: str) -> dict[bytes, GuestFile]:
    """Bring everything to the disk, then one more file as far as the journal; the files that a restore must give."""
    children.run("sync", "--file-system", str(root))
    with (root / journal_only).open("wb") as late:
        late.write(b"synced, then the power went\n")
        late.flush()
        os.fsync(late.fileno())
    found = {}
    for directory, _, names in os.walk(os.fsencode(root)):
        for name in names:
            path = directory + b"/" + name
            status = os.lstat(path)
            if stat.S_ISREG(status.st_mode):
                file = GuestFile(status.st_size, stat.S_IMODE(status.st_mode), _sha256(Path(os.fsdecode(path))))
                found[path.removeprefix(os.fsencode(root))] = file
    return found


# What its hypervisor does.


def _layout(partitions: tuple[Partition, ...]) -> Iterator[tuple[int, Partition]]:
    """Each partition with the byte that it starts at."""
    offset = _GAP
    for partition in partitions:
        yield offset, partition
        offset += partition.size


def _format(disk: Path, partitions: tuple[Partition, ...], work: Path) -> None:
    """Write a GPT and the file systems; these are made in files of their own, so that no loop device is needed."""
    with disk.open("r+b") as file:
        gpt.write(file, [(offset // _SECTOR, partition.size // _SECTOR) for offset, partition in _layout(partitions)])
    for offset, partition in _layout(partitions):
        blank = work / "blank"
        with blank.open("wb") as file:
            file.truncate(partition.size)
        children.run(*partition.make, str(blank))
        _copy_data(blank, disk, offset)
        blank.unlink()


def _copy_data(source: Path, target: Path, offset: int) -> None:
    """Copy what is not a hole in ``source`` to ``target``, ``offset`` bytes further on."""
    with source.open("rb") as reading, target.open("r+b") as writing:
        end = 0
        while True:
            try:
                start = os.lseek(reading.fileno(), end, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:  # no data behind `end`
                    raise
                return
            end = os.lseek(reading.fileno(), start, os.SEEK_HOLE)
            reading.seek(start)
            writing.seek(offset + start)
            writing.write(reading.read(end - start))


@contextlib.contextmanager
def _served(image: Path, work: Path) -> Iterator[tuple[int, Path]]:
    """The disk that is in ``image``, as a file that can be written; gives the server's pid and the file.

    The server lives in a mount namespace of its own, where nothing is mounted that it serves: being the last one in
    ours, it would have to write the guest's file systems back to itself while it dies, and would hang for ever. A
    directory that is shared between the two namespaces carries its export over to ours.
    """
    shared = work / "served"
    shared.mkdir(exist_ok=True)
    disk = shared / "disk"
    node = {
        "driver": "qcow2",
        "node-name": "disk",
        "discard": "unmap",
        "detect-zeroes": "unmap",  # or an empty XFS log would take 64 MiB of the image
        "file": {"driver": "file", "filename": str(image), "discard": "unmap"},
    }
    export = f"type=fuse,id=disk,node-name=disk,writable=on,mountpoint={disk}"
    argv = ["unshare", "--mount", "--propagation=unchanged"]
    argv += ["qemu-storage-daemon", "--blockdev", json.dumps(node), "--export", export]
    log = work / "qemu-storage-daemon.log"
    linux.mount(str(shared), shared, None, linux.MS_BIND)
    try:
        linux.mount("", shared, None, _MS_SHARED)
        disk.touch()
        with children.running(argv, log=log) as server:
            if not _appears(disk, server.pid):
                raise RuntimeError(f"qemu-storage-daemon did not start: {log.read_text(encoding='utf-8')}")
            yield server.pid, disk
    finally:
        linux.umount(shared, linux.MNT_DETACH)  # with the export in it, if the server had to be killed


def _appears(mount_point: Path, server: int) -> bool:
    """Wait until something is mounted there; False if the process ``server`` ends before."""
    ended = os.pidfd_open(server)
    with os.fdopen(ended), Path("/proc/self/mountinfo").open(encoding="utf-8") as mounts:
        events = select.poll()
        events.register(ended, select.POLLIN)
        events.register(mounts, select.POLLPRI)  # the kernel's sign that the table has changed (proc(5))
        while not namespace.is_mount_point(mount_point):
            if any(descriptor == ended for descriptor, _ in events.poll()):
                return False
    return True


@contextlib.contextmanager
def _mounted(disk: Path, offset: int, partition: Partition, where: Path) -> Iterator[Path]:
    where.mkdir(exist_ok=True)
    # mount's own loop device goes by itself with the mount. No atime: reading what was written must not write.
    options = f"loop,offset={offset},sizelimit={partition.size},noatime"
    children.run("mount", "-t", partition.filesystem, "-o", options, str(disk), str(where))
    try:
        yield where
    finally:
        children.run("umount", str(where))


def _power_cut(server: int, image: Path) -> Path:
    """A copy of the image as it is on the storage at one moment of the running guest."""
    copy = image.with_suffix(".copy")
    os.kill(server, signal.SIGSTOP)
    try:
        children.run("cp", "--sparse=always", str(image), str(copy))
    finally:
        os.kill(server, signal.SIGCONT)
    return copy


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
