"""The disks that are mounted: made once per run, on first use, below a directory that the stage removes.

Everything is the same in every run but for the UUIDs. Root, inside ``namespace.enter``.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tools.lab import children, guest

if TYPE_CHECKING:
    from pathlib import Path

_MIB = 1 << 20
_MKFS = ("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0")
BLOB = "blob"
"""The name of the large file in the root of the tree's volume."""
VOLUME = "disk"
"""The volume's name on a disk without a partition table."""


@dataclass(frozen=True)
class Repository:
    """A directory that the service's catalogue can take in."""

    path: Path
    images: tuple[Path, ...]
    """The image of each backup, oldest first, or by machine where each has one."""


def four_volumes(directory: Path) -> tuple[Repository, list[tuple[int, int, str]]]:
    """A chain of three images with four dirty file systems, and ``(start, size, type)`` of those, in sectors."""
    (directory / "work").mkdir(parents=True)
    partitions = (guest.EXT4, guest.XFS, guest.BTRFS, guest.EXT4)
    chain = guest.make_chain(directory / "repository", directory / "work", vm="four", partitions=partitions)
    places, start = [], _MIB // 512
    for partition in partitions:
        places.append((start, partition.size // 512, partition.filesystem))
        start += partition.size // 512
    return Repository(directory / "repository", tuple(backup.image for backup in chain.backups)), places


def tree(directory: Path, sizes: tuple[int, ...], blob: int) -> Repository:
    """One ext4 with a directory of each size, named by it, and a file of ``blob`` random bytes."""
    image = _repository(directory, "tree") / "full.qcow2"
    raw, root = directory / "raw", directory / "root"
    inodes = sum(sizes) * 11 // 10 + 1000
    with raw.open("wb") as file:
        file.truncate(256 * _MIB + inodes * 512 + blob * 11 // 10)
    # Without a journal a million files are made in half the time; how they are read is the same.
    children.run(*_MKFS, "-O", "^has_journal", "-N", str(inodes), str(raw))
    root.mkdir()
    children.run("mount", "-o", "loop,noatime", str(raw), str(root))
    try:
        for size in sizes:
            _crowd(root / str(size), size)
        with (root / BLOB).open("wb") as file:
            noise = random.Random(blob)  # noqa: S311 - nothing secret about it
            for _ in range(blob // _MIB):
                file.write(noise.randbytes(_MIB))
    finally:
        children.run("umount", str(root))
    children.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(image))
    raw.unlink()
    return Repository(image.parent.parent, (image,))


def deep(directory: Path, depth: int) -> Repository:
    """A chain of ``depth`` images over a small ext4; each layer but the first is empty."""
    folder = _repository(directory, "deep")
    images = [_small(folder / f"{1:03}.qcow2", directory)]
    for number in range(2, depth + 1):
        image = folder / f"{number:03}.qcow2"
        backing = images[-1].name
        children.run("qemu-img", "create", "-q", "-f", "qcow2", "-b", backing, "-F", "qcow2", str(image))
        images.append(image)
    return Repository(folder.parent, tuple(images))


def many(directory: Path, count: int) -> Repository:
    """So many machines with one backup each, of a small ext4."""
    images = [_small(_repository(directory, f"vm-{number:03}") / "full.qcow2", directory) for number in range(count)]
    return Repository(directory / "repository", tuple(images))


def _repository(directory: Path, vm: str) -> Path:
    folder = directory / "repository" / vm
    folder.mkdir(parents=True)
    return folder


def _small(image: Path, directory: Path) -> Path:
    raw = directory / "raw"
    with raw.open("wb") as file:
        file.truncate(64 * _MIB)
    children.run(*_MKFS, str(raw))
    children.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(image))
    raw.unlink()
    return image


def _crowd(directory: Path, size: int) -> None:
    """``size`` empty files with names of a usual length."""
    directory.mkdir()
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for number in range(size):
            os.mknod(f"document-{number:07}.txt", 0o644, dir_fd=descriptor)
    finally:
        os.close(descriptor)
