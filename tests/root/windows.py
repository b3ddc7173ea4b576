"""An NTFS with what Windows leaves on one: as far as ntfs-3g writes it, and beyond that in the disk's own records."""

from __future__ import annotations

import os
import struct
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ENCRYPTED, OFFLINE, RECALL_ON_DATA_ACCESS, EXTENDED = 0x4000, 0x1000, 0x400000, 0x40000
MOUNT_POINT, SYMLINK = 0xA0000003, 0xA000000C
_RECORD = 1024


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True)


def make(image: Path, size: int = 32 << 20) -> Path:
    """An empty NTFS."""
    with image.open("wb") as file:
        file.truncate(size)
    run("mkntfs", "-q", "-F", "-f", image)
    return image


@contextmanager
def written(image: Path) -> Iterator[Path]:
    """The file system, mounted for writing. Encrypted files are written as they lie on the disk."""
    inside = image.with_name("inside")
    inside.mkdir()
    run("ntfs-3g", "-o", "streams_interface=windows,efs_raw", image, inside)
    try:
        yield inside
    finally:
        run("umount", inside)
        inside.rmdir()


def write(path: Path, content: bytes = b"content", **streams: bytes) -> Path:
    """A file and its streams."""
    path.write_bytes(content)
    for name, data in streams.items():
        Path(f"{path}:{name}").write_bytes(data)
    return path


def reparse(path: Path, tag: int, data: bytes) -> None:
    """Make a reparse point of a file or an empty directory."""
    os.setxattr(path, "system.ntfs_reparse_data", struct.pack("<IHH", tag, len(data), 0) + data)


def junction(path: Path, target: str) -> None:
    """A directory that leads to another one, as ``mklink /J`` makes it."""
    path.mkdir()
    real, shown = f"\\??\\{target}".encode("utf-16-le"), target.encode("utf-16-le")
    lengths = struct.pack("<4H", 0, len(real), len(real) + 2, len(shown))
    reparse(path, MOUNT_POINT, lengths + real + b"\0\0" + shown + b"\0\0")


def link(path: Path, target: str, *, relative: bool = False, directory: bool = False) -> None:
    """A symbolic link, as ``mklink`` makes it."""
    path.mkdir() if directory else path.touch()
    text = (target if relative else f"\\??\\{target}").encode("utf-16-le")
    reparse(path, SYMLINK, struct.pack("<4HI", 0, len(text), 0, len(text), int(relative)) + text)


SECTORS = b"ciphertext has whole sectors    " * 48
"""Of an encrypted file with 24 bytes of padding, which is told after it."""
PADDED = SECTORS + struct.pack("<H", 24)


def encrypt(path: Path) -> None:
    """Make an encrypted file of one that has nothing but ``PADDED`` in it and in its streams."""
    os.setxattr(path, "system.ntfs_efsinfo", struct.pack("<I", 100) + bytes(96))


def add_flags(image: Path, number: int, flags: int) -> None:
    """Set attributes of the file ``number`` (its inode's) in its record, which ntfs-3g would not set."""
    disk = bytearray(image.read_bytes())
    places = [
        place
        for place in range(0, len(disk), _RECORD)
        if disk[place : place + 4] == b"FILE" and struct.unpack_from("<I", disk, place + 0x2C)[0] == number
    ]
    assert places, number
    for place in places:
        (first,) = struct.unpack_from("<H", disk, place + 0x14)
        kind, _, _, _, _, _, _, _, start = struct.unpack_from("<IIBBHHHIH", disk, place + first)
        assert kind == 0x10  # $STANDARD_INFORMATION, always the first and in the first sector
        field = place + first + start + 0x20
        struct.pack_into("<I", disk, field, struct.unpack_from("<I", disk, field)[0] | flags)
    image.write_bytes(disk)
